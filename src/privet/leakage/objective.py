"""How far a gradient is from what was sent, given what was done to it: the one place that knows.

Whatever happened to a value before it was sent, what is left says that the true one lay in an interval:
a point if it was sent as it was, one rounding step if it was rounded, up to the smallest value that was
sent if it was dropped, half of all numbers if only its sign was sent. An aware attack measures its
distance to those intervals; a naive one takes what arrived for the truth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from privet.learning.update import Treatment, Update

Tensors = dict[str, Tensor]

# A clipped gradient is never scaled to less than this share of what was sent: at zero it would have no slope.
SMALLEST_SCALE = 1e-3
HALVINGS = 16  # of the range in which the best scale lies; one step of Newton does the rest


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What the updates of several members say, in units of a gradient.

    Attributes:
        low: the least that each true value can have been, by name, (members, ...).
        high: the most; the same tensors as `low` if nothing but noise and clipping happened.
        clipped: (members,), whether all values were scaled down together by an unknown factor.
        laplace: (members,), whether distances are to be summed as they are, not squared.
        floor: (members,), the distance that noise is sure to leave between the truth and the intervals, on average.
        noise: (members,), the same as a sum of squares, after Laplace noise too.
        squares: (members,), the sum of squares of what was sent; 0 if that was signs, which have no size.
        energy: (members,), the distance of a gradient of zero.
        temperature: (members,), what minus the log-likelihood is to be multiplied with to give the distance.
        equations: (members,), how many values were sent.
        heard: by name, (members,), 1 for the tensors that distances are summed over, 0 for others.
    """

    low: Tensors
    high: Tensors
    clipped: Tensor
    laplace: Tensor
    floor: Tensor
    noise: Tensor
    squares: Tensor
    energy: Tensor
    temperature: Tensor
    equations: Tensor
    heard: Tensors

    @classmethod
    def of(
        cls,
        updates: Sequence[Update],
        *,
        aware: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        """Read the updates; if not `aware`, as if nothing had been done to them.

        How many values were sent is no matter of what the attack believes, and counted as it is.
        """
        read: list[tuple[Tensors, Treatment]] = []
        sent: list[int] = []
        for update in updates:
            values, treatment = update.as_gradient()
            values = {name: value.to(device, dtype) for name, value in values.items()}
            read.append((values, treatment if aware else Treatment()))
            sent.append(sum(_told(values, treatment).values()))
        intervals = [_intervals(*one) for one in read]
        low = _stack([least for least, _ in intervals])
        exact = all(least is most for least, most in intervals)
        scale = torch.tensor([treatment.noise_scale for _, treatment in read], device=device, dtype=dtype)
        laplace = torch.tensor([treatment.noise == "laplace" for _, treatment in read], device=device)

        def stacked(numbers: Sequence[float]) -> Tensor:
            return torch.tensor(numbers, device=device, dtype=dtype)

        evidence = cls(
            low=low,
            high=low if exact else _stack([most for _, most in intervals]),
            clipped=torch.tensor([scaled_down(*one) for one in read], device=device),
            laplace=laplace,
            floor=stacked([_left(*one, squared=one[1].noise != "laplace") for one in read]),
            noise=stacked([_left(*one, squared=True) for one in read]),
            squares=stacked([_squares(*one) for one in read]),
            energy=torch.ones_like(scale),
            temperature=torch.where(laplace, scale, 2 * scale.square()),
            equations=torch.tensor(sent, device=device),
            heard={name: torch.ones_like(scale) for name in low},
        )
        nothing = {name: torch.zeros_like(value) for name, value in low.items()}
        energy = evidence.distance(nothing)  # signs say nothing of size: zero fits them all
        return replace(evidence, energy=torch.where(energy > 0, energy, 1.0))

    def subset(self, kept: Tensor) -> Evidence:
        """Return the evidence of these members."""
        low = {name: value[kept] for name, value in self.low.items()}
        exact = self.high is self.low
        return Evidence(
            low=low,
            high=low if exact else {name: value[kept] for name, value in self.high.items()},
            clipped=self.clipped[kept],
            laplace=self.laplace[kept],
            floor=self.floor[kept],
            noise=self.noise[kept],
            squares=self.squares[kept],
            energy=self.energy[kept],
            temperature=self.temperature[kept],
            equations=self.equations[kept],
            heard={name: value[kept] for name, value in self.heard.items()},
        )

    @property
    def variance(self) -> Tensor:
        """The variance of the noise on each value, (members,)."""
        return torch.where(self.laplace, 2 * self.temperature.square(), self.temperature / 2)

    def distance(self, gradient: Tensors) -> Tensor:
        """Return the sum of the distances of all tensors that are heard, (members,).

        Args:
            gradient: by name, (members, ...).
        """
        found = self.distances(gradient)
        return sum((self.heard[name] * value for name, value in found.items()), torch.zeros_like(self.floor))

    def distances(self, gradient: Tensors) -> Tensors:
        """Return each tensor's sum of squares (after Laplace noise: the sum) of what lies outside the intervals."""
        found = {}
        for name, value in self._scaled(gradient).items():
            rest = value - self._nearest(name, value)
            found[name] = rest.square().flatten(1).sum(1)
            if bool(self.laplace.any()):
                found[name] = torch.where(self.laplace, rest.abs().flatten(1).sum(1), found[name])
        return found

    def cosine(self, gradient: Tensors) -> Tensor:
        """Return 1 minus the cosine of the angle to the nearest gradient inside the intervals, 1 if either is zero.

        Half the squared distance of the two directions, which says the same and is exact for small
        angles: where one layer outweighs all others, 1 minus a cosine in single precision is 0 at once.
        """
        scaled = self._scaled(gradient)
        pairs = [(value.flatten(1), self._nearest(name, value).flatten(1)) for name, value in scaled.items()]
        lengths = [
            sum((each.square().sum(1) for each in one), torch.zeros_like(self.floor))
            for one in zip(*pairs, strict=True)
        ]
        one, other = (length.clamp_min(torch.finfo(length.dtype).tiny).sqrt()[:, None] for length in lengths)
        apart = sum(
            ((value / one - nearest / other).square().sum(1) for value, nearest in pairs),
            torch.zeros_like(self.floor),
        )
        return torch.where((lengths[0] == 0) | (lengths[1] == 0), 1.0, apart / 2)

    def _nearest(self, name: str, value: Tensor) -> Tensor:
        """Return what the intervals hold that is nearest to `value`."""
        if self.high is self.low:
            return self.low[name]
        return torch.clamp(value, self.low[name], self.high[name])

    def _scaled(self, gradient: Tensors) -> Tensors:
        """Scale the gradients of clipped members to fit best: nobody knows by how much they were clipped."""
        if not bool(self.clipped.any()):
            return gradient
        factor = torch.where(self.clipped, self._scale(gradient), 1.0)
        return {name: _times(value, factor) for name, value in gradient.items()}

    def _scale(self, gradient: Tensors) -> Tensor:
        """Return the factor up to 1 that brings each gradient v nearest to the intervals, (members,).

        The squared distance of f v is convex in f: the root of its slope, the sum of v (f v - nearest(f v)), is
        bracketed by halvings. Then it is known which values lie outside their intervals, and the slope is linear: its
        root is the factor, with its own slope in v. Where all intervals are points that holds from the start.
        """
        fixed = {name: value.detach() for name, value in gradient.items()}
        length = self._total({name: value.square() for name, value in gradient.items()})
        length = length.clamp_min(torch.finfo(length.dtype).tiny)
        farthest = {name: torch.maximum(-low, self.high[name]) for name, low in self.low.items()}
        reach = self._total({name: value.square() for name, value in farthest.items()})
        # No better factor is larger, by Cauchy and Schwarz.
        most = (reach / length.detach()).sqrt().clamp_max(1.0)
        least = torch.minimum(SMALLEST_SCALE * self.squares.sqrt() / length.sqrt(), most)
        low, high = least.detach(), most
        for _ in range(0 if self.high is self.low else HALVINGS):
            middle = (low + high) / 2
            slope = torch.zeros_like(length)
            for name, value in fixed.items():
                scaled = _times(value, middle)
                slope += (value * (scaled - self._nearest(name, scaled))).flatten(1).sum(1)
            low, high = torch.where(slope > 0, low, middle), torch.where(slope > 0, middle, high)
        middle = (low + high) / 2
        product, square = (torch.zeros_like(length) for _ in range(2))
        for name, value in gradient.items():
            scaled = _times(fixed[name], middle)
            inside = (self.low[name] < scaled) & (scaled < self.high[name])
            outside = torch.where(inside, 0.0, value)
            product = product + (outside * self._nearest(name, scaled)).flatten(1).sum(1)
            square = square + outside.square().flatten(1).sum(1)
        points = self._total({name: self.high[name] - one for name, one in self.low.items()}) == 0
        root = product / square.clamp_min(torch.finfo(square.dtype).tiny)
        found = torch.minimum(root, torch.where(points, most, high))
        found = torch.where(points | (found > low), found, low)
        return torch.where(square > 0, torch.where(found > least, found, least), middle)

    def _total(self, values: Tensors) -> Tensor:
        """Return the sum over all values of each member, (members,)."""
        return sum((value.flatten(1).sum(1) for value in values.values()), torch.zeros_like(self.floor))


def _times(value: Tensor, factor: Tensor) -> Tensor:
    """Multiply each member, (members, ...), with its own factor, (members,)."""
    return value * factor.view(-1, *[1] * (value.ndim - 1))


def _stack(members: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([one[name] for one in members]) for name in members[0]}


def _intervals(values: Tensors, treatment: Treatment) -> tuple[Tensors, Tensors]:
    """Return the least and the most that each value can have been before it was rounded or dropped."""
    if not (treatment.sparse or treatment.sign or treatment.steps):
        return values, values
    halves = _halves(values, treatment)
    sizes = [
        float(value[value != 0].abs().min()) + halves[name]
        for name, value in values.items()
        if bool((value != 0).any())
    ]
    smallest = min(sizes, default=torch.inf)  # of what was kept, before rounding: nothing dropped is larger
    low, high = {}, {}
    for name, value in values.items():
        if treatment.sign:
            low[name] = torch.where(value > 0, 0.0, -torch.inf)
            high[name] = torch.where(value < 0, 0.0, torch.inf)
            continue
        low[name], high[name] = value - halves[name], value + halves[name]
        if treatment.sparse:
            dropped = value == 0
            bound = max(smallest, halves[name])
            low[name] = torch.where(dropped, -bound, low[name])
            high[name] = torch.where(dropped, bound, high[name])
    return low, high


def _halves(values: Mapping[str, Tensor], treatment: Treatment) -> dict[str, float]:
    """Return by how much rounding can have changed the values of each tensor."""
    share = 1.0 if treatment.stochastic else 0.5
    return {name: treatment.steps.get(name, 0.0) * share for name in values}


def _told(values: Tensors, treatment: Treatment) -> dict[str, int]:
    """Count the values that were sent of each tensor."""
    return {
        name: int(value.count_nonzero()) if treatment.sparse else value.numel()
        for name, value in values.items()
    }


def _squares(values: Tensors, treatment: Treatment) -> float:
    if treatment.sign:
        return 0.0
    return sum(float(value.double().square().sum()) for value in values.values())


def _left(values: Tensors, treatment: Treatment, *, squared: bool) -> float:
    """Return what noise leaves outside the intervals, on average: the sum of squares, or of sizes.

    Rounding absorbs noise, and signs nearly all of it. What arrived is within half a step h of the truth with its noise
    n, and so is the end of the interval: the truth is at least |n| - 2 h outside, whatever it is. Only that is counted:
    more could be more than the truth's own distance, where a search would stop too early.
    """
    scale = treatment.noise_scale
    if treatment.noise is None or treatment.sign:
        return 0.0
    halves, total = _halves(values, treatment), 0.0
    for name, count in _told(values, treatment).items():
        width = 2 * halves[name] / scale
        if treatment.noise == "laplace":  # the mean of (|n| - w)+, and of its square, for scale 1
            share = (2.0 if squared else 1.0) * math.exp(-width)
        else:
            tail, density = (
                math.erfc(width / math.sqrt(2)),
                math.sqrt(2 / math.pi) * math.exp(-width * width / 2),
            )
            share = max(0.0, (1 + width * width) * tail - width * density)
        total += count * share
    return total * (scale * scale if squared else scale)


def scaled_down(values: Mapping[str, Tensor], treatment: Treatment) -> bool:
    """Say whether clipping may show: noise hides the norm, the other steps change it, and signs have no size."""
    if treatment.clip is None or treatment.sign:
        return False
    if treatment.noise or treatment.sparse or treatment.steps:
        return True
    norm = torch.stack([value.square().sum() for value in values.values()]).sum().sqrt()
    return float(norm) > treatment.clip * (1 - 1e-3)
