"""Random noise: the control that must not protect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from privet.errors import InputError, UsageError
from privet.images.budget import Budget, of_length
from privet.images.image_set import ImageSet
from privet.learning.job import Job
from privet.protection.base import Perturb, Protection


@dataclass(frozen=True, kw_only=True)
class RandomNoise(Protection):
    """All of the budget and no idea: noise that knows neither image nor class.

    Not a protection but its control. An image set that this protects as well was hard to learn
    for another reason, and an audit says so.

    Attributes:
        epsilon: the budget, in the unit of its norm (`Budget`).
        norm: "linf" (every channel of every pixel moves by +ε or -ε), "l2" (normal noise of length ε) or
            "l0" (ε pixels get random values).
    """

    epsilon: float = 8
    norm: str = "linf"

    name: ClassVar[str] = "random"
    labelled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "none":
            raise UsageError("random needs a budget to use up: a norm of linf, l2 or l0, got 'none'.")

    @property
    def budget(self) -> Budget:
        return Budget(norm=self.norm, amount=self.epsilon)

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        if self.norm == "l0" and self.epsilon > images.size[0] * images.size[1]:
            raise InputError(
                f"random cannot change {self.epsilon:g} pixels of images that have {images.size[0] * images.size[1]}."
            )

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            shape = (len(index), *images.pixels.shape[1:])
            device = randomness.device
            tie = images.grey[index].to(device).view(-1, 1, 1, 1)
            if self.norm == "l2":
                noise = torch.randn(shape, generator=randomness, device=device)
                noise = torch.where(tie, noise[:, :1], noise)
                return of_length(noise, 255 * self.budget.allowed(images.size, seen=images.size))
            noise = torch.randint(0, 2, shape, generator=randomness, device=device)
            noise = torch.where(tie, noise[:, :1], noise)
            if self.norm == "linf":
                return (2.0 * noise - 1.0) * self.epsilon
            rank = torch.rand(shape[0], shape[2] * shape[3], generator=randomness, device=device)
            # Not those above a bound: two may draw the same number.
            places = rank.topk(int(self.epsilon)).indices
            chosen = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, places, True)
            chosen = chosen.view(-1, 1, *shape[2:])
            return torch.where(chosen, 255.0 * noise - images.pixels[index].to(device), 0)

        return perturb
