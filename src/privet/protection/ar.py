"""Autoregressive perturbations (AR)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from privet.errors import UsageError
from privet.images.budget import Budget, of_length
from privet.images.image_set import ImageSet
from privet.learning.job import Job
from privet.protection.base import Perturb, Protection
from privet.seeds import generator

TAPS = 8  # a 3 x 3 window without its last pixel, which is the one to be predicted
MARGIN = 4  # rows and columns that are thrown away, where the start still shows
TILE = 32  # the side up to which a process is known to stay bounded
LARGEST = 50.0  # a process that grows beyond this length is not used
ROUNDS = 200  # of candidates


@dataclass(frozen=True, kw_only=True)
class AR(Protection):
    """Autoregressive perturbations (Sandoval-Segura et al., arXiv 2206.03693): noise of a known recipe.

    No surrogate and no training. Each class has, for each channel, eight coefficients that sum to 1;
    from a random start each value of the noise is the weighted sum of the eight before it in its
    3 x 3 window, row by row. One convolution with the class's filter gives zero everywhere, so that
    networks find the class there first. Coefficients are drawn until the process stays bounded, and
    the filters of other classes respond to it.

    Deviation: images above 32 px are covered with tiles of at most 32 px, equally strong, each from a start of
    its own. What stays bounded on 32 px may grow on and on, so that all of the noise would lie in one corner.

    The budget is an L2 norm. A grey file gets the process of the first channel.

    Attributes:
        epsilon: L2 norm of the noise, of values in [0, 1], for 32 x 32 pixels.
        response: least length of what one class's filter makes of another's process, relative to that
            process. The authors bound the length itself, by 10, which no process can meet that is short.
    """

    epsilon: float = 1.0
    response: float = 0.3

    name: ClassVar[str] = "ar"

    @property
    def budget(self) -> Budget:
        return Budget(norm="l2", amount=self.epsilon)

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        taps = find_filters(images.classes, self.response, generator(job.seed, "filters")).numpy()
        length = 255 * self.budget.allowed(images.size, seen=images.size)
        down, right = (math.ceil(side / TILE) for side in images.size)
        height, width = math.ceil(images.size[0] / down), math.ceil(images.size[1] / right)

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            start = torch.randn(
                len(index) * down * right,
                3,
                height + MARGIN,
                width + MARGIN,
                generator=randomness,
                device=randomness.device,
            )
            own = taps[images.labels[index].repeat_interleave(down * right).numpy()]
            noise = torch.from_numpy(run(own, start.cpu().numpy()))[:, :, MARGIN:, MARGIN:]
            if down * right > 1:
                tiles = of_length(noise, 1.0).view(len(index), down, right, 3, height, width)
                whole = tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(index), 3, down * height, right * width)
                noise = whole[:, :, : images.size[0], : images.size[1]]
            grey = images.grey[index].view(-1, 1, 1, 1)
            noise = torch.where(grey, noise[:, :1], noise)
            return of_length(noise, length)

        return perturb


def run(taps: NDArray[np.float32], start: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run processes row by row, all at once, from their first two rows and columns.

    Args:
        taps: (processes, 3, 8), for the window read row by row.
        start: (processes, 3, height, width); only two rows and two columns of it count.

    Returns:
        The processes, in the same shape.
    """
    # Pixels come first, so that each step works on one piece of memory.
    weights = np.ascontiguousarray(taps.transpose(2, 0, 1))
    field = np.ascontiguousarray(start.transpose(2, 3, 0, 1))
    height, width = field.shape[:2]
    above = np.empty_like(field[0])
    for row in range(2, height):
        above[2:] = 0
        for tap in range(6):
            above[2:] += weights[tap] * field[row - 2 + tap // 3, tap % 3 : tap % 3 + width - 2]
        for column in range(2, width):
            value = field[row, column]
            np.multiply(weights[6], field[row, column - 2], out=value)
            value += weights[7] * field[row, column - 1]
            value += above[column]
    return np.ascontiguousarray(field.transpose(2, 3, 0, 1))


def find_filters(classes: int, response: float, draws: torch.Generator) -> Tensor:
    """Draw coefficients until there is a set for each class, (classes, 3, 8), that others respond to.

    Raises:
        UsageError: none was found in many tries.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(ROUNDS):
        taps = torch.randn(600, 1, TAPS, generator=draws)
        taps /= taps.sum(2, keepdim=True)
        start = torch.randn(600, 1, TILE + MARGIN, TILE + MARGIN, generator=draws)
        with np.errstate(over="ignore", invalid="ignore"):
            noise = torch.from_numpy(run(taps.numpy(), start.numpy()))[:, :, MARGIN:, MARGIN:]
        bounded = noise.flatten(1).square().sum(1).sqrt() <= LARGEST  # NaN is not
        count = 3 * (int(bounded.sum()) // 3)
        sets = taps[bounded][:count].view(-1, 3, TAPS), noise[bounded][:count].view(-1, 3, *noise.shape[2:])
        for candidate, process in zip(*sets, strict=True):
            if all(min(respond(candidate, other), respond(one, process)) >= response for one, other in found):
                found.append((candidate, process))
            if len(found) == classes:
                return torch.stack([one for one, _ in found])
    raise UsageError(
        f"Only {len(found)} of {classes} filters respond to each other's processes by {response:g}; "
        f"lower it with --set response={response / 2:g}."
    )


def respond(taps: Tensor, process: Tensor) -> float:
    """Return the length of what the filter of `taps`, (3, 8), makes of a process, by the process's own length.

    It is 0 for the filter's own process, (3, height, width).
    """
    kernel = torch.cat((-taps, taps.new_ones(3, 1)), 1).view(3, 1, 3, 3)
    made = F.conv2d(process[None], kernel, groups=3)
    return float((made.square().sum() / process.square().sum()).sqrt())
