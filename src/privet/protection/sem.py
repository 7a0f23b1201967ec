"""Stable error-minimizing noise (SEM)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from privet.errors import UsageError
from privet.images.augment import Augmentation, augmentation_for
from privet.images.image_set import ImageSet
from privet.learning.attack import frozen, pgd, uniform
from privet.learning.checkpoint import load_checkpoint, save_checkpoint
from privet.learning.job import Job
from privet.learning.train import training_step
from privet.models import create_model
from privet.protection.base import Bounded, Perturb
from privet.protection.minimise import Batch, Batches, minimise, pack, unpack
from privet.protection.surrogate import load_surrogate, save_surrogate
from privet.seeds import derive


@dataclass(frozen=True, kw_only=True)
class SEM(Bounded):
    """Stable error-minimizing noise (Liu et al., arXiv 2311.13091): noise that survives adversarial training.

    A surrogate f is trained adversarially on images that carry the noise, while the noise lowers
    the surrogate's loss under random views t and random (not adversarial) disturbances r:

        noise:      min over |δ| <= ε of  E_t E_r CE(f(t(x + δ) + r), y),   r uniform in [-ρ, ρ]
        surrogate:  min over f of  E_t max over |a| <= ρ of CE(f(t(x + δ) + a), y)

    The noise is drawn anew in every step, and once more for every image with the final surrogate;
    only those last bytes are delivered. So the surrogate alone protects further images of the same
    classes (`Job.surrogate`), without training.

    Deviations: views share one pass (same result); passes may run in bf16; the gradient norm of a
    surrogate step is clipped at 5; the network scales its input itself. The last pass covers every
    image, where the authors' code leaves out the last partial batch.

    Attributes:
        radius: ρ, of the disturbance and of the surrogate's adversarial training, in 1/255.
        surrogate: architecture of f.
        train_steps: surrogate steps, with fresh noise in each.
        batch_size: images a step.
        learning_rate: of SGD (momentum 0.9, weight decay 0.0005).
        decay_steps: the learning rate falls to a tenth after each so many steps.
        noise_steps: descents on the noise, each `step_size` long.
        step_size: of a descent, in 1/255.
        views: draws of t and r in each descent.
        train_noise_steps: descents while the surrogate trains; None for `noise_steps`.
        train_views: draws in each of them; None for `views`.
        warm_start: whether each image's noise goes on from where it was at its last visit, and the
            last pass from there. The paper starts afresh each time (False).
        attack_steps: of the surrogate's adversarial training, each `attack_step_size` long.
        attack_step_size: in 1/255.
        flip: whether views are mirrored; no for handwriting.
    """

    radius: float = 4.0
    surrogate: str = "resnet18"
    train_steps: int = 5000
    batch_size: int = 128
    learning_rate: float = 0.1
    decay_steps: int = 2000
    noise_steps: int = 10
    step_size: float = 1.6
    views: int = 5
    train_noise_steps: int | None = None
    train_views: int | None = None
    warm_start: bool = False
    attack_steps: int = 10
    attack_step_size: float = 0.8
    flip: bool = True

    name: ClassVar[str] = "sem"
    continues: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        # For some thousands of small images. The noise goes on from its last visit, so that one
        # descent a visit is enough; and a small network cannot resist the paper's radius and still
        # learn from so few images: at 4/255 nothing protects (docs/methods.md).
        "cpu": {
            "radius": 2.0,
            "surrogate": "resnet10-w16",
            "train_steps": 2400,
            "decay_steps": 1200,
            "views": 3,
            "train_noise_steps": 1,
            "train_views": 1,
            "warm_start": True,
            "attack_steps": 2,
            "attack_step_size": 2.0,
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_one("train_steps", "batch_size", "decay_steps", "noise_steps", "views")
        if not 0 <= self.radius <= 255:
            raise UsageError(f"Expected a radius of 0 to 255 (in 1/255), got {self.radius}.")

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        batches = Batches(images, job.runtime)
        model, stored = load_surrogate(job), None
        if model is None:
            model, stored = self._train(images, batches, job)
            model.eval().requires_grad_(False)

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            batch = batches[index]
            start = self._start(batch, None if stored is None else stored[index], randomness)
            noise = self._noise(
                model, batch, start, randomness, job, steps=self.noise_steps, views=self.views
            )
            return noise * 255

        return perturb

    def _start(self, batch: Batch, stored: Tensor | None, randomness: torch.Generator) -> Tensor:
        """Return where descents start: where the last visit ended, or anywhere in the budget."""
        if stored is not None:
            return unpack(stored, self.epsilon / 255).to(batch.x.device)
        noise = uniform(batch.x, self.epsilon / 255, randomness)
        return torch.where(batch.grey.view(-1, 1, 1, 1), noise[:, :1], noise)

    def _noise(
        self,
        model: nn.Module,
        batch: Batch,
        start: Tensor,
        randomness: torch.Generator,
        job: Job,
        *,
        steps: int,
        views: int,
    ) -> Tensor:
        def disturb(seen: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            return self._disturb(model, seen, labels, generator, job)

        return minimise(
            model,
            batch,
            start,
            epsilon=self.epsilon / 255,
            step_size=self.step_size / 255,
            steps=steps,
            augmentation=self._augmentation(batch),
            views=views,
            disturb=disturb,
            generator=randomness,
            runtime=job.runtime,
        )

    def _augmentation(self, batch: Batch) -> Augmentation:
        return augmentation_for((batch.x.shape[2], batch.x.shape[3]), flip=self.flip)

    def _disturb(
        self, model: nn.Module, views: Tensor, labels: Tensor, randomness: torch.Generator, job: Job
    ) -> Tensor:
        """Add uniform noise of the radius: the one thing in which SEM differs from REM."""
        return (views + uniform(views, self.radius / 255, randomness)).clamp_(0, 1)

    def _train(self, images: ImageSet, batches: Batches, job: Job) -> tuple[nn.Module, Tensor | None]:
        """Train the surrogate on noisy images; return it, and the noise if starts are warm."""
        runtime = job.runtime
        model = create_model(
            self.surrogate,
            classes=images.classes,
            size=images.size,
            seed=derive(job.seed, "surrogate"),
        )
        model = runtime.place(model)
        optimizer = torch.optim.SGD(model.parameters(), self.learning_rate, momentum=0.9, weight_decay=5e-4)
        stored = None
        if self.warm_start:
            stored = torch.zeros(len(images), 3, *images.size, dtype=torch.int8)
        path, first = job.file("surrogate-checkpoint.safetensors"), 0
        if path and (state := load_checkpoint(path, model=model, optimizer=optimizer)):
            first = int(state[1]["step"])
            stored = state[0].get("noise", stored)
        trained = runtime.distribute(model)
        size = min(self.batch_size, len(images))
        for step in range(first, self.train_steps):
            whole = job.batch(step, count=len(images), size=size)
            index = runtime.share(whole)
            batch, randomness = batches[index], job.random("step", step, runtime.rank)
            runtime.agree(model)  # on what the noise is made for, as a resumed run does
            with frozen(model):
                noise = self._noise(
                    model,
                    batch,
                    self._start(batch, None if stored is None else stored[index], randomness),
                    randomness,
                    job,
                    steps=self.train_noise_steps or self.noise_steps,
                    views=self.train_views or self.views,
                )
                if stored is not None:
                    stored[whole] = runtime.unshare(pack(noise, self.epsilon / 255), size).cpu()
                noise = (noise * 255).round_() / 255  # whole, as it will be delivered
                views = self._augmentation(batch).draw(len(index), images.size, randomness)
                seen = pgd(
                    model,
                    views.apply((batch.x + noise).clamp_(0, 1)),
                    batch.labels,
                    radius=self.radius / 255,
                    step_size=self.attack_step_size / 255,
                    steps=self.attack_steps,
                    generator=randomness,
                    runtime=runtime,
                )
            rate = self.learning_rate * 0.1 ** (step // self.decay_steps)
            training_step(trained, optimizer, seen, batch.labels, rate=rate, runtime=runtime)
            job.progress("training the surrogate", (step + 1) * size, self.train_steps * size)
            if path is not None and job.checkpoint_due(last=step + 1 == self.train_steps):
                save_checkpoint(
                    path,
                    model=model,
                    optimizer=optimizer,
                    tensors={} if stored is None else {"noise": stored},
                    record={"step": step + 1},
                )
        save_surrogate(model, self.surrogate, images, self, job)
        return model, stored
