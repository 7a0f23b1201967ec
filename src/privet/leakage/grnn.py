"""GRNN: an untrained generator is fitted to a single gradient, and what it then draws is the image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from privet.errors import UsageError
from privet.leakage.descent import Descent
from privet.leakage.pixels import search_pixels
from privet.leakage.problem import FAILED, Problem, Solved
from privet.leakage.regularise import smoothness, squared_variation
from privet.learning.job import Job

NOISE = 128  # numbers that each image starts from
LARGEST_SIDE = 256
EPSILON = 1e-12
# The expected sum of an input's sizes: what a step of all the weights behind it adds up to.
REACH = NOISE * math.sqrt(2 / math.pi)


@dataclass(frozen=True, kw_only=True)
class GRNN(Descent):
    """Generative Regression Neural Network (Ren et al., arXiv 2105.00529), from the released code.

    A generator with fixed random inputs, one for each image of the batch, draws the images; a second
    branch, a softmax of a linear layer, gives their labels if nobody knows them. Its weights are fitted
    so that the client's gradient comes out: S, the squared distance to what was sent, plus the
    "Wasserstein" term, which is sqrt(S) as released, plus squared total variation.

    Deviations, which the preset "faithful" takes back:

    - S is relative to what random images leave of it, so settings mean the same for every network, and tensors
      that hardly depend on the image are left out (problem.py);
    - the generator has half the width: as good, and cheaper;
    - what the first layer makes of the inputs is fitted itself, not that layer's weights: for a single
      image the steps are the same, for 1/128 of the numbers, and images of a batch share less;
    - labels are inferred first, and counted again as the images come out (descent.py);
    - the iterate with the least S is kept, not the last;
    - at the end the pixels themselves are moved, by L-BFGS, which goes far where the network is smooth;
    - under noise the smoothing grows with it, sqrt(S) goes, and the search stops where the noise explains
      what is left.

    In either, sqrt(S) is smoothed at 0, and sides that are no power of two are cut out of the next
    larger one.

    Attributes:
        width: channels of the last block; 32 in the code.
        learning_rate: of RMSprop with momentum 0.99, whose steps are 100 times as long.
        smoothing: weight of the squared total variation.
        relative: whether S is relative and selective; else it is absolute and of all tensors, as released.
        keep: "best" or "last" iterate.
        coded: whether what the first layer makes of the inputs is fitted; else its weights, as released.
        polish: line searches over the pixels at the end; none under noise.
    """

    steps: int = 1000
    width: int = 16
    learning_rate: float = 1e-4
    smoothing: float = 1e-4
    relative: bool = True
    keep: str = "best"
    coded: bool = True
    polish: int = 300

    name: ClassVar[str] = "grnn"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "faithful": {
            "steps": 1000,
            "width": 32,
            "smoothing": 1e-3,
            "relative": False,
            "keep": "last",
            "polish": 0,
            "coded": False,
            "labels": "joint",
            "aware": False,
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1 or not self.learning_rate:
            raise UsageError("Expected a width of at least 1 and a learning rate above 0.")
        if self.keep not in ("best", "last"):
            raise UsageError(f"Expected keep to be best or last, got {self.keep!r}.")

    def lasting(self, times: int) -> Self:
        return replace(super().lasting(times), polish=times * self.polish)

    def _start(self, problem: Problem) -> dict[str, Tensor]:
        update = problem.update
        blocks = _blocks(max(update.size))
        channels = [self.width << block for block in range(blocks, -1, -1)]

        def uniform(purpose: str, *shape: int, inputs: int) -> Tensor:
            return (2 * problem.draw(purpose, *shape, uniform=True) - 1) / math.sqrt(inputs)

        first = 2 * channels[0]
        weights = {  # PyTorch's own start, which is what the code ends up with
            "first": uniform("first", NOISE, first * 16, inputs=first * 16),
            "bias": uniform("bias", first, inputs=first * 16),
        }
        for block in range(blocks + 1):
            outputs = 2 * (channels[block + 1] if block < blocks else problem.colours)
            shape = (outputs, channels[block], 3, 3)
            weights[f"conv{block}"] = uniform(f"conv{block}", *shape, inputs=9 * channels[block])
            weights[f"scale{block}"] = torch.ones_like(weights[f"conv{block}"][:, :, 0, 0, 0])
            weights[f"shift{block}"] = torch.zeros_like(weights[f"scale{block}"])
        if self.coded:
            inputs = self._constants(problem)["z"]
            weights["code"] = torch.bmm(inputs, weights.pop("first")) / REACH
        if problem.known is None:
            weights["label"] = uniform("label", NOISE, update.classes, inputs=NOISE)
            weights["label_bias"] = uniform("label bias", update.classes, inputs=NOISE)
        return weights

    def _constants(self, problem: Problem) -> dict[str, Tensor]:
        return {"z": problem.draw("z", problem.update.images, NOISE)}

    def _decode(self, problem: Problem, variables: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        z, y = variables["z"], problem.targets
        if y is None:
            y = torch.baddbmm(variables["label_bias"].unsqueeze(1), z, variables["label"]).softmax(2)
        return draw(variables, z, problem.update.size), y

    def _loss(self, problem: Problem, x: Tensor, distance: Tensor) -> Tensor:
        if not self.relative:
            distance = distance * problem.unit
        quiet = problem.evidence.temperature == 0
        wasserstein = torch.where(quiet | (not self.relative), (distance + EPSILON).sqrt(), 0.0)
        noisy = smoothness(x, temperature=problem.evidence.temperature, unit=problem.unit)
        return distance + wasserstein + (self.smoothing + noisy) * squared_variation(x)

    def _optimizer(self, variables: Iterable[Tensor]) -> Optimizer:
        return torch.optim.RMSprop(variables, self.learning_rate, alpha=0.99, momentum=0.99)

    def _rate(self, done: float) -> float:
        return self.learning_rate

    def _refine(self, problem: Problem, solved: Solved, job: Job) -> Solved:
        noisy = problem.evidence.temperature > 0
        if not self.polish or bool(noisy.all()):
            return solved
        start = {"x": solved.x}
        if problem.known is None:
            start["logits"] = solved.y.clamp_min(EPSILON).log()
        better = search_pixels(
            problem,
            start,
            distance=self._distance,
            floor=self._floor(problem),
            steps=self.polish,
            report=lambda _: None,
            job=job,
            idle=noisy,
        )
        return Solved(
            x=better.x,
            y=torch.where(noisy[:, None, None], solved.y, better.y),
            steps=[before + more for before, more in zip(solved.steps, better.steps, strict=True)],
            ends=[
                before if still or before.startswith(FAILED) else after
                for still, before, after in zip(noisy.tolist(), solved.ends, better.ends, strict=True)
            ],
            history=[*solved.history, *((self.steps + step, row) for step, row in better.history[1:])],
        )

    @property
    def _selective(self) -> bool:
        return self.relative

    @property
    def _keeps_last(self) -> bool:
        return self.keep == "last"


def draw(weights: dict[str, Tensor], z: Tensor, size: tuple[int, int]) -> Tensor:
    """Return what generators draw: pixels in (0, 1), (members, images, colours, height, width).

    Args:
        weights: by name, (members, ...).
        z: their inputs, (members, images, NOISE).
        size: height and width.
    """
    members, images, _ = z.shape
    u = REACH * weights["code"] if "code" in weights else torch.bmm(z, weights["first"])
    u = u.view(members, images, -1, 4, 4)
    u = _gated(u + weights["bias"][:, None, :, None, None])
    last = _blocks(max(size))
    for block in range(last + 1):
        double = _doubled if block < last else _doubled_to_few
        u = double(u, weights[f"conv{block}"])
        u = _gated(_normalised(u, weights[f"scale{block}"], weights[f"shift{block}"]))
    top, left = ((have - want) // 2 for have, want in zip(u.shape[3:], size, strict=True))
    return u[..., top : top + size[0], left : left + size[1]].sigmoid()


def _blocks(side: int) -> int:
    """Return how many blocks come before the last; each doubles the side, from 4 px on."""
    if side > LARGEST_SIDE:
        raise UsageError(f"grnn draws images of up to {LARGEST_SIDE} px, got {side}.")
    return max(1, math.ceil(math.log2(side)) - 3)


def _doubled(u: Tensor, weight: Tensor) -> Tensor:
    """Double the side and convolve, each member with its own weight: one convolution in groups.

    Args:
        u: (members, images, inputs, side, side).
        weight: (members, outputs, inputs, 3, 3).
    """
    members, images, _, side, _ = u.shape
    u = F.interpolate(u.transpose(0, 1).flatten(1, 2), scale_factor=2)  # (images, members * inputs, ...)
    u = F.conv2d(u, weight.flatten(0, 1), padding=1, groups=members)
    return u.view(images, members, -1, 2 * side, 2 * side).transpose(0, 1)


def _doubled_to_few(u: Tensor, weight: Tensor) -> Tensor:
    """Do what `_doubled` does, as one transposed convolution: fewer products, and faster for few outputs."""
    members, images, _, side, _ = u.shape
    spread = F.conv2d(weight.flatten(0, 2)[:, None], weight.new_ones(1, 1, 2, 2), padding=1)
    spread = spread.view(*weight.shape[:3], 4, 4).flip(3, 4).transpose(1, 2)
    u = F.conv_transpose2d(
        u.transpose(0, 1).flatten(1, 2), spread.flatten(0, 1), stride=2, padding=1, groups=members
    )
    return u.view(images, members, -1, 2 * side, 2 * side).transpose(0, 1)


def _normalised(u: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Batch norm over each member's own images."""
    mean = u.mean((1, 3, 4), keepdim=True)
    variance = u.var((1, 3, 4), unbiased=False, keepdim=True)
    factor = scale[:, None, :, None, None] * torch.rsqrt(variance + 1e-5)
    return (u - mean) * factor + shift[:, None, :, None, None]


def _gated(u: Tensor) -> Tensor:
    """Half the channels, let through by the other half (GLU)."""
    return F.glu(u, 2)
