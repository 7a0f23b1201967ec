"""From finished cells to figures: mean, spread, and how much a learner still learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from privet.audit.store import DATA, Cell, Plan
from privet.images import ImageSet


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Figures of repeated runs, as shares of 1.

    Attributes:
        values: one for each seed.
        sd: sample standard deviation; None for a single run.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def sd(self) -> float | None:
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    @property
    def high(self) -> float:
        return max(self.values)

    def json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {"mean": self.mean, "sd": self.sd, "values": list(self.values)}


@dataclass(frozen=True, kw_only=True)
class Row:
    """All seeds of one data set, recovery and architecture."""

    data: str
    recovery: str
    architecture: str
    last: Spread
    best: Spread
    best_epochs: tuple[int, ...]


def rows(plan: Plan, results: Mapping[Cell, dict[str, Any]]) -> list[Row]:
    """Group finished cells by everything but the seed, in the plan's order."""
    found = []
    for recovery in plan.recoveries:
        for data in DATA:
            for architecture in plan.architectures:
                cells = [
                    results[Cell(data=data, recovery=recovery, architecture=architecture, seed=seed)]
                    for seed in plan.seeds
                ]
                found.append(
                    Row(
                        data=data,
                        recovery=recovery,
                        architecture=architecture,
                        last=Spread(values=tuple(cell["last"] for cell in cells)),
                        best=Spread(values=tuple(cell["best"] for cell in cells)),
                        best_epochs=tuple(cell["best_epoch"] for cell in cells),
                    )
                )
    return found


def select(
    table: Iterable[Row], *, data: str, recovery: str | None = None, architecture: str | None = None
) -> list[Row]:
    """Return the rows that match."""
    return [
        row
        for row in table
        if row.data == data and recovery in (None, row.recovery) and architecture in (None, row.architecture)
    ]


def chance(test: ImageSet) -> float:
    """Return the accuracy of always naming the commonest class."""
    return float(test.labels.bincount().max()) / len(test)


def kept(protected: float, clean: float, chance: float) -> float:
    """Return what a learner still learned, as a share of what it learns from clean images.

    0 is chance and 1 is as much as from clean images; clean images that teach nothing give 1, for
    then nothing was taken away.
    """
    if clean <= chance:
        return 1.0
    return min(1.0, max(0.0, (protected - chance) / (clean - chance)))


def recovered(accuracy: float, protected: float, clean: float, *, uncertainty: float) -> float | None:
    """Return which share of what a protection took away a recovery brings back.

    0 is nothing and 1 all; below 0 the recovery does harm. None where the protection took away no more
    than the uncertainty of an accuracy: a share of that would be chance.
    """
    return (accuracy - protected) / (clean - protected) if clean - protected > uncertainty else None
