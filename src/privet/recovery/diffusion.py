"""What recoveries that denoise have in common: noise, steps back, values for pixels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from privet.images.image_set import ImageSet
from privet.learning.job import Job
from privet.learning.runtime import Runtime
from privet.recovery.base import ImageRecovery
from privet.recovery.prior import PIECE, Prior, fingerprint, load_prior, weigh
from privet.seeds import generator

# Bytes of weights x pixels of images that a core takes through a hundred evaluations in about 10 s (AMD EPYC, float32).
WORK = 50_000_000_000


@dataclass(frozen=True)
class DiffusionRecovery(ImageRecovery):
    """A recovery that denoises with a prior.

    Attributes:
        prior: a folder or a model of the hub, for `load_prior`.
    """

    prior: str

    def record(self) -> dict[str, Any]:
        """Return what the bytes depend on: the prior by the hash of its weights, wherever it lies."""
        return {"recovery": self.name, "settings": {**asdict(self), "prior": fingerprint(self.prior)}}

    def _open(self, images: ImageSet, times: Sequence[int], job: Job, *, evaluations: int) -> Prior:
        """Load the prior, and check that it can do what will be asked of it."""
        prior = load_prior(self.prior, runtime=job.runtime)
        for time in times:
            prior.check(images.size, time)
        job.facts.update(evaluations=evaluations)
        return prior

    def _together(self, images: ImageSet, job: Job) -> int | None:
        """Return how many images a processor denoises in well under a minute, as long as one of them takes no longer.

        A GPU is through with many in that time. What comes out is the same for any number, but for last bits.
        """
        if job.runtime.device.type == "cuda":
            return None
        each = WORK // (weigh(self.prior) * math.prod(images.size))
        return max(1, min(PIECE, each)) * torch.get_num_threads()


Guide = Callable[[Tensor, int], Tensor]
"""Maps a noisy image and its time to a shift of the next, less noisy one."""


def walk_back(
    prior: Prior,
    noisy: Tensor,
    time: int,
    *,
    noise: Callable[[], Tensor],
    runtime: Runtime,
    guide: Guide | None = None,
) -> Tensor:
    """Return what ancestral sampling makes of images noised up to `time`: one evaluation for each time.

    Ho et al., arXiv 2006.11239, algorithm 2, with the larger of their variances, beta.
    """
    for now in range(time - 1, -1, -1):
        kept, before = float(prior.kept[now]), float(prior.kept[now - 1]) if now else 1.0
        beta = 1 - kept / before
        clean = prior.clean(noisy, now, runtime=runtime)
        mean = (before**0.5 * beta * clean + (kept / before) ** 0.5 * (1 - before) * noisy) / (1 - kept)
        if guide is not None:
            mean = mean + beta * guide(noisy, now)
        noisy = mean + beta**0.5 * noise() if now else mean
    return noisy


def renoise(clean: Tensor, noise: Tensor, kept: float) -> Tensor:
    """Return the noisy image of which `kept` is left."""
    noisy: Tensor = kept**0.5 * clean + (1 - kept) ** 0.5 * noise
    return noisy


class ImageNoise:
    """Normal noise for each image that depends on its pixels alone, not on what is recovered beside it."""

    def __init__(self, pixels: Tensor, seed: int, device: torch.device) -> None:
        self.shape, self.device = pixels.shape[1:], device
        self.draws = [
            generator(seed, "image", hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest())
            for image in pixels.permute(0, 2, 3, 1)
        ]

    def __call__(self) -> Tensor:
        """Return the next noise, (batch, 3, height, width)."""
        drawn = [torch.randn(self.shape, generator=draw) for draw in self.draws]
        return torch.stack(drawn).to(self.device, memory_format=torch.channels_last)


def to_unit(pixels: Tensor, device: torch.device) -> Tensor:
    """Return pixels, uint8, as values in [-1, 1] on the device."""
    return (pixels.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_pixels(values: Tensor) -> Tensor:
    """Return values in [-1, 1] as uint8."""
    return ((values + 1) * 127.5).round().clamp_(0, 255).to(torch.uint8)
