"""Which clients take part in a round: how many, by a schedule, and who, by a sampler.

Whoever takes part depends on the seed, the round and the clients' stable names alone, never on the order in which
they are listed or connect, nor on earlier rounds having been played in this process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

from privet.errors import UsageError
from privet.seeds import derive


class Schedule(Protocol):
    """Anything that gives a round's fraction of clients."""

    def fraction(self, round: int) -> float:
        """Return the fraction of clients in this round, counted from 0."""


@dataclass(frozen=True)
class Exponential:
    """c_t = C e^(-βt), not below a floor (dynamic sampling: Ji et al., arXiv 2003.09603, eq. 3).

    Attributes:
        start: C, the first round's fraction.
        rate: β; after ln 2 / β rounds the fraction has halved.
        floor: the least fraction. It is not in the paper; without one, error feedback starves.
    """

    start: float = 1.0
    rate: float = 0.01
    floor: float = 0.05

    def __post_init__(self) -> None:
        _check(self.start, self.floor)
        if not 0 <= self.rate < math.inf:
            raise UsageError(f"Expected a finite rate of 0 or more, got {self.rate}.")

    def fraction(self, round: int) -> float:
        return max(self.floor, self.start * math.exp(-self.rate * round))


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in equal steps over `rounds`, then `end`."""

    start: float = 1.0
    end: float = 0.05
    rounds: int = 100

    def __post_init__(self) -> None:
        _check(self.start, self.end, self.rounds)

    def fraction(self, round: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, round / self.rounds)


class Cosine(Linear):
    """From `start` to `end` along half a cosine over `rounds`, then `end`."""

    def fraction(self, round: int) -> float:
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, round / self.rounds)))
        return self.end + (self.start - self.end) * share


@dataclass(frozen=True)
class Step:
    """`start`, times `factor` after every `every` rounds, not below a floor."""

    start: float = 1.0
    factor: float = 0.5
    every: int = 30
    floor: float = 0.05

    def __post_init__(self) -> None:
        _check(self.start, self.floor, self.every)
        if not 0 < self.factor <= 1:
            raise UsageError(f"Expected a factor above 0 and up to 1, got {self.factor}.")

    def fraction(self, round: int) -> float:
        return max(self.floor, self.start * self.factor ** (round // self.every))


@dataclass(frozen=True)
class Static:
    """The same fraction in every round."""

    start: float = 0.1

    def __post_init__(self) -> None:
        _check(self.start)

    def fraction(self, round: int) -> float:
        return self.start


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Draws a round's clients.

    Attributes:
        schedule: gives the fraction.
        seed: of whoever is drawn.
        least: clients to draw at least, if there are so many.
    """

    schedule: Schedule
    seed: int = 0
    least: int = 2

    def __post_init__(self) -> None:
        if self.least < 1:
            raise UsageError(f"Expected at least one client a round, got {self.least}.")

    def count(self, round: int, clients: int) -> int:
        """Return how many of so many clients take part."""
        return min(clients, max(self.least, round_half_up(self.schedule.fraction(round) * clients)))

    def sample(self, round: int, clients: Collection[str]) -> tuple[str, ...]:
        """Return the names of the clients that take part in a round, sorted.

        Args:
            round: counted from 0.
            clients: stable names, each once.

        Raises:
            UsageError: a negative round, or a name that comes twice.
        """
        names = sorted(set(clients))
        if round < 0 or len(names) != len(clients):
            raise UsageError("Expected a round from 0 and each client's name once.")
        return tuple(sorted(self._draw(round, names)))

    def chances(self, round: int, clients: Collection[str]) -> dict[str, float]:
        """Return with which probability each client is drawn in a round; nothing if all are as likely.

        Whoever averages over the clients that were drawn divides their weights by it: large clients that are drawn
        more often must not count for more each time, too.
        """
        return {}

    @abstractmethod
    def _draw(self, round: int, names: list[str]) -> list[str]:
        """Return the chosen names."""


class Uniform(Sampler):
    """Every client is as likely as any other, without replacement."""

    def _draw(self, round: int, names: list[str]) -> list[str]:
        return self._order("uniform", round, names)[: self.count(round, len(names))]

    def _order(self, purpose: str, number: int, names: list[str]) -> list[str]:
        """Return the names in a random order; who joins or leaves does not change the others' order."""
        return sorted(names, key=lambda name: derive(self.seed, purpose, number, name))


class Cyclic(Uniform):
    """Everybody takes a turn before anybody takes another; each sweep has its own order.

    So nobody is absent for longer than two sweeps, which bounds the age of what error feedback holds.
    """

    def _draw(self, round: int, names: list[str]) -> list[str]:
        waiting: list[str] = []
        chosen: list[str] = []
        sweep = 0
        for number in range(round + 1):
            count = self.count(number, len(names))
            chosen, waiting = waiting[:count], waiting[count:]
            if len(chosen) < count:
                fresh = self._order("cyclic", sweep, names)
                sweep += 1
                late = [name for name in fresh if name not in chosen]
                early = [name for name in fresh if name in chosen]  # they had a turn in this very round
                missing = count - len(chosen)
                chosen, waiting = chosen + late[:missing], late[missing:] + early
        return chosen


@dataclass(frozen=True, kw_only=True)
class Weighted(Sampler):
    """Clients are drawn in exact proportion to their weights, without replacement.

    Names in a random order lie side by side on a line, each as long as its chance; a comb with one tooth a unit falls
    onto it, and who is under a tooth is drawn (randomised systematic sampling: Goodman and Kish, 1950). Whose
    share of the draw is more than a whole one always takes part, and the others share the rest.

    Attributes:
        weights: of the clients, above 0; for example their numbers of images.
    """

    weights: Mapping[str, float]

    def chances(self, round: int, clients: Collection[str]) -> dict[str, float]:
        """Return with which probability each client is drawn in a round.

        Raises:
            UsageError: a client has no weight, or none above 0.
        """
        names = sorted(clients)
        missing = [name for name in names if not 0 < self.weights.get(name, 0) < math.inf]
        if missing:
            raise UsageError(
                f"Expected a weight above 0 for every client, not so for {', '.join(missing[:5])}."
            )
        count = self.count(round, len(names))
        sure: set[str] = set()
        while True:
            total = math.fsum(self.weights[name] for name in names if name not in sure)
            left = count - len(sure)
            more = {name for name in names if name not in sure and left * self.weights[name] >= total}
            if not more:
                return {name: 1.0 if name in sure else left * self.weights[name] / total for name in names}
            sure |= more

    def _draw(self, round: int, names: list[str]) -> list[str]:
        chances = self.chances(round, names)
        chosen = [name for name in names if chances[name] == 1]
        others = [name for name in names if chances[name] < 1]
        others.sort(key=lambda name: derive(self.seed, "weighted", round, name))
        left = self.count(round, len(names)) - len(chosen)
        tooth = (derive(self.seed, "weighted", round) + 1) / 2**63  # the first: above 0 and up to 1
        ends = list(accumulate((chances[name] for name in others), initial=0.0))
        if others:
            ends[-1] = float(left)  # but for rounding it is
        teeth = [math.floor(end - tooth) for end in ends]
        return chosen + [
            name for name, (before, after) in zip(others, pairwise(teeth), strict=True) if after > before
        ]


def round_half_up(value: float) -> int:
    """Return the nearest whole number; Python's round would take 0.5 to 0 and 1.5 to 2."""
    return math.floor(value + 0.5)


def _check(start: float, end: float = 0.0, rounds: int = 1) -> None:
    if not (0 < start <= 1 and 0 <= end <= 1 and rounds >= 1):
        raise UsageError(
            f"Expected fractions up to 1 and at least one round, got {start}, {end} and {rounds}."
        )
