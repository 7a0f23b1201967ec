"""What a federation is: its clients, how they train, and what they send."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, Strategy

from privet.errors import UsageError
from privet.federation.base import Codec
from privet.federation.budget import Budget
from privet.federation.dhq import DHQ
from privet.federation.flower.link import Arrays, difference, schema_of
from privet.federation.flower.mod import CodecMod, First
from privet.federation.flower.strategy import CodecStrategy, Watch
from privet.federation.message import CODECS
from privet.federation.partition import LARGEST_ALPHA, Index, dirichlet, iid
from privet.federation.quantise import DeadZone, Lloyd
from privet.federation.sampling import (
    Cosine,
    Cyclic,
    Exponential,
    Linear,
    Sampler,
    Schedule,
    Static,
    Step,
    Uniform,
    Weighted,
)
from privet.models.projection import PREFIX

STRATEGIES: dict[str, type[FedAvg]] = {"fedavg": FedAvg, "fedavgm": FedAvgM, "fedadam": FedAdam}
SAMPLERS: dict[str, type[Sampler]] = {"uniform": Uniform, "cyclic": Cyclic, "weighted": Weighted}
CODEC_NAMES: dict[str, Callable[[], Codec]] = {
    **CODECS,
    "dhq-lloyd": lambda: DHQ(quantiser=Lloyd()),
    "dhq-deadzone": lambda: DHQ(quantiser=DeadZone()),
}
SCHEDULES = ("static", "exponential", "linear", "cosine", "step")
WHOLE = "none"  # in place of a codec's name: whole models


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A federation.

    Attributes:
        architecture: a name for `create_model`.
        clients: how many there are.
        alpha: of the Dirichlet distribution that splits the classes among them; 0 deals the images at random.
        rounds: how many are played.
        strategy: fedavg, fedavgm or fedadam.
        codec: of updates: dhq, dhq-lloyd, dhq-deadzone, fp16, int8, qsgd, ..., or none for whole models.
        budget: of an update: "1%" of its values or "64KiB" in all; empty for the codec's usual size, which is 1 % of
            the values for one that chooses, and all of them for others.
        download: codec of the differences that go down, likewise.
        download_budget: their budget.
        sampler: uniform, cyclic or weighted (clients are drawn by their numbers of images, and then count alike).
        schedule: of the fraction of clients: static, exponential (dynamic sampling), linear, cosine or step.
        fraction: of the clients in the first round.
        decay: β of the exponential schedule.
        floor: least fraction.
        local_epochs: of a client's training in a round.
        batch_size: images a step.
        learning_rate: of the clients' plain SGD.
        augment: whether clients shift and mirror their images.
        seed: of weights, split, sampling and training.
    """

    architecture: str = "lenet"
    clients: int = 50
    alpha: float = 0.3
    rounds: int = 100
    strategy: str = "fedavg"
    codec: str = "dhq-deadzone"
    budget: str = ""
    download: str = "dhq-deadzone"
    download_budget: str = ""
    sampler: str = "cyclic"
    schedule: str = "static"
    fraction: float = 0.2
    decay: float = 0.01
    floor: float = 0.05
    local_epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 0.05
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("strategy", STRATEGIES), ("sampler", SAMPLERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"Unknown {name} {getattr(self, name)!r}; expected one of {', '.join(known)}."
                )
        if self.architecture.startswith(PREFIX):
            raise UsageError(
                f"{self.architecture} learns without labels, and clients learn from theirs; name a network without "
                f"{PREFIX!r}."
            )
        for name, budget in ((self.codec, self.budget), (self.download, self.download_budget)):
            _compression(name, budget)
        if min(self.clients, self.rounds, self.local_epochs, self.batch_size) < 1:
            raise UsageError(
                "Expected at least 1 client, 1 round, 1 local epoch and batches of 1, got "
                f"{self.clients}, {self.rounds}, {self.local_epochs} and {self.batch_size}."
            )
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"Expected a finite learning rate above 0, got {self.learning_rate}.")
        if not 0 <= self.alpha <= LARGEST_ALPHA:
            raise UsageError(
                f"Expected alpha above 0 and up to {LARGEST_ALPHA:g}, or 0 for a random deal, got {self.alpha}."
            )
        # Also where the schedule makes no use of them: they are on record.
        if not (0 <= self.decay < math.inf and 0 <= self.floor <= 1):
            raise UsageError(
                f"Expected a finite decay of 0 or more and a floor from 0 to 1, got {self.decay} and {self.floor}."
            )
        self.schedule_of_fractions()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Return the plan in a Flower run's configuration, where words are joined by hyphens."""
        known = {field.name: field.name.replace("_", "-") for field in fields(cls)}
        return cls(**{name: config[key] for name, key in known.items() if key in config})

    def json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return asdict(self)

    def split(self, labels: Index) -> list[Index]:
        """Return the positions of each client's images."""
        if self.alpha == 0:
            return iid(len(labels), self.clients, seed=self.seed)
        return dirichlet(labels, self.clients, alpha=self.alpha, seed=self.seed)

    def mod(self, first: First | None = None) -> CodecMod:
        """Return the clients' mod; `first` is as for `CodecMod`."""
        codec, budget = _compression(self.codec, self.budget)
        return CodecMod(codec, budget=budget, first=first)

    def wrapper(
        self,
        sizes: Mapping[str, int],
        *,
        nodes: int | None = None,
        watch: Watch | None = None,
        classes: Sequence[str] = (),
    ) -> CodecStrategy:
        """Return the server's strategy.

        Args:
            sizes: number of images by client's name, for the weighted sampler.
            nodes: how many to wait for before the first round; None for all clients.
            watch: as for `CodecStrategy`.
            classes: likewise.
        """
        codec, budget = _compression(self.download, self.download_budget)
        return CodecStrategy(
            self.inner(),
            codec=codec,
            budget=budget,
            sampler=self.draw(sizes),
            nodes=nodes or self.clients,
            watch=watch,
            classes=classes,
        )

    def check(self, model: Arrays) -> None:
        """Check that messages of this model keep the budgets; only budgets of bytes can be too small.

        Args:
            model: the first one. A message of its values takes about as much as one of an update.

        Raises:
            UsageError: a budget is too small.
        """
        for option, name, given in (
            ("budget", self.codec, self.budget),
            ("download budget", self.download, self.download_budget),
        ):
            codec, budget = _compression(name, given)
            if codec is None or budget is None or budget.bytes is None:
                continue
            update = difference(model, {name: np.zeros_like(array) for name, array in model.items()})
            try:
                codec.encode(update, schema=schema_of(model), budget=budget)
            except UsageError as error:
                raise UsageError(f"The {option} is too small for {self.architecture}. {error}") from error

    def inner(self) -> Strategy:
        """Return the strategy that averages."""
        return STRATEGIES[self.strategy](
            fraction_evaluate=0.0, min_train_nodes=1, min_evaluate_nodes=0, min_available_nodes=1
        )

    def draw(self, sizes: Mapping[str, int]) -> Sampler:
        """Return the sampler."""
        settings: dict[str, Any] = {
            "schedule": self.schedule_of_fractions(),
            "seed": self.seed,
            "least": min(2, self.clients),
        }
        if self.sampler == "weighted":
            return Weighted(**settings, weights=sizes)
        return SAMPLERS[self.sampler](**settings)

    def schedule_of_fractions(self) -> Schedule:
        """Return what gives each round's fraction of clients."""
        if self.schedule == "static":
            return Static(self.fraction)
        if self.schedule == "exponential":
            return Exponential(self.fraction, self.decay, self.floor)
        if self.schedule == "step":
            return Step(self.fraction, floor=self.floor, every=max(1, self.rounds // 3))
        kind = Cosine if self.schedule == "cosine" else Linear
        return kind(self.fraction, self.floor, self.rounds)


def create_codec(name: str) -> Codec | None:
    """Return the codec of this name, or None for whole models.

    Raises:
        UsageError: there is none.
    """
    if name == WHOLE:
        return None
    if name not in CODEC_NAMES:
        raise UsageError(f"Unknown codec {name!r}; expected one of {', '.join([WHOLE, *CODEC_NAMES])}.")
    return CODEC_NAMES[name]()


def _compression(name: str, budget: str) -> tuple[Codec | None, Budget | None]:
    """Return the codec of this name, or None for whole models, and its budget, or None for its usual size.

    Raises:
        UsageError: there is no such codec, or it has no such budget.
    """
    codec = create_codec(name)
    if codec is None and budget:
        raise UsageError(f"Whole models have no budget, got {budget}; leave it out, or choose a codec.")
    return codec, codec.allow(budget or None) if codec is not None else None
