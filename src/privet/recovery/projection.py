"""Orthogonal projection: take the directions away by which a straight line tells the classes apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from privet.images.image_set import ImageSet
from privet.learning.chunks import CHUNK, Change
from privet.learning.job import Job
from privet.recovery.base import ImageRecovery
from privet.seeds import generator


@dataclass(frozen=True)
class Projection(ImageRecovery):
    """Orthogonal projection (Sandoval-Segura et al., arXiv 2305.19254).

    A logistic regression without bias learns the protected images as they are; its weight vectors,
    one a class, made orthonormal (QR), are projected out of every image. What a straight line finds
    so fast, in images that it cannot know, is the shortcut. Strong against class-wise noise (OPS,
    LSP), weak against noise that differs from image to image.

    Deviation: the mean image keeps its share in those directions, which tells nothing of any class;
    without it images would come out nearly black.

    Attributes:
        epochs: of the regression, by SGD; the learning rate falls to a tenth after half and after three quarters.
        batch_size: images a step.
        learning_rate: of the first half; images have values in [0, 1].
    """

    epochs: int = 20
    batch_size: int = 1024
    learning_rate: float = 0.1

    name = "projection"

    def _change(self, images: ImageSet, job: Job) -> Change:
        basis = self._basis(images, job)  # (values, classes)

        total = torch.zeros(basis.shape[0])
        for start in range(0, len(images), CHUNK):
            total += images.pixels[start : start + CHUNK].float().flatten(1).sum(0)
        mean = (total / len(images)).to(basis.device)

        def change(index: Tensor, randomness: torch.Generator) -> Tensor:
            flat = images.pixels[index].float().flatten(1).to(basis.device)
            left = flat - ((flat - mean) @ basis) @ basis.T
            return left.round().clamp_(0, 255).to(torch.uint8).view(-1, 3, *images.size)

        return change

    def _basis(self, images: ImageSet, job: Job) -> Tensor:
        runtime = job.runtime
        pixels, labels = runtime.hold(images.pixels), runtime.hold(images.labels)
        values = 3 * images.size[0] * images.size[1]
        bound = values**-0.5
        weights = torch.empty(images.classes, values)
        weights.uniform_(-bound, bound, generator=generator(job.seed, "regression"))
        weights = weights.to(runtime.device).requires_grad_()
        optimizer = torch.optim.SGD([weights], self.learning_rate, momentum=0.9, weight_decay=5e-4)
        size = min(self.batch_size, len(images))
        for epoch in range(self.epochs):
            late = (epoch >= self.epochs // 2) + (epoch >= self.epochs * 3 // 4)
            optimizer.param_groups[0]["lr"] = self.learning_rate * 0.1**late
            order = torch.randperm(len(images), generator=generator(job.seed, "order", epoch))
            for start in range(0, len(images), size):
                index = order[start : start + size]
                x = runtime.take(pixels, index).float().flatten(1) / 255
                loss = F.cross_entropy(x @ weights.T, runtime.take(labels, index))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            job.progress("fitting a straight line", (epoch + 1) * len(images), self.epochs * len(images))
        basis: Tensor = torch.linalg.qr(weights.detach().T)[0]
        return basis
