"""Learnable examples by joint-conditional diffusion purification (JCDP), as released."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from privet.images.image_set import ImageSet
from privet.learning.chunks import Change
from privet.learning.job import Job
from privet.recovery.diffusion import (
    DiffusionRecovery,
    Guide,
    ImageNoise,
    renoise,
    to_pixels,
    to_unit,
    walk_back,
)
from privet.recovery.perceptual import perceptual_gradient
from privet.recovery.prior import Prior


@dataclass(frozen=True)
class JCDP(DiffusionRecovery):
    """Learnable examples (Jiang et al., arXiv 2305.09241): diffuse and denoise, held near the image.

    `rounds` times over: noise up to `time`, then denoise step by step; each step is shifted down the
    gradient of the distance between the sample and the protected image, noised as much. The distance
    is the mean squared error while the sample is noisy, and a perceptual one from time `handover` on
    (the older of the released versions adds the two). The shift is beta_t s_t times the gradient, with

        s_t = sqrt((1 - kept_t) / kept_t) * 3 guide / (2 epsilon / 255).

    Released distances are means over a batch of 500 images, so that the strength depends on the
    batch; here it is always that of 500, whatever the batch. So small is it that the squared
    error pulls an image a thousandth of its way back, and the perceptual term less than the noise
    of a step: what is left is diffusing and denoising four times.

    Deviations: the perceptual distance is taken between features of the prior, normalised at each place, instead of
    LPIPS with AlexNet, whose weights would have to be downloaded; pixels are rounded, not cut off.

    Attributes:
        rounds: of diffusing and denoising.
        time: how noisy, of 1,000; rounds x time evaluations for each image.
        guide: strength of the guidance; 0 for none.
        handover: from this time on the distance is perceptual.
        epsilon: the budget that the protection is believed to have, in 1/255.
    """

    rounds: int = 4
    time: int = 20
    guide: float = 70_000.0
    handover: int = 10
    epsilon: float = 8.0

    name = "jcdp"

    def _change(self, images: ImageSet, job: Job) -> Change:
        runtime = job.runtime
        prior = self._open(images, [self.time], job, evaluations=self.rounds * self.time)

        def change(index: Tensor, randomness: torch.Generator) -> Tensor:
            pixels = images.pixels[index]
            x = to_unit(pixels, runtime.device)
            noise = ImageNoise(pixels, job.seed, runtime.device)
            guide = self._guide(prior, x, noise, job) if self.guide else None
            recovered = x
            for _ in range(self.rounds):
                noisy = renoise(recovered, noise(), float(prior.kept[self.time]))
                recovered = walk_back(prior, noisy, self.time, noise=noise, runtime=runtime, guide=guide)
            return to_pixels(recovered)

        return change

    def _guide(self, prior: Prior, x: Tensor, noise: ImageNoise, job: Job) -> Guide:
        values = x[0].numel()

        def shift(noisy: Tensor, time: int) -> Tensor:
            kept = float(prior.kept[time])
            strength = ((1 - kept) / kept) ** 0.5 * 3 * self.guide / (2 * self.epsilon / 255)
            anchor = renoise(x, noise(), kept)
            if time > self.handover:
                gradient = 2 / values * (noisy - anchor)
            else:
                gradient = perceptual_gradient(prior.model, noisy, anchor, job)
            shifted: Tensor = gradient * (-strength / BATCH)
            return shifted

        return shift


BATCH = 500  # of the release, over which it takes means
