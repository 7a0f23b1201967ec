"""The task that an inversion solves, for many attacks side by side, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from privet.leakage.client import Client
from privet.leakage.objective import Evidence, Tensors
from privet.learning.update import Update
from privet.seeds import generator

CONVERGED = {torch.float32: 1e-11, torch.float64: 1e-22}  # relative distances that rounding leaves
POINTS = 50  # of a history
GUESSES, COARSE = 4, (4, 4)  # random images that distances are compared with, and the grid they are drawn on
ROUNDINGS = 1e4  # a tensor that random images change by less than so many roundings is not heard
HUGE = 1e30  # stands for infinity in a history
# What a member's end begins with if it came to numbers that are not finite.
FAILED = "failed: "


Ends = dict[int, tuple[int, str]]
"""Of members that are done, the step and why."""
History = list[tuple[int, list[float]]]
"""Steps, and every member's distance then."""


def search_record(step: int, ends: Ends, history: History) -> dict[str, Any]:
    """Return how far a search is, as JSON values."""
    return {"step": step, "ends": [(row, *end) for row, end in ends.items()], "history": history}


def read_search(record: Mapping[str, Any]) -> tuple[int, Ends, History]:
    """Return what `search_record` was given."""
    ends = {row: (step, why) for row, step, why in record["ends"]}
    return record["step"], ends, [(step, row) for step, row in record["history"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What several members (victims times restarts) try to solve side by side.

    Attributes:
        client: their simulation of the client.
        evidence: what was sent.
        unit: the distance that random images leave, on average: 1 of a relative distance, (members,).
        known: the labels, (members, images), or None if they are to be found.
        bias: of the last layer, as it was sent, (members, classes), if the labels were counted by it and may be again.
        victims: whose restart each member is, (members,).
        starts: each member's number of restart, from which it draws its random numbers.
        seed: of those.
        moments: what batch norm saw in the client's step, by its name, (members, 2, channels), if that was sent.
    """

    client: Client
    evidence: Evidence
    unit: Tensor
    known: Tensor | None
    bias: Tensor | None
    victims: Tensor
    starts: tuple[int, ...]
    seed: int
    moments: Tensors = field(default_factory=dict)

    @property
    def update(self) -> Update:
        """One of the members' records, for what they have in common."""
        return self.client.update

    @property
    def colours(self) -> int:
        """Channels of the images to be found."""
        return 1 if self.update.grey else self.update.channels

    @property
    def targets(self) -> Tensor | None:
        """Probabilities of the known labels, (members, images, classes)."""
        if self.known is None:
            return None
        return F.one_hot(self.known, self.update.classes).to(self.evidence.floor.dtype)

    def draw(self, purpose: str, *shape: int, uniform: bool = False) -> Tensor:
        """Return random numbers for each member, (members, *shape): the same for every victim."""
        make = torch.rand if uniform else torch.randn
        drawn = [make(*shape, generator=generator(self.seed, purpose, start)) for start in self.starts]
        return torch.stack(drawn).to(self.evidence.floor)

    def subset(self, kept: Tensor) -> Problem:
        """Return the problem of these members, by position."""
        return Problem(
            client=self.client.subset(kept),
            evidence=self.evidence.subset(kept),
            unit=self.unit[kept],
            known=None if self.known is None else self.known[kept],
            bias=None if self.bias is None else self.bias[kept],
            victims=self.victims[kept],
            starts=tuple(self.starts[i] for i in kept.tolist()),
            seed=self.seed,
            moments={name: value[kept] for name, value in self.moments.items()},
        )


@torch.no_grad()
def calibrated(problem: Problem, *, selective: bool) -> Problem:
    """Return the problem with distances in units of what random images leave, over tensors that tell images apart.

    What random images leave is what there is to gain. The size of the gradient is not: nearly all of a deep network's
    may lie in tensors that hardly depend on the image, such as a last layer behind saturated units. Rounding changes
    them more than images do, and drowns what the others tell; such tensors are not heard if it is to be `selective`.
    """
    evidence = problem.evidence
    left = dict.fromkeys(evidence.low, torch.zeros_like(evidence.floor))
    for number in range(GUESSES):
        x, y = guess(problem, number)
        for name, distance in evidence.distances(problem.client.gradient(x, y)).items():
            left[name] = left[name] + distance / GUESSES
    size = evidence.distances({name: torch.zeros_like(value) for name, value in evidence.low.items()})
    least = (ROUNDINGS * torch.finfo(evidence.floor.dtype).eps) ** 2
    always = (evidence.temperature > 0) | (not selective)  # added noise is more than rounding
    heard = {name: ((value >= least * size[name]) | always).to(value) for name, value in left.items()}
    unit = sum((heard[name] * left[name] for name in left), torch.zeros_like(evidence.floor))
    return replace(problem, evidence=replace(evidence, heard=heard), unit=torch.where(unit > 0, unit, 1.0))


def guess(problem: Problem, number: int) -> tuple[Tensor, Tensor]:
    """Return random images, the same for all members, and the labels or what is to be expected of them."""
    update, count = problem.update, len(problem.starts)
    coarse = torch.rand(
        update.images, problem.colours, *COARSE, generator=generator(problem.seed, "guess", number)
    )
    x = F.interpolate(coarse, size=update.size, mode="bilinear").to(problem.evidence.floor)
    y = problem.targets
    if y is None:
        y = x.new_full((count, update.images, update.classes), 1 / update.classes)
    return x.expand(count, *x.shape), y


@dataclass(frozen=True, kw_only=True, eq=False)
class Solved:
    """What an inversion found for each member.

    Attributes:
        x: pixels, (members, images, colours, height, width).
        y: probabilities of the classes, (members, images, classes).
        steps: how many steps each took.
        ends: why each stopped: "steps", "noise floor", "converged", or "failed: " and a reason.
        history: the step and every member's distance, now and then.
    """

    x: Tensor
    y: Tensor
    steps: Sequence[int]
    ends: Sequence[str]
    history: Sequence[tuple[int, Sequence[float]]]

    @classmethod
    def after(cls, steps: int, *, x: Tensor, y: Tensor, ends: Ends, history: History) -> Self:
        """Return what a search of so many steps found; members without an end of their own took all of them."""
        rows = [ends.get(row, (steps, "steps")) for row in range(len(x))]
        return cls(x=x, y=y, steps=[step for step, _ in rows], ends=[why for _, why in rows], history=history)
