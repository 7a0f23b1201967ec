"""Linearly separable perturbations (LSP)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from privet.errors import UsageError
from privet.images.budget import Budget, of_length
from privet.images.image_set import ImageSet
from privet.learning.job import Job
from privet.protection.base import Perturb, Protection
from privet.seeds import generator


@dataclass(frozen=True, kw_only=True)
class LSP(Protection):
    """Linearly separable perturbations (Yu et al., arXiv 2111.00898): noise that a straight line tells apart.

    No surrogate and no training. Each class has a corner of a hypercube as its centre; an image's
    noise is a normal sample around the centre of its class, mixed by one random matrix, laid out as
    square patches of one colour and scaled to the budget. Networks learn such a code first.

    The budget is an L2 norm: single pixels may change by more than 6/255, mostly up to about 16/255.

    Deviations: the samples are drawn here and not by scikit-learn's make_classification, which
    this follows; images that the patch does not divide are covered by cutting the last patches.

    Attributes:
        epsilon: L2 norm of the noise, of values in [0, 1], for 32 x 32 pixels; as long as 6/255 everywhere.
        patch: side of a patch in pixels.
        separation: distance of the centres from the origin along each axis, in standard deviations of a
            sample before mixing.
    """

    epsilon: float = 6 / 255 * math.sqrt(3 * 32 * 32)
    patch: int = 8
    separation: float = 10.0

    name: ClassVar[str] = "lsp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch < 1:
            raise UsageError(f"lsp needs a patch of at least 1 pixel, got {self.patch}.")

    @property
    def budget(self) -> Budget:
        return Budget(norm="l2", amount=self.epsilon)

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        height, width = images.size
        grid = (3, -(-height // self.patch), -(-width // self.patch))
        features = math.prod(grid)
        draws = generator(job.seed, "code")
        centres = corners(images.classes, features, draws) * self.separation
        mixing = torch.rand(features, features, generator=draws) * 2 - 1
        length = 255 * self.budget.allowed(images.size, seen=images.size)

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            sample = torch.randn(len(index), features, generator=randomness, device=randomness.device)
            code = sample.cpu() @ mixing + centres[images.labels[index]]
            patches = code.view(-1, *grid)
            grey = images.grey[index].view(-1, 1, 1, 1)
            patches = torch.where(grey, patches.mean(1, keepdim=True), patches)
            noise = patches.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
            noise = noise[:, :, :height, :width]
            return of_length(noise, length)

        return perturb


def corners(count: int, dimensions: int, draws: torch.Generator) -> Tensor:
    """Return distinct corners of the hypercube [-1, 1]^dimensions, (count, dimensions).

    Raises:
        UsageError: the hypercube has fewer corners.
    """
    if dimensions < 63 and count > 2**dimensions:
        raise UsageError(
            f"{count} classes cannot be told apart by {dimensions} patches; choose a smaller patch."
        )
    found = torch.randint(0, 2, (count, dimensions), generator=draws)
    while len(distinct := torch.unique(found, dim=0)) < count:
        more = torch.randint(0, 2, (count - len(distinct), dimensions), generator=draws)
        found = torch.cat((distinct, more))
    return found.float() * 2 - 1
