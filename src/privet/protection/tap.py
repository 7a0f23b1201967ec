"""Targeted adversarial poisoning (TAP)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.images.augment import augmentation_for
from privet.images.image_set import ImageSet
from privet.learning.attack import uniform
from privet.learning.checkpoint import load_checkpoint, save_checkpoint
from privet.learning.job import Job
from privet.learning.train import training_step
from privet.models import create_model
from privet.protection.base import Bounded, Perturb
from privet.protection.minimise import Batch, Batches, minimise
from privet.protection.surrogate import load_surrogate, save_surrogate
from privet.seeds import derive


@dataclass(frozen=True, kw_only=True)
class TAP(Bounded):
    """Targeted adversarial poisoning (Fowl et al., arXiv 2106.10807): images that carry another class's features.

    A surrogate f is trained on the clean images. Every image is then attacked so that f takes it for
    the next class, whatever view it is shown:

        min over |δ| <= ε of  E_t CE(f(t(x + δ)), (y + 1) mod classes)

    A learner that trains on these images with their true labels learns the classes in the wrong
    places, and ends below chance.

    Attributes:
        surrogate: architecture of f.
        epochs: of f, on clean images; the learning rate falls linearly to zero.
        batch_size: images a step.
        learning_rate: of SGD (momentum 0.9, weight decay 0.0005).
        noise_steps: of the attack, each `step_size` long.
        step_size: in 1/255.
        views: random views in each step.
        restarts: attacks from random starts, of which the best is kept.
        flip: whether views are mirrored; no for handwriting.
    """

    surrogate: str = "resnet18"
    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 0.1
    noise_steps: int = 250
    step_size: float = 0.4
    views: int = 1
    restarts: int = 8
    flip: bool = True

    name: ClassVar[str] = "tap"
    continues: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "cpu": {"surrogate": "resnet10-w16", "noise_steps": 60, "step_size": 0.8, "restarts": 1},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_one("epochs", "batch_size", "noise_steps", "views", "restarts")

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        batches = Batches(images, job.runtime)
        model = load_surrogate(job) or self._train(images, batches, job)

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            batch = batches[index]
            target = Batch(batch.x, (batch.labels + 1) % images.classes, batch.grey)
            best, least = torch.zeros_like(batch.x), batch.x.new_full((len(index),), torch.inf)
            for _ in range(self.restarts):
                noise = self._attack(model, target, randomness, job)
                if self.restarts == 1:
                    return noise * 255
                with torch.no_grad(), job.runtime.autocast():
                    logits = model((batch.x + noise).clamp_(0, 1)).float()
                loss = F.cross_entropy(logits, target.labels, reduction="none")
                best = torch.where((loss < least).view(-1, 1, 1, 1), noise, best)
                least = torch.minimum(loss, least)
            return best * 255

        return perturb

    def _attack(self, model: nn.Module, target: Batch, randomness: torch.Generator, job: Job) -> Tensor:
        start = uniform(target.x, self.epsilon / 255, randomness)
        start = torch.where(target.grey.view(-1, 1, 1, 1), start[:, :1], start)
        return minimise(
            model,
            target,
            start,
            epsilon=self.epsilon / 255,
            step_size=self.step_size / 255,
            steps=self.noise_steps,
            augmentation=augmentation_for((target.x.shape[2], target.x.shape[3]), flip=self.flip),
            views=self.views,
            generator=randomness,
            runtime=job.runtime,
        )

    def _train(self, images: ImageSet, batches: Batches, job: Job) -> nn.Module:
        """Train the surrogate on the clean images."""
        runtime = job.runtime
        model = runtime.place(
            create_model(
                self.surrogate,
                classes=images.classes,
                size=images.size,
                seed=derive(job.seed, "surrogate"),
            )
        )
        optimizer = torch.optim.SGD(model.parameters(), self.learning_rate, momentum=0.9, weight_decay=5e-4)
        path, first = job.file("surrogate-checkpoint.safetensors"), 0
        if path and (state := load_checkpoint(path, model=model, optimizer=optimizer)):
            first = int(state[1]["step"])
        trained = runtime.distribute(model)
        augmentation = augmentation_for(images.size, flip=self.flip)
        size = min(self.batch_size, len(images))
        steps = self.epochs * (len(images) // size)
        for step in range(first, steps):
            index = runtime.share(job.batch(step, count=len(images), size=size))
            batch, randomness = batches[index], job.random("step", step, runtime.rank)
            seen = augmentation.draw(len(index), images.size, randomness).apply(batch.x)
            rate = self.learning_rate * (1 - step / steps)
            training_step(trained, optimizer, seen, batch.labels, rate=rate, runtime=runtime)
            job.progress("training the surrogate", (step + 1) * size, steps * size)
            if path is not None and job.checkpoint_due(last=step + 1 == steps):
                save_checkpoint(path, model=model, optimizer=optimizer, record={"step": step + 1})
        save_surrogate(model, self.surrogate, images, self, job)
        return model.eval().requires_grad_(False)
