"""Error-minimizing noise (EM)."""

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
from privet.learning.attack import frozen
from privet.learning.checkpoint import load_checkpoint, save_checkpoint
from privet.learning.chunks import CHUNK
from privet.learning.job import Job
from privet.learning.train import training_step
from privet.models import create_model
from privet.protection.base import Bounded, Perturb
from privet.protection.minimise import Batch, Batches, Confine, minimise, pack, unpack
from privet.protection.surrogate import load_surrogate, save_surrogate
from privet.seeds import derive

MODES = ("sample", "class")


@dataclass(frozen=True, kw_only=True)
class EM(Bounded):
    """Error-minimizing noise (Huang et al., arXiv 2101.04898): the first unlearnable examples.

    Surrogate and noise lower the same loss in turn: min over f, min over |δ| <= ε of CE(f(x + δ), y).
    A round is a few surrogate steps on noisy images and one pass that improves the stored noise of
    every image (or of every class) from where it was. Rounds end when the surrogate has learned the
    noisy images. There is no augmentation, by the authors' design, and no defence against
    adversarial training.

    Deviations: stored noise is kept in steps of ε/127; in class-wise mode every image contributes,
    where the authors use a fifth of them. With the surrogate of an earlier run, further images (or, class-wise,
    their classes) get noise of their own from zero.

    Attributes:
        mode: "sample" (each image its noise) or "class" (one noise for each class; robust to
            omission but easy to find and to subtract).
        surrogate: architecture of f.
        train_steps: surrogate steps a round.
        batch_size: images a surrogate step.
        learning_rate: of SGD (momentum 0.9, weight decay 0.0005).
        noise_steps: descents on the stored noise a round, each `step_size` long; class-wise 1.
        step_size: of a descent, in 1/255.
        stop_error: rounds end when the surrogate misses less than this share of the noisy images.
        max_rounds: or after so many rounds.
        views: random views averaged in each descent, one of which each surrogate step sees; 0, as
            published, for the image itself. Noise of small networks needs them: without, a learner
            that augments its images does not see the noise at all (docs/methods.md).
        flip: whether views are mirrored; no for handwriting.
    """

    mode: str = "sample"
    surrogate: str = "resnet18"
    train_steps: int = 10
    batch_size: int = 512
    learning_rate: float = 0.1
    noise_steps: int = 20
    step_size: float = 0.8
    stop_error: float = 0.01
    max_rounds: int = 100
    views: int = 0
    flip: bool = True

    name: ClassVar[str] = "em"
    continues: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        # For some thousands of small images: about one epoch of the surrogate a round.
        "cpu": {
            "surrogate": "resnet10-w16",
            "train_steps": 40,
            "batch_size": 128,
            "noise_steps": 2,
            "stop_error": 0.0,
            "max_rounds": 25,
            "views": 1,
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise UsageError(f"Unknown mode {self.mode!r}; expected {' or '.join(MODES)}.")
        self.need_one("train_steps", "batch_size", "noise_steps", "max_rounds")

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        batches, surrogate = Batches(images, job.runtime), load_surrogate(job)
        steps = self.crossing(self.step_size)  # where there are no rounds whose descents add up
        if surrogate is not None and self.mode == "sample":

            def fresh(index: Tensor, randomness: torch.Generator) -> Tensor:
                batch = batches[index]
                noise = self._improve(surrogate, batch, torch.zeros_like(batch.x), steps, randomness, job)
                return noise * 255

            return fresh
        if surrogate is None:
            stored = self._train(images, batches, job)
        else:
            stored = self._begin(images)
            for round_ in range(steps):
                self._improve_stored(surrogate, images, batches, stored, round_, "perturbing", job)

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            return unpack(stored[self._rows(images, index)], self.epsilon)

        return perturb

    def _train(self, images: ImageSet, batches: Batches, job: Job) -> Tensor:
        """Run rounds until the surrogate has learned the noise; return it, (rows, 3, height, width)."""
        runtime = job.runtime
        model = create_model(
            self.surrogate,
            classes=images.classes,
            size=images.size,
            seed=derive(job.seed, "surrogate"),
        )
        model = runtime.place(model)
        optimizer = torch.optim.SGD(model.parameters(), self.learning_rate, momentum=0.9, weight_decay=5e-4)
        stored = self._begin(images)
        first, errors = 0, list[float]()
        path = job.file("surrogate-checkpoint.safetensors")
        if path and (state := load_checkpoint(path, model=model, optimizer=optimizer)):
            stored, errors = state[0]["noise"], list(state[1]["errors"])
            first = len(errors)
        trained = runtime.distribute(model)
        for round_ in range(first, self.max_rounds):
            if errors and errors[-1] < self.stop_error:
                break
            self._train_surrogate(trained, optimizer, images, batches, stored, round_, job)
            runtime.agree(model)  # on class-wise noise, and on when to stop
            words = f"round {round_ + 1}: improving the noise"
            errors.append(self._improve_stored(model, images, batches, stored, round_, words, job))
            last = round_ + 1 == self.max_rounds or errors[-1] < self.stop_error
            if path is not None and job.checkpoint_due(last):
                save_checkpoint(
                    path,
                    model=model,
                    optimizer=optimizer,
                    tensors={"noise": stored},
                    record={"errors": errors},
                )
        job.facts.update(rounds=len(errors), surrogate_error=errors[-1])
        save_surrogate(model, self.surrogate, images, self, job)
        return stored

    def _begin(self, images: ImageSet) -> Tensor:
        """Return the noise that the first round begins with, packed: none."""
        count = images.classes if self.mode == "class" else len(images)
        return torch.zeros(count, 3, *images.size, dtype=torch.int8)

    def _train_surrogate(
        self,
        trained: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: ImageSet,
        batches: Batches,
        stored: Tensor,
        round_: int,
        job: Job,
    ) -> None:
        size = min(self.batch_size, len(images))
        for step in range(round_ * self.train_steps, (round_ + 1) * self.train_steps):
            index = job.runtime.share(job.batch(step, count=len(images), size=size))
            batch, noise = batches[index], unpack(stored[self._rows(images, index)], self.epsilon / 255)
            seen = (batch.x + noise.to(batch.x.device)).clamp_(0, 1)
            if self.views:
                randomness = job.random("views", step, job.runtime.rank)
                augmentation = augmentation_for(images.size, flip=self.flip)
                seen = augmentation.draw(len(index), images.size, randomness).apply(seen)
            training_step(
                trained, optimizer, seen, batch.labels, rate=self.learning_rate, runtime=job.runtime
            )

    def _improve_stored(
        self,
        model: nn.Module,
        images: ImageSet,
        batches: Batches,
        stored: Tensor,
        round_: int,
        words: str,
        job: Job,
    ) -> float:
        """Do one pass over all images in place; return the surrogate's error on noisy images."""
        runtime, epsilon = job.runtime, self.epsilon / 255
        alone = self.mode == "class" or runtime.world == 1  # class-wise noise changes with every chunk
        steps = 1 if self.mode == "class" else self.noise_steps
        wrong = torch.zeros((), device=runtime.device)
        for chunk, start in enumerate(range(0, len(images), CHUNK)):
            index = torch.arange(start, min(start + CHUNK, len(images)))
            if not alone and chunk % runtime.world != runtime.rank:
                stored[index] = 0  # another process's part, added below
                continue
            noise = unpack(stored[self._rows(images, index)], epsilon).to(runtime.device)
            batch, randomness = batches[index], job.random("noise", round_, chunk)
            with frozen(model):
                noise = self._improve(model, batch, noise, steps, randomness, job)
                with torch.no_grad(), runtime.autocast():
                    wrong += (model((batch.x + noise).clamp_(0, 1)).argmax(1) != batch.labels).sum()
            if self.mode == "class":
                membership = F.one_hot(batch.labels, len(stored)).float()  # (batch, classes)
                members = membership.sum(0).view(-1, 1, 1, 1)
                mean = (membership.T @ noise.flatten(1)).view(stored.shape) / members.clamp(min=1)
                stored.copy_(torch.where(members.cpu() > 0, pack(mean, epsilon).cpu(), stored))
            else:
                stored[index] = pack(noise, epsilon).cpu()
            job.progress(words, start + len(index), len(images))
        if not alone:
            stored.copy_(runtime.sum(stored.to(runtime.device)).cpu())
            wrong = runtime.sum(wrong)
        return float(wrong) / len(images)

    def _improve(
        self,
        model: nn.Module,
        batch: Batch,
        noise: Tensor,
        steps: int,
        randomness: torch.Generator,
        job: Job,
    ) -> Tensor:
        size = batch.x.shape[2], batch.x.shape[3]
        return minimise(
            model,
            batch,
            noise,
            epsilon=self.epsilon / 255,
            step_size=self.step_size / 255,
            steps=steps,
            augmentation=augmentation_for(size, flip=self.flip) if self.views else None,
            views=max(1, self.views),
            confine=self._confine(),
            generator=randomness,
            runtime=job.runtime,
        )

    def _confine(self) -> Confine | None:
        """Return what keeps the noise to a part of all directions; here nothing does."""
        return None

    def _rows(self, images: ImageSet, index: Tensor) -> Tensor:
        """Return which row of the stored noise belongs to each of these images."""
        return images.labels[index] if self.mode == "class" else index
