"""COIN: resampling at random places, against protections that convolve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from privet.images.image_set import ImageSet
from privet.learning.chunks import Change
from privet.learning.job import Job
from privet.recovery.base import ImageRecovery


@dataclass(frozen=True)
class COIN(ImageRecovery):
    """Random interpolation (Wang et al., AAAI 2025, arXiv 2311.18403).

    Every pixel is fetched from a place up to `reach` pixels away, at random in both directions, by
    bilinear interpolation, the image being continued by itself. Each place gets weights of its own,
    so that a convolution that is the same everywhere in a class no longer marks it.
    """

    reach: float = 2.0

    @property
    def name(self) -> str:
        return "coin"

    def _change(self, images: ImageSet, job: Job) -> Change:
        height, width = images.size

        def change(index: Tensor, randomness: torch.Generator) -> Tensor:
            x = images.pixels[index].to(randomness.device).float()
            offset = torch.rand(len(index), 2, height, width, generator=randomness, device=x.device)
            offset = (2 * offset - 1) * self.reach
            place = offset.floor()
            share = (offset - place).unsqueeze(2)  # of the pixel below, and of the one to the right
            rows = torch.arange(height, device=x.device).view(1, height, 1) + place[:, 0].long()
            columns = torch.arange(width, device=x.device).view(1, 1, width) + place[:, 1].long()

            def fetch(down: int, right: int) -> Tensor:
                flat = (rows + down) % height * width + (columns + right) % width
                flat = flat.flatten(1).unsqueeze(1).expand(-1, 3, -1)
                return x.flatten(2).gather(2, flat).view_as(x)

            down, right = share[:, 0], share[:, 1]
            above = fetch(0, 0) * (1 - right) + fetch(0, 1) * right
            below = fetch(1, 0) * (1 - right) + fetch(1, 1) * right
            return (above * (1 - down) + below * down).round().clamp_(0, 255).to(torch.uint8)

        return change
