"""How the values that are sent are distributed: the tail beyond the threshold of selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from privet.federation.schema import Schema, Values
from privet.federation.state import Index

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Law:
    """The magnitudes that a message tells of the tensor that most of them are of, before they become levels.

    Beyond a high threshold τ magnitudes follow a generalised Pareto law (Pickands 1975); its tail index ξ comes
    of the exceedances' coefficient of variation c by moments, ξ = (1 − 1/c²) / 2: 0 for an exponential tail,
    above 0 for a heavier one. As c exists for ξ < 1/2 only, heavier tails are told as nearly 1/2.

    Attributes:
        kept: how many of its values were sent.
        threshold: τ, the smallest of their magnitudes.
        mean: of the magnitudes.
        tail: ξ; 0 where all are equal.
    """

    kept: int
    threshold: float
    mean: float
    tail: float

    @classmethod
    def told(cls, values: Mapping[str, object]) -> Self | None:
        """Return the law that a stranger tells, or None if float32 magnitudes cannot have such a one."""
        match values:
            case {"kept": int(kept), "threshold": float(threshold), "mean": float(mean), "tail": float(tail)}:
                # The tail is lowest where all but one of the magnitudes are equal: 1 - kept / 2.
                sound = 0 <= threshold <= LARGEST and 0 <= mean <= LARGEST and -kept <= tail <= 0.5
                if sound and len(values) == 4 and 1 <= kept < 2**63:
                    return cls(kept=kept, threshold=threshold, mean=mean, tail=tail)
        return None


def law(index: Index, values: Values, schema: Schema) -> Law:
    """Return the law of the values that a message tells at these positions; there is at least one."""
    ends = np.searchsorted(index, schema.offsets)
    most = int(np.diff(ends).argmax())
    magnitudes = np.abs(values[ends[most] : ends[most + 1]]).astype(np.float64)
    threshold = float(magnitudes.min())
    beyond = magnitudes - threshold
    spread = float(beyond.std())
    return Law(
        kept=len(magnitudes),
        threshold=threshold,
        mean=float(magnitudes.mean()),
        tail=0.5 * (1 - (float(beyond.mean()) / spread) ** 2) if spread else 0.0,
    )
