"""How far an image may be changed, in which norm, and integers that keep to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from privet.errors import UsageError
from privet.images.similarity import Similarity

NORMS = ("linf", "l2", "l0", "none")
Size = tuple[int, int]

# L2 budgets are stated at this side. Larger images get proportionally more: the same for each pixel.
SIDE = 32
BISECTIONS = 8  # of the range that rounding makes: what is left of it is a fraction of one unit


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How far a perturbation may go.

    Attributes:
        norm: "linf" (the largest change of a channel), "l2" (Euclidean length), "l0" (pixels that
            change) or "none" (no bound).
        amount: linf: in 1/255. l2: of images with values in [0, 1] and 32 x 32 pixels; one of n pixels
            may change by sqrt(n / 1024) times as much. l0: pixels, at the size that networks see. none:
            infinite.
    """

    norm: str
    amount: float = math.inf

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UsageError(f"Unknown norm {self.norm!r}; expected one of {', '.join(NORMS)}.")
        if self.norm in ("linf", "l0") and not (
            math.isfinite(self.amount)
            and self.amount == int(self.amount)
            and 1 <= self.amount <= (127 if self.norm == "linf" else math.inf)
        ):
            raise UsageError(
                f"Expected epsilon as a whole number from 1 to 127 (in 1/255), got {self.amount}."
                if self.norm == "linf"
                else f"Expected a whole number of pixels, at least 1, got {self.amount}."
            )
        if not self.amount > 0:
            raise UsageError(f"Expected a positive budget, got {self.amount}.")

    def allowed(self, size: Size, *, seen: Size) -> float:
        """Return the bound for an image of this size whose perturbation was found at the size `seen`."""
        if self.norm == "l2":
            return self.amount * math.sqrt(size[0] * size[1]) / SIDE
        if self.norm == "l0":
            return self.amount * math.ceil(size[0] / seen[0]) * math.ceil(size[1] / seen[1])
        return self.amount

    def json(self) -> dict[str, Any]:
        """Return the budget as JSON values; an infinite amount is left out."""
        return {"norm": self.norm} | ({"amount": self.amount} if math.isfinite(self.amount) else {})

    def fit(self, delta: Tensor) -> Tensor:
        """Round perturbations, (batch, channels, height, width) in 1/255, to integers within the budget.

        "linf" clips; "l2" shrinks each image no more than its integers need; "l0" and "none" round only.
        """
        if self.norm == "linf":
            return delta.round().clamp_(-self.amount, self.amount)
        if self.norm != "l2":
            return delta.round()
        size = (delta.shape[2], delta.shape[3])
        bound = 255 * self.allowed(size, seen=size)
        length = _length(delta).clamp(min=1e-9)
        # Rounding moves n values by at most sqrt(n) / 2: `low` always fits, and lengths grow with the factor.
        high = (bound / length).clamp(max=1).to(delta.dtype)
        low = ((bound - math.sqrt(delta[0].numel()) / 2) / length).clamp(min=0, max=1).to(delta.dtype)
        low = torch.where(_length((delta * high).round_()) <= bound, high, low)
        if bool((low < high).any()):
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                fits = _length((delta * middle).round_()) <= bound
                low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return (delta * low).round_()

    def enlarge(self, delta: Tensor, size: Size) -> Tensor:
        """Return a perturbation, (3, height, width), at another size, as integers within the budget.

        Linear interpolation never exceeds the values it lies between, and is shortened where that is
        not enough. Pixels of an "l0" budget become blocks, or stay pixels at a smaller size: none is lost unless
        two of them fall on one.
        """
        if (delta.shape[1], delta.shape[2]) == size:
            return delta
        if self.norm == "l0":
            return _nearest(_nearest(delta, size[0], 1), size[1], 2)
        larger = F.interpolate(delta[None].float(), size=size, mode="bilinear", align_corners=False)
        return self.fit(larger)[0].to(delta.dtype)

    def excess(self, change: Similarity, size: Size, *, seen: Size) -> str | None:
        """Say by how much a measured change exceeds the budget, or None if it does not."""
        allowed = self.allowed(size, seen=seen)
        slack = 1 + 1e-9  # two ways of adding up the same squares
        if self.norm == "linf" and change.linf > allowed:
            return f"{change.linf}/255; the budget is {allowed:g}/255"
        if self.norm == "l2" and change.l2 > allowed * slack:
            return f"an L2 norm of {change.l2:.4f}; the budget is {allowed:.4f}"
        if self.norm == "l0" and change.l0 > allowed:
            return f"{change.l0} pixels; the budget is {allowed:g}"
        return None


UNBOUNDED = Budget(norm="none")


def _nearest(delta: Tensor, side: int, dimension: int) -> Tensor:
    """Return sparse perturbations, (3, height, width), with `side` rows (dimension 1) or columns (2)."""
    count = delta.shape[dimension]
    if side >= count:
        return delta.index_select(dimension, torch.arange(side) * count // side)
    shape = list(delta.shape)
    shape[dimension] = side
    smaller = delta.new_zeros(shape)
    for line in range(count):
        one, place = delta.select(dimension, line), smaller.select(dimension, line * side // count)
        place.copy_(torch.where(one.any(0), one, place))
    return smaller


def of_length(delta: Tensor, length: float) -> Tensor:
    """Return each perturbation, (batch, channels, height, width), scaled to an L2 norm."""
    return delta * (length / _length(delta).clamp(min=1e-9)).to(delta.dtype)


def _length(delta: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1, dtype=torch.float64)
    return lengths[:, None, None, None]
