"""Purification in a few evaluations: ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from privet.errors import UsageError
from privet.images.image_set import ImageSet
from privet.learning.chunks import Change
from privet.learning.job import Job
from privet.recovery.diffusion import DiffusionRecovery, ImageNoise, renoise, to_pixels, to_unit


@dataclass(frozen=True)
class Purify(DiffusionRecovery):
    """Diffuse and denoise in as few evaluations as levels.

    At each level, from the noisiest down, the image is noised and the prior's one-step estimate of
    what lies behind the noise takes its place. The walk of hundreds of small steps that JCDP and
    AVATAR take in between is where a sampler makes details up; here there is nothing to make up, for
    almost all of the image is still there. Noise depends on the image alone, so that a result does
    not depend on what else is recovered.

    Attributes:
        levels: how noisy, of 1,000, one after the other; one evaluation each.
        pull: share of the way back to the protected image after each level, from 0 to 1.
        ball: how far the result may lie from the protected image in any channel, in 1/255, or None;
            for protections with a known budget.
    """

    levels: tuple[int, ...] = (60, 45, 30, 20)
    pull: float = 0.0
    ball: float | None = None

    name = "purify"

    def __post_init__(self) -> None:
        if not self.levels or not 0 <= self.pull < 1:
            raise UsageError(f"purify needs a level, and a pull from 0 to 1; got {self.levels}, {self.pull}.")

    def _change(self, images: ImageSet, job: Job) -> Change:
        runtime = job.runtime
        prior = self._open(images, self.levels, job, evaluations=len(self.levels))

        def change(index: Tensor, randomness: torch.Generator) -> Tensor:
            pixels = images.pixels[index]
            x = to_unit(pixels, runtime.device)
            noise = ImageNoise(pixels, job.seed, runtime.device)
            clean = x
            for level in self.levels:
                noisy = renoise(clean, noise(), float(prior.kept[level]))
                clean = prior.clean(noisy, level, runtime=runtime)
                clean = clean + self.pull * (x - clean)
                if self.ball is not None:
                    clean = x + (clean - x).clamp(-self.ball / 127.5, self.ball / 127.5)
            return to_pixels(clean)

        return change
