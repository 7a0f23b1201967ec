"""Perturbation-induced linearization (PIL)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.errors import UsageError
from privet.images.augment import augmentation_for
from privet.images.image_set import ImageSet
from privet.learning.attack import uniform
from privet.learning.job import Job
from privet.learning.train import schedule, training_step
from privet.protection.base import Bounded, Perturb
from privet.protection.minimise import Batches
from privet.seeds import derive


@dataclass(frozen=True, kw_only=True)
class PIL(Bounded):
    """Perturbation-induced linearization (Liu, Chen and Zhang, arXiv 2601.19967): noise that makes networks linear.

    The surrogate is linear, f(x) = W x: two layers without biases, trained on the clean images. Each image then
    loses noise, x - δ, that f takes for the class by itself, while f sees nothing in what is left:

        min over |δ| <= ε of  λ CE(f(δ), y) + (1 - λ) KL(u || softmax f(x - δ)),   u uniform over the classes.

    Networks that learn from such images find that the linear part answers for all of them, and learn no more.
    As f is linear, both terms have their gradients in closed form, and thousands of images take seconds.

    With `views`, which the authors have not, the surrogate is trained on random views t(x) and W is replaced by its
    mean over them: W of E_t t(x). Without, learners that crop and mirror few images do not see the noise.

    Deviations: the surrogate sees the images in random order (the authors' code in that of the files), and its
    gradients are clipped, as everywhere in this package.

    Attributes:
        epochs: passes of the surrogate over the images.
        batch_size: images a step.
        learning_rate: of SGD (momentum 0.9), falling to zero along a cosine.
        noise_steps: descents on an image's noise, from a random start, each `step_size` long.
        step_size: of a descent, in 1/255.
        shortcut: λ, from 0 to 1: how much the noise's own class counts against hiding what the image shows.
        views: random views over which the surrogate is averaged; 0 for the image itself, the published method.
        flip: whether views are mirrored; no for handwriting.
    """

    epochs: int = 30
    batch_size: int = 512
    learning_rate: float = 0.003
    noise_steps: int = 30
    step_size: float = 0.8
    shortcut: float = 0.9
    views: int = 0
    flip: bool = True

    name: ClassVar[str] = "pil"
    # For some thousands of small images: as many steps as the paper's 50,000 images make in 30 epochs.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "cpu": {"epochs": 75, "batch_size": 128, "views": 256},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_one("epochs", "batch_size", "noise_steps")
        if self.shortcut > 1:
            raise UsageError(f"{self.name} needs a shortcut of 0 to 1, got {self.shortcut}.")

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        batches = Batches(images, job.runtime)
        weights = self._train(images, batches, job)
        epsilon = self.epsilon / 255

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            batch = batches[index]
            wanted = F.one_hot(batch.labels, len(weights)).float()
            tie = batch.grey.view(-1, 1, 1, 1)
            noise = uniform(batch.x, epsilon, randomness)
            noise = torch.where(tie, noise[:, :1], noise)
            seen = batch.x.flatten(1) @ weights.T
            for _ in range(self.noise_steps):
                alone = noise.flatten(1) @ weights.T
                # With respect to the outputs for the noise; a step of δ is one of -δ for what is left.
                shown, left = alone.softmax(1) - wanted, (seen - alone).softmax(1) - 1 / len(weights)
                outputs = self.shortcut * shown - (1 - self.shortcut) * left
                gradient = (outputs @ weights).view_as(noise)
                gradient = torch.where(tie, gradient.sum(1, keepdim=True), gradient)
                noise = (noise - self.step_size / 255 * gradient.sign()).clamp(-epsilon, epsilon)
            return -255 * noise

        return perturb

    def _train(self, images: ImageSet, batches: Batches, job: Job) -> Tensor:
        """Train the surrogate on the clean images, or views of them; return W, (classes, 3 * height * width).

        Every process does all of it: a linear network is trained faster than its gradients are sent.
        """
        runtime, (height, width) = job.runtime, images.size
        with runtime.drawing(derive(job.seed, "surrogate")):
            first = nn.Linear(3 * height * width, images.classes, bias=False)
            last = nn.Linear(images.classes, images.classes, bias=False)
        model = nn.Sequential(nn.Flatten(), first, last).to(runtime.device)
        augmentation = augmentation_for(images.size, flip=self.flip)
        optimizer = torch.optim.SGD(model.parameters(), self.learning_rate, momentum=0.9)
        size = min(self.batch_size, len(images))
        steps = self.epochs * (len(images) // size)
        for step in range(steps):
            batch = batches[job.batch(step, count=len(images), size=size)]
            seen = batch.x
            if self.views:
                seen = augmentation.draw(size, images.size, job.random("step", step)).apply(seen)
            rate = self.learning_rate * schedule("cosine", step / steps)
            training_step(model, optimizer, seen, batch.labels, rate=rate, runtime=runtime)
            job.progress("training the surrogate", (step + 1) * size, steps * size)
        weights = (last.weight @ first.weight).detach()
        return self._averaged(weights.view(-1, 3, height, width), job).flatten(1)

    def _averaged(self, weights: Tensor, job: Job) -> Tensor:
        """Return the mean over views t of what W sees of t(x), as weights for x, (classes, 3, height, width)."""
        if not self.views:
            return weights
        size, randomness = (weights.shape[2], weights.shape[3]), job.random("views")
        augmentation, total = augmentation_for(size, flip=self.flip), torch.zeros_like(weights)
        for _ in range(self.views):
            total += augmentation.draw(len(weights), size, randomness).adjoint(weights)
        return total / self.views
