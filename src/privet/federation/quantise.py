"""Levels for magnitudes: where one ends and the next begins. What a level is worth is the mean of what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privet.errors import UsageError
from privet.federation.schema import Values

Levels = NDArray[np.uint8]
Borders = NDArray[np.float32]

MOST_LEVELS = 64
SMALLEST = np.finfo(np.float16).smallest_subnormal
LARGEST = np.nextafter(np.float16(2), np.float16(0))


class Quantiser(Protocol):
    """Anything that cuts magnitudes into levels."""

    def borders(self, magnitudes: Values) -> Borders:
        """Return at most 63 ascending borders; a magnitude's level is the number of borders below it."""


@dataclass(frozen=True)
class MeanSplit:
    """A hierarchy of upper and lower halves: each set is cut at its mean, `depth` times over.

    Depth 0 is the one magnitude of sparse ternary compression (Sattler et al., arXiv 1903.02891). The
    name "deep hierarchy quantization" is that of arXiv 2212.14760, whose level rule is not published
    in its abstract: this rule is a reconstruction. It needs no sorting, and for exponential tails a cut
    at the mean takes 58 % of a set's variance.
    """

    depth: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.depth <= 6:
            raise UsageError(f"Expected a depth from 0 to 6, got {self.depth}.")

    def borders(self, magnitudes: Values) -> Borders:
        found: Borders = np.zeros(0, np.float32)
        for _ in range(self.depth):
            means = _means(magnitudes, found)
            found = np.unique(np.concatenate((found, means[np.isfinite(means)])))
        return found


@dataclass(frozen=True)
class Lloyd:
    """The levels of least squared error (Lloyd, 1982), found from the mean-split hierarchy's."""

    depth: int = 2
    steps: int = 20

    def __post_init__(self) -> None:
        if not (0 <= self.depth <= 6 and self.steps >= 1):
            raise UsageError(
                f"Expected a depth from 0 to 6 and at least 1 step, got {self.depth} and {self.steps}."
            )

    def borders(self, magnitudes: Values) -> Borders:
        found = MeanSplit(self.depth).borders(magnitudes)
        for _ in range(self.steps):
            means = _means(magnitudes, found)
            means = means[np.isfinite(means)]
            moved = np.unique((means[1:] + means[:-1]) / np.float32(2))
            if np.array_equal(moved, found):
                break
            found = moved
        return found


@dataclass(frozen=True)
class DeadZone:
    """Uniform levels beyond the dead zone that selection left: entropy-coded scalar quantisation (ECSQ).

    Attributes:
        zone: half the dead zone's width in steps; the smallest kept magnitude over this is the step.
    """

    zone: float = 0.6

    def __post_init__(self) -> None:
        if not 0.05 <= self.zone <= 20:
            raise UsageError(f"Expected a dead zone of 0.05 to 20 steps, got {self.zone}.")

    def borders(self, magnitudes: Values) -> Borders:
        least, most = float(magnitudes.min()), float(magnitudes.max())
        step = max(least / self.zone, float(np.finfo(np.float32).tiny))
        count = min(MOST_LEVELS - 1, int((most - least) / step))
        return np.unique((least + step * np.arange(1, count + 1)).astype(np.float32))


def level_of(magnitudes: Values, borders: Borders) -> Levels:
    """Return the number of borders below each magnitude."""
    if len(borders) > 8:
        return np.searchsorted(borders, magnitudes).astype(np.uint8)
    levels = np.zeros(len(magnitudes), np.uint8)
    for border in borders:
        levels += magnitudes > border
    return levels


def _means(magnitudes: Values, borders: Borders) -> Borders:
    """Return the mean of each level, NaN for an empty one."""
    levels = level_of(magnitudes, borders)
    counts = np.bincount(levels, minlength=len(borders) + 1)
    sums = np.bincount(levels, magnitudes, minlength=len(borders) + 1)
    with np.errstate(invalid="ignore"):
        return (sums / counts).astype(np.float32)


def fit(quantiser: Quantiser, magnitudes: Values) -> tuple[Levels, Values, int]:
    """Return each magnitude's level, what the levels are worth, and a power of two to multiply that with.

    The values are float16 numbers, ascending and above 0, in float32; the largest is in [1, 2).
    """
    levels = level_of(magnitudes, quantiser.borders(magnitudes))
    sums, counts = np.bincount(levels, magnitudes), np.bincount(levels)
    used = np.flatnonzero(counts)
    means = sums[used] / counts[used]
    exponent = exponent_of(float(means.max()))
    rounded = np.clip(np.ldexp(means, -exponent).astype(np.float16), SMALLEST, LARGEST)
    values, merged = np.unique(rounded, return_inverse=True)
    place = np.zeros(len(counts), np.uint8)
    place[used] = merged
    return place[levels], values.astype(np.float32), exponent


def exponent_of(largest: float) -> int:
    """Return the power of two, one that float32 has, that scales a number above 0 to [1, 2)."""
    return max(-149, min(127, int(np.frexp(largest)[1]) - 1))
