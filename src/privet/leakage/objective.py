"""How far a gradient is from what was sent, given what was done to it: the one place that knows.

Whatever happened to a value before it was sent, what is left says that the true one lay in an interval:
a point if it was sent as it was, one rounding step if it was rounded, up to the smallest value that was
sent if it was dropped, half of all numbers if only its sign was sent. An aware attack measures its
distance to those intervals; a naive one takes what arrived for the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from privet.learning.update import Treatment, Update

Tensors = dict[str, Tensor]

SMALLEST_SCALE = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What the updates of several members say, in units of a gradient.

    Attributes:
        low: the least that each true value can have been, by name, (members, ...).
        high: the most; the same tensors as `low` if nothing but noise and clipping happened.
        clipped: (members,), whether all values were scaled down together by an unknown factor.
        laplace: (members,), whether distances are to be summed as they are, not squared.
        floor: (members,), the distance that noise alone leaves between the truth and what was sent.
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
        """Read the updates; if not `aware`, as if nothing had been done to them."""
        read: list[tuple[Tensors, Treatment]] = []
        for update in updates:
            values, treatment = update.as_gradient()
            values = {name: value.to(device, dtype) for name, value in values.items()}
            read.append((values, treatment if aware else Treatment()))
        intervals = [_intervals(*one) for one in read]
        low = _stack([least for least, _ in intervals])
        exact = all(least is most for least, most in intervals)
        scale = torch.tensor([treatment.noise_scale for _, treatment in read], device=device, dtype=dtype)
        laplace = torch.tensor([treatment.noise == "laplace" for _, treatment in read], device=device)
        told = torch.tensor([_told(*one) for one in read], device=device)
        evidence = cls(
            low=low,
            high=low if exact else _stack([most for _, most in intervals]),
            clipped=torch.tensor([_scaled_down(*one) for one in read], device=device),
            laplace=laplace,
            floor=torch.where(laplace, scale, scale.square()) * told,
            energy=torch.ones_like(scale),
            temperature=torch.where(laplace, scale, 2 * scale.square()),
            equations=told,
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
            energy=self.energy[kept],
            temperature=self.temperature[kept],
            equations=self.equations[kept],
            heard={name: value[kept] for name, value in self.heard.items()},
        )

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
        product, length = (torch.zeros_like(self.floor) for _ in range(2))
        for name, value in gradient.items():
            fixed = value.detach()
            product += (fixed * self._nearest(name, fixed)).flatten(1).sum(1)
            length += fixed.square().flatten(1).sum(1)
        best = (product / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp(SMALLEST_SCALE, 1.0)
        factor = torch.where(self.clipped, best, 1.0)
        return {name: value * factor.view(-1, *[1] * (value.ndim - 1)) for name, value in gradient.items()}


def _stack(members: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([one[name] for one in members]) for name in members[0]}


def _intervals(values: Tensors, treatment: Treatment) -> tuple[Tensors, Tensors]:
    """Return the least and the most that each value can have been before it was rounded or dropped."""
    if not (treatment.sparse or treatment.sign or treatment.steps):
        return values, values
    halves = {
        name: treatment.steps.get(name, 0.0) * (1.0 if treatment.stochastic else 0.5) for name in values
    }
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


def _told(values: Tensors, treatment: Treatment) -> int:
    """Count the values that were sent."""
    return sum(int(v.count_nonzero()) if treatment.sparse else v.numel() for v in values.values())


def _scaled_down(values: Tensors, treatment: Treatment) -> bool:
    """Say whether clipping may have taken place: noise hides the norm, and the other steps change it."""
    if treatment.clip is None:
        return False
    if treatment.noise or treatment.sparse or treatment.steps or treatment.sign:
        return True
    norm = torch.stack([value.square().sum() for value in values.values()]).sum().sqrt()
    return float(norm) > treatment.clip * (1 - 1e-3)
