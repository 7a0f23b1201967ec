"""AVATAR: diffuse and denoise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from privet.images.image_set import ImageSet
from privet.learning.chunks import Change
from privet.learning.job import Job
from privet.recovery.diffusion import DiffusionRecovery, ImageNoise, renoise, to_pixels, to_unit, walk_back


@dataclass(frozen=True)
class AVATAR(DiffusionRecovery):
    """AVATAR (Dolatabadi et al., arXiv 2303.08500): DiffPure (arXiv 2205.07460) applied to training images.

    Images are noised up to `time` and denoised step by step, without guidance and without labels.
    The authors integrate the stochastic differential equation of a score model in steps as fine as
    these; here it is ancestral sampling with the prior at hand.

    Attributes:
        time: how noisy, of 1,000; also the number of evaluations for each image.
    """

    time: int = 100

    name = "avatar"

    def _change(self, images: ImageSet, job: Job) -> Change:
        runtime = job.runtime
        prior = self._open(images, [self.time], job, evaluations=self.time)

        def change(index: Tensor, randomness: torch.Generator) -> Tensor:
            pixels = images.pixels[index]
            noise = ImageNoise(pixels, job.seed, runtime.device)
            noisy = renoise(to_unit(pixels, runtime.device), noise(), float(prior.kept[self.time]))
            return to_pixels(walk_back(prior, noisy, self.time, noise=noise, runtime=runtime))

        return change
