"""Purification in a few evaluations: ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from privet.errors import UsageError
from privet.images.image_set import ImageSet
from privet.learning.chunks import Change
from privet.learning.job import Job
from privet.recovery.diffusion import DiffusionRecovery, ImageNoise, renoise, to_pixels, to_unit
from privet.recovery.perceptual import perceptual_gradient
from privet.recovery.prior import Prior

ROUNDS = 2
# Levels and rounds that take off what JCDP takes off, and leave more of the image than the defaults.
GENTLY = (30, 15), 4


@dataclass(frozen=True)
class Purify(DiffusionRecovery):
    """Noise the image and walk back in a few long steps, several times over.

    Each round noises the image to its first level and goes down its levels without new noise (DDIM,
    Song et al., arXiv 2010.02502), an evaluation each; the prior's estimate at the last is what the next round
    noises. JCDP and AVATAR walk the same way in hundreds of small steps. Noise depends on the image
    alone, so that a result does not depend on what else is recovered.

    Attributes:
        levels: how noisy, of 1,000, at each evaluation of a round.
        rounds: how many.
        pull: share of the way back to the protected image after each round, from 0 to 1.
        perceptual: a step as long as this share of that way, but down the gradient of the perceptual distance
            (`perceptual_gradient`) to the protected image.
        ball: how far the result may lie from the protected image in any channel, in 1/255, or None;
            for protections with a known budget.
    """

    levels: tuple[int, ...] = (100, 50)
    rounds: int = ROUNDS
    pull: float = 0.0
    perceptual: float = 0.0
    ball: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 <= self.pull < 1 or not 0 <= self.perceptual <= 1:
            raise UsageError(
                "purify needs a round, and shares of 0 to 1 for pull and perceptual; got "
                f"{self.rounds}, {self.pull} and {self.perceptual}."
            )
        if not self.levels or tuple(sorted(set(self.levels), reverse=True)) != self.levels:
            raise UsageError(f"purify needs levels that fall, got {self.levels}.")

    @property
    def name(self) -> str:
        if (self.levels, self.rounds) == GENTLY:
            return "purify-gently"
        return "purify" if self.rounds == ROUNDS else f"purify-{self.rounds}"

    @classmethod
    def gently(cls, prior: str) -> Self:
        """Return it with low levels and many rounds: 8 evaluations, for noise that varies quickly in an image."""
        levels, rounds = GENTLY
        return cls(prior, levels=levels, rounds=rounds)

    def _change(self, images: ImageSet, job: Job) -> Change:
        runtime = job.runtime
        prior = self._open(images, self.levels, job, evaluations=len(self.levels) * self.rounds)

        def change(index: Tensor, randomness: torch.Generator) -> Tensor:
            pixels = images.pixels[index]
            x = to_unit(pixels, runtime.device)
            noise = ImageNoise(pixels, job.seed, runtime.device)
            clean = x
            for _ in range(self.rounds):
                unseen = noise()
                for level in self.levels:
                    kept = float(prior.kept[level])
                    noisy = renoise(clean, unseen, kept)
                    clean = prior.clean(noisy, level, runtime=runtime)
                    unseen = (noisy - kept**0.5 * clean) / (1 - kept) ** 0.5
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
