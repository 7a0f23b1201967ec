"""Random noise: the control that must not protect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from privet.images.image_set import ImageSet
from privet.protection.base import Job, Perturb, Protection


@dataclass(frozen=True, kw_only=True)
class RandomNoise(Protection):
    """Every channel of every pixel moves by +ε or -ε, at random: all of the budget and no idea.

    Not a protection but its control. An image set that this protects as well was hard to learn
    for another reason, and an audit says so.
    """

    name: ClassVar[str] = "random"

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            shape = (len(index), *images.pixels.shape[1:])
            sign = torch.randint(0, 2, shape, generator=randomness, device=randomness.device)
            grey = images.grey[index].to(sign.device)
            sign[grey] = sign[grey, :1].expand(-1, 3, -1, -1)
            return (2.0 * sign - 1.0) * self.epsilon

        return perturb
