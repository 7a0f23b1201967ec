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
from privet.recovery.perceptual import perceptual_gradient
from privet.recovery.prior import Prior


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
        perceptual: a step as long as this share of that way, but down the gradient of the perceptual distance
            (`perceptual_gradient`) to the protected image.
        ball: how far the result may lie from the protected image in any channel, in 1/255, or None;
            for protections with a known budget.
    """

    levels: tuple[int, ...] = (60, 45, 30, 20)
    pull: float = 0.0
    perceptual: float = 0.0
    ball: float | None = None

    name = "purify"

    def __post_init__(self) -> None:
        if not self.levels or not 0 <= self.pull < 1 or not 0 <= self.perceptual <= 1:
            raise UsageError(
                "purify needs a level, and shares of 0 to 1 for pull and perceptual; got "
                f"{self.levels}, {self.pull} and {self.perceptual}."
            )

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
                if self.perceptual:
                    clean = clean - self.perceptual * self._downhill(prior, clean, x, job)
                if self.ball is not None:
                    clean = x + (clean - x).clamp(-self.ball / 127.5, self.ball / 127.5)
            return to_pixels(clean)

        return change

    def _downhill(self, prior: Prior, clean: Tensor, x: Tensor, job: Job) -> Tensor:
        """Return the perceptual gradient, as long as the way to the protected image."""
        gradient = perceptual_gradient(prior.model, clean, x, job)
        way, slope = ((one.flatten(1).norm(dim=1)) for one in (x - clean, gradient))
        step: Tensor = gradient * (way / slope.clamp(min=1e-12)).view(-1, 1, 1, 1)
        return step
