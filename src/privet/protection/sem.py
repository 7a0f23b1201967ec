"""Stable error-minimizing noise (SEM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from privet.errors import UsageError
from privet.images.augment import Augmentation, augmentation_for
from privet.images.image_set import ImageSet
from privet.learning.attack import frozen, pgd, uniform
from privet.learning.checkpoint import load_checkpoint, save_checkpoint
from privet.learning.train import training_step
from privet.models import create_model
from privet.protection.base import Job, Perturb, Protection
from privet.protection.minimise import minimise, pack, unpack
from privet.protection.surrogate import load_surrogate, save_surrogate
from privet.seeds import derive, generator


@dataclass(frozen=True, kw_only=True)
class SEM(Protection):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting in ("train_steps", "batch_size", "decay_steps", "noise_steps", "views"):
            if getattr(self, setting) < 1:
                raise UsageError(f"{self.name} needs {setting} of at least 1, got {getattr(self, setting)}.")
        if not 0 <= self.radius <= 255:
            raise UsageError(f"Expected a radius of 0 to 255 (in 1/255), got {self.radius}.")

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        model = load_surrogate(images, job) if job.surrogate else None
        stored = None
        if model is None:
            model, stored = self._train(images, job)
        model.eval()
        augmentation = augmentation_for(images.size, flip=self.flip)
        device = job.runtime.device

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            x = images.pixels[index].to(device).float() / 255
            y, grey = images.labels[index].to(device), images.grey[index].to(device)
            start = self._start(x, grey, randomness)
            if stored is not None:
                start = unpack(stored[index], self.epsilon / 255).to(device)
            noise = self._noise(
                model,
                x,
                y,
                start,
                grey,
                augmentation,
                randomness,
                job,
                self.noise_steps,
                self.views,
            )
            return noise * 255

        return perturb

    def _start(self, x: Tensor, grey: Tensor, randomness: torch.Generator) -> Tensor:
        noise = uniform(x, self.epsilon / 255, randomness)
        return torch.where(grey.view(-1, 1, 1, 1), noise[:, :1], noise)

    def _noise(
        self,
        model: nn.Module,
        x: Tensor,
        labels: Tensor,
        start: Tensor,
        grey: Tensor,
        augmentation: Augmentation,
        randomness: torch.Generator,
        job: Job,
        steps: int,
        views: int,
    ) -> Tensor:
        def disturb(views: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
            return self._disturb(model, views, y, generator, job)

        return minimise(
            model,
            x,
            labels,
            start,
            grey=grey,
            epsilon=self.epsilon / 255,
            step_size=self.step_size / 255,
            steps=steps,
            augmentation=augmentation,
            views=views,
            disturb=disturb,
            generator=randomness,
            runtime=job.runtime,
        )

    def _disturb(
        self, model: nn.Module, views: Tensor, labels: Tensor, randomness: torch.Generator, job: Job
    ) -> Tensor:
        """Add uniform noise of the radius: the one thing in which SEM differs from REM."""
        return (views + uniform(views, self.radius / 255, randomness)).clamp_(0, 1)

    def _train(self, images: ImageSet, job: Job) -> tuple[nn.Module, Tensor | None]:
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
        path = job.file("surrogate-checkpoint.safetensors")
        state = load_checkpoint(path, model=model, optimizer=optimizer) if path else None
        first = int(state[1]["step"]) if state else 0
        stored = None
        if self.warm_start:
            stored = torch.zeros(len(images), 3, *images.size, dtype=torch.int8, device=runtime.device)
            if state:
                stored.copy_(state[0]["noise"])
        trained = runtime.distribute(model)
        augmentation = augmentation_for(images.size, flip=self.flip)
        pixels, labels = images.pixels.to(runtime.device), images.labels.to(runtime.device)
        greys = images.grey.to(runtime.device)
        batch = min(self.batch_size, len(images))
        per_epoch = len(images) // batch
        steps, views = self.train_noise_steps or self.noise_steps, self.train_views or self.views
        epoch, order = -1, torch.empty(0)
        for step in range(first, self.train_steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = torch.randperm(len(images), generator=generator(job.seed, "order", epoch))
                order = order.to(runtime.device)
            offset = step % per_epoch * batch
            index = runtime.share(order[offset : offset + batch])
            x, y, grey = pixels[index].float() / 255, labels[index], greys[index]
            randomness = job.random("step", step, runtime.rank)
            with frozen(model):
                start = self._start(x, grey, randomness)
                if stored is not None:
                    start = unpack(stored[index], self.epsilon / 255)
                noise = self._noise(model, x, y, start, grey, augmentation, randomness, job, steps, views)
                if stored is not None:
                    stored[index] = pack(noise, self.epsilon / 255)
                noise = (noise * 255).round_() / 255  # delivered noise is whole, so learn from whole noise
                seen = (x + noise).clamp_(0, 1)
                seen = augmentation.draw(len(index), images.size, randomness).apply(seen)
                seen = pgd(
                    model,
                    seen,
                    y,
                    radius=self.radius / 255,
                    step_size=self.attack_step_size / 255,
                    steps=self.attack_steps,
                    generator=randomness,
                    runtime=runtime,
                )
            rate = self.learning_rate * 0.1 ** (step // self.decay_steps)
            training_step(trained, optimizer, seen, y, rate=rate, runtime=runtime)
            job.progress("training the surrogate", (step + 1) * batch, self.train_steps * batch)
            if path is not None and job.checkpoint_due():
                save_checkpoint(
                    path,
                    model=model,
                    optimizer=optimizer,
                    tensors={} if stored is None else {"noise": stored},
                    record={"step": step + 1},
                )
        save_surrogate(model, self.surrogate, images, self, job)
        return model, stored


SEM.presets = {
    "paper": {},
    "cpu": {},
}
