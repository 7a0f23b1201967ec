"""One-pixel shortcut (OPS)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from privet.errors import InputError
from privet.images.budget import Budget
from privet.images.image_set import ImageSet
from privet.learning.chunks import CHUNK
from privet.learning.job import Job
from privet.protection.base import Perturb, Protection


@dataclass(frozen=True, kw_only=True)
class OPS(Protection):
    """One-pixel shortcut (Wu et al., arXiv 2205.12141): one pixel of one colour for each class.

    No surrogate and no training. For a class, the pixel position p and the colour c, one of the
    cube's eight corners, are those that maximise

        mean |c - x_p| / std |c - x_p|,

    over the images of the class and the channels: a change that is large, and equally large in all
    of them. No position serves two classes. The pixel is set to the colour in every image.

    The budget is one pixel (L0), and the change is plain to see. With grey files the corners are black and white.

    Attributes:
        epsilon: pixels that change; the method has one.
    """

    epsilon: int = 1

    name: ClassVar[str] = "ops"

    @property
    def budget(self) -> Budget:
        return Budget(norm="l0", amount=self.epsilon)

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        colours = torch.tensor([[n >> 2 & 1, n >> 1 & 1, n & 1] for n in range(8)], dtype=torch.float64)
        if bool(images.grey.any()):
            colours = colours[[0, 7]]
        height, width = images.size
        if images.classes * self.epsilon > height * width:
            raise InputError(
                f"{images.classes} classes need {images.classes * self.epsilon} pixels of their own, but images "
                f"have {height * width}."
            )
        taken: set[int] = set()
        chosen = torch.zeros(images.classes, self.epsilon, 2, dtype=torch.int64)  # colour, position
        for label, score in enumerate(scores(images, colours)):
            order = score.flatten().argsort(descending=True, stable=True)
            places = iter(order.tolist())
            for pixel in range(self.epsilon):
                place = next(place for place in places if place % score.shape[1] not in taken)
                colour, position = divmod(place, score.shape[1])
                taken.add(position)
                chosen[label, pixel] = torch.tensor([colour, position])

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            delta = torch.zeros(len(index), *images.pixels.shape[1:])
            rows = torch.arange(len(index))
            for pixel in range(self.epsilon):
                colour, position = chosen[images.labels[index], pixel].unbind(1)
                y, x = position // width, position % width
                before = images.pixels[index, :, y, x].float()
                delta[rows, :, y, x] = 255 * colours[colour].float() - before
            return delta

        return perturb


def scores(images: ImageSet, colours: Tensor) -> Iterator[Tensor]:
    """Yield the objective for each colour and position, (colours, height * width), of one class after the other."""
    height, width = images.size
    first = torch.zeros(images.classes, 3, height * width, dtype=torch.float64)
    second = torch.zeros_like(first)
    for start in range(0, len(images), CHUNK):
        part = slice(start, start + CHUNK)
        x = images.pixels[part].double().flatten(2) / 255
        first.index_add_(0, images.labels[part], x)
        second.index_add_(0, images.labels[part], x * x)
    counts = images.labels.bincount(minlength=images.classes).clamp(min=1)
    ones = colours.unsqueeze(2)
    for count, total, squares in zip(counts, first, second, strict=True):
        # |1 - x| = 1 - x and |0 - x| = x, so moments of the pixels give moments of the distances.
        mean = (ones + (1 - 2 * ones) * (total / count)).mean(1)
        square = (ones * (1 - 2 * (total / count)) + squares / count).mean(1)
        yield mean / (square - mean * mean).clamp(min=1e-12).sqrt()
