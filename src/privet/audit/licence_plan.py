"""The grid of a licence's audit: who trains on a release, with which network and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from privet.errors import UsageError
from privet.learning import Learner
from privet.models import create_model
from privet.models.projection import PREFIX
from privet.recovery import create_recovery
from privet.recovery.prior import fingerprint

CLEAN, LICENSEE, PLAIN = "clean files", "licensee", "files as they are"
ANOTHER_KEY, FILES_ALONE, DISTILLED = "another key", "files alone", "distilled"
LEARNED = "learned layer"
PAIRS, RECOVERY = "pairs", "recovery"
CLEAN_PART, MIXED = "clean part alone", "clean part and release"
# What a licensee may want to do otherwise than the recipe says, each beside the same on clean files.
FREEDOM: dict[str, Callable[[Learner], Learner]] = {
    "": lambda learner: learner,
    # Rate and decay of the recipe are meant for its own optimiser.
    "adamw": lambda learner: replace(learner, optimiser="adamw", learning_rate=None, weight_decay=None),
    "a tenth of the rate": lambda learner: replace(learner, learning_rate=learner.rate / 10),
    "distorted views": lambda learner: replace(learner, distort=True),
}


@dataclass(frozen=True, order=True, kw_only=True)
class Seat:
    """One learner to train.

    Attributes:
        who: trains it, and with what in hand; "recovery jpeg-10" and "pairs 50" name what is tried.
        architecture: its network.
        seed: of weights, order and views.
        freedom: how it trains otherwise than the recipe says; empty for as it says.
    """

    who: str
    architecture: str
    seed: int
    freedom: str = ""


@dataclass(frozen=True, kw_only=True)
class LicencePlan:
    """Who trains on a release.

    Attributes:
        architectures: names for `create_model`; the first is the recipe's, with which everything is tried.
        seeds: of every learner.
        tries: seeds with which outsiders train the recipe's network on the files as they are.
        recoveries: names for `create_recovery`, tried by outsiders.
        pairs: how many images an outsider has both clean and protected, each number a try.
        share: of the originals that an outsider has and mixes in; 0 to leave that out.
        learner: the licence's recipe.
        prior: a folder or a model of the hub, for recoveries that denoise with one.
    """

    architectures: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    tries: int = 5
    recoveries: tuple[str, ...] = ("jpeg-10", "grayscale", "versions")
    pairs: tuple[int, ...] = (50,)
    share: float = 0.1
    learner: Learner
    prior: str | None = None

    def __post_init__(self) -> None:
        for kind, values in (("architecture", self.architectures), ("seed", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise UsageError(f"An audit needs at least one {kind}, each only once; got {list(values)}.")
        if self.architectures[0] != self.learner.architecture:
            raise UsageError(
                f"The first architecture must be the recipe's, {self.learner.architecture}; got "
                f"{self.architectures[0]}."
            )
        if self.learner.architecture.startswith(PREFIX):
            raise UsageError(
                f"The recipe's network is imitated and trained with AdamW, for which it must learn with labels; got "
                f"{self.learner.architecture}."
            )
        if self.tries < 1 or min(self.pairs, default=1) < 1 or not 0 <= self.share < 1:
            raise UsageError(
                "An audit needs at least one try, one pair, and a share from 0 to below 1; got "
                f"{self.tries}, {list(self.pairs)} and {self.share}."
            )
        for architecture in self.architectures:
            create_model(architecture, classes=2, size=(32, 32))
        for recovery in self.recoveries:
            create_recovery(recovery, prior=self.prior).adapt(self.learner)

    def seats(self, *, stem: bool, lock: bool, weights: bool) -> list[Seat]:
        """Return every learner, references first, those with the licensee's network in hand last.

        Args:
            stem: whether the licence has one; there may be other keys then.
            lock: whether it has one; with either, the design says what to look for in the files.
            weights: whether it has initial weights, which fit the recipe's network alone.
        """
        main, others = self.architectures[0], self.architectures[1:]

        def each(who: str, *, freedom: str = "") -> list[Seat]:
            return [Seat(who=who, architecture=main, seed=seed, freedom=freedom) for seed in self.seeds]

        def everywhere(who: str) -> list[Seat]:
            return each(who) + [
                Seat(who=who, architecture=other, seed=seed) for other in others for seed in self.seeds
            ]

        seats = everywhere(CLEAN) + (each(LICENSEE) if weights else everywhere(LICENSEE))
        tried = sorted({*self.seeds, *range(self.tries)})
        seats += [Seat(who=PLAIN, architecture=main, seed=seed) for seed in tried]
        seats += [one for one in everywhere(PLAIN) if one.architecture != main]
        for recovery in self.recoveries:
            seats += each(f"{RECOVERY} {recovery}")
        if stem:
            seats += each(ANOTHER_KEY) + each(LEARNED)
        if stem or lock:
            seats += each(FILES_ALONE)
            for pairs in self.pairs:
                seats += each(f"{PAIRS} {pairs}")
        if self.share:
            seats += each(CLEAN_PART) + each(MIXED)
        for freedom in filter(None, FREEDOM):
            for who in (CLEAN, LICENSEE):
                seats.append(Seat(who=who, architecture=main, seed=self.seeds[0], freedom=freedom))
        return seats + each(DISTILLED)

    def learner_of(self, seat: Seat, *, weights: Path | None) -> Learner:
        """Return how a seat's learner trains."""
        learner = FREEDOM[seat.freedom](replace(self.learner, architecture=seat.architecture))
        if seat.who == LICENSEE:
            learner = replace(learner, weights=weights)
        if seat.who.startswith(RECOVERY):
            learner = create_recovery(seat.who.removeprefix(f"{RECOVERY} "), prior=self.prior).adapt(learner)
        return learner

    def settings(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "architectures": list(self.architectures),
            "seeds": list(self.seeds),
            "tries": self.tries,
            "recoveries": list(self.recoveries),
            "pairs": list(self.pairs),
            "share": self.share,
            "learner": {**asdict(self.learner), "weights": None},
            "prior": None if self.prior is None else fingerprint(self.prior),
        }
