"""Contrastive error-minimizing noise (UCL, also known as contrastive poisoning)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.errors import UsageError
from privet.images.contrastive_views import ContrastiveViews
from privet.images.image_set import ImageSet
from privet.learning.attack import frozen
from privet.learning.checkpoint import load_checkpoint, save_checkpoint
from privet.learning.contrastive import contrastive_loss, contrastive_step
from privet.learning.job import Job
from privet.learning.train import schedule
from privet.models import create_model
from privet.models.projection import PREFIX
from privet.protection.base import Bounded, Perturb
from privet.protection.minimise import Batch, Batches, pack, unpack
from privet.protection.surrogate import load_surrogate, save_surrogate
from privet.seeds import derive, generator


class Noise(NamedTuple):
    """Noise, and to which images it belongs.

    Attributes:
        stored: as `pack` returns it, (rows, 3, height, width).
        rows: which row belongs to each image, (images,).
        mode: "class" or "sample": what a row is for.
    """

    stored: Tensor
    rows: Tensor
    mode: str


@dataclass(frozen=True, kw_only=True)
class UCL(Bounded):
    """Contrastive poisoning (He, Zha and Katabi, arXiv 2202.11202): noise against learners without labels.

    Surrogate and noise lower the same contrastive loss in turn, by SimCLR: min over f, min over |δ| <= ε of
    NT-Xent(f(t(x + δ)), f(t'(x + δ))), t and t' being strong random views. Noise that survives the views gives each
    image away, so the encoder need not learn what the image shows.

    First one pattern for each class is found, then, from there and with a fresh surrogate, one for each
    image, which is stronger against contrastive learners; with no rounds of the latter the noise stays
    class-wise, which also works against learners with labels.

    Deviations: images are dealt to noise batches anew in each pass; stored noise is kept in steps of ε/127;
    gradients of the surrogate are clipped, as everywhere in this package; views as `ContrastiveViews` says. With
    the surrogate of an earlier run, further images get noise of their own from a random start.

    Attributes:
        surrogate: architecture of f; its last layer becomes a projection head.
        class_rounds: rounds on class-wise noise.
        class_steps: surrogate steps, and batches whose noise descends once (or all, if there are fewer), in each.
        rounds: rounds on sample-wise noise; 0 for class-wise noise.
        train_steps: surrogate steps in each of them; the noise of every image then descends.
        batch_size: images a step, of which each meets the others.
        learning_rate: of SGD (momentum 0.9, weight decay 0.0001), falling to zero over the rounds.
        noise_steps: descents on an image's noise a round, each `step_size` long.
        step_size: of a descent, in 1/255.
        flip: whether views are mirrored; no for handwriting.
    """

    surrogate: str = "resnet18"
    class_rounds: int = 1000
    class_steps: int = 20
    rounds: int = 200
    train_steps: int = 97
    batch_size: int = 512
    learning_rate: float = 0.5
    noise_steps: int = 5
    step_size: float = 0.8
    flip: bool = True

    name: ClassVar[str] = "ucl"
    continues: ClassVar[bool] = True
    labelled: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        # For some thousands of small images.
        "cpu": {
            "surrogate": "resnet10-w16",
            "class_rounds": 20,
            "rounds": 20,
            "train_steps": 20,
            "batch_size": 256,
            "learning_rate": 0.25,
            "noise_steps": 2,
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_one("class_steps", "train_steps", "batch_size", "noise_steps")
        if min(self.class_rounds, self.rounds) < 0 or self.class_rounds + self.rounds < 1:
            raise UsageError(
                f"{self.name} needs at least 1 round, class-wise or sample-wise, got {self.class_rounds} and "
                f"{self.rounds}."
            )

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        batches, surrogate = Batches(images, job.runtime), load_surrogate(job, contrastive=True)
        if surrogate is not None:
            noise = self._start(images, "sample", job)
            steps = self.crossing(self.step_size)
            self._improve(surrogate, batches, noise, 0, steps, "perturbing", job)
        else:
            noise = self._start(images, "class" if self.class_rounds else "sample", job)
            if self.class_rounds:
                self._alternate(images, batches, noise, job)
                noise = Noise(noise.stored[images.labels], torch.arange(len(images)), "sample")
            if self.rounds:
                self._alternate(images, batches, noise, job)

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            return unpack(noise.stored[index], self.epsilon)

        return perturb

    def _start(self, images: ImageSet, mode: str, job: Job) -> Noise:
        """Return uniform random noise."""
        rows = images.labels if mode == "class" else torch.arange(len(images))
        shape = (images.classes if mode == "class" else len(images), 3, *images.size)
        random = generator(job.seed, "start")
        return Noise(torch.randint(-127, 128, shape, generator=random, dtype=torch.int8), rows, mode)

    def _alternate(self, images: ImageSet, batches: Batches, noise: Noise, job: Job) -> None:
        """Train a fresh surrogate and improve the noise, in place, in turn."""
        name, mode = PREFIX + self.surrogate, noise.mode
        model = create_model(
            name, classes=images.classes, size=images.size, seed=derive(job.seed, "surrogate", mode)
        )
        model = job.runtime.place(model)
        optimizer = torch.optim.SGD(model.parameters(), self.learning_rate, momentum=0.9, weight_decay=1e-4)
        path, losses = job.file(f"{mode}-checkpoint.safetensors"), list[float]()
        if path and (state := load_checkpoint(path, model=model, optimizer=optimizer)):
            noise.stored.copy_(state[0]["noise"])
            losses = list(state[1]["losses"])
        trained = job.runtime.distribute(model)
        rounds, steps = (self.class_rounds, 1) if mode == "class" else (self.rounds, self.noise_steps)
        for round_ in range(len(losses), rounds):
            words = f"{mode}-wise round {round_ + 1} of {rounds}"
            losses.append(self._train(trained, optimizer, batches, noise, round_, rounds, words, job))
            job.runtime.agree(model)  # on what every image's noise is made for
            self._improve(model, batches, noise, round_, steps, words, job)
            last = round_ + 1 == rounds
            if path is not None and job.checkpoint_due(last):
                save_checkpoint(
                    path,
                    model=model,
                    optimizer=optimizer,
                    tensors={"noise": noise.stored},
                    record={"losses": losses},
                )
        job.facts[f"{mode}_wise_loss"] = losses[-1]
        save_surrogate(model, name, images, self, job)

    def _train(
        self,
        trained: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        noise: Noise,
        round_: int,
        rounds: int,
        words: str,
        job: Job,
    ) -> float:
        """Do a round's steps of the surrogate; return their mean loss."""
        steps = self.class_steps if noise.mode == "class" else self.train_steps
        size = min(self.batch_size, len(noise.rows))
        total = torch.zeros((), device=job.runtime.device)
        for step in range(round_ * steps, (round_ + 1) * steps):
            index = job.runtime.share(job.batch(step, noise.mode, count=len(noise.rows), size=size))
            batch, randomness = batches[index], job.random("views", noise.mode, step, job.runtime.rank)
            delta = unpack(noise.stored[noise.rows[index]], self.epsilon / 255).to(batch.x.device)
            total += contrastive_step(
                trained,
                optimizer,
                self._views(batch, delta, randomness),
                rate=self.learning_rate * schedule("cosine", step / (rounds * steps)),
                runtime=job.runtime,
            )
            job.progress(f"{words}: training the surrogate", step % steps + 1, steps)
        return float(job.runtime.sum(total)) / steps / job.runtime.world

    def _improve(
        self,
        model: nn.Module,
        batches: Batches,
        noise: Noise,
        round_: int,
        steps: int,
        words: str,
        job: Job,
    ) -> None:
        """Lower the loss of a frozen surrogate, in place: one pass over all noise, or over some batches' classes.

        Batches are dealt at random, as an image needs others to differ from: in an image set's own order
        they would all be of one class.
        """
        runtime, epsilon = job.runtime, self.epsilon / 255
        random = generator(job.seed, "deal", noise.mode, round_)
        order = torch.randperm(len(noise.rows), generator=random)
        deals = order.tensor_split(math.ceil(len(order) / self.batch_size))
        in_turn = noise.mode == "class"  # it changes with every batch, so that one process finds it
        if in_turn:
            deals = deals[: self.class_steps]
        if in_turn and runtime.rank > 0:
            deals = ()
            noise.stored.zero_()
        for number, index in enumerate(deals):
            if not in_turn and number % runtime.world != runtime.rank:
                noise.stored[index] = 0  # another process's part, added below
                continue
            batch, randomness = batches[index], job.random("noise", noise.mode, round_, number)
            # Which rows of noise the batch has, and which of these belongs to each of its images.
            rows, member = torch.unique(noise.rows[index], return_inverse=True)
            delta = unpack(noise.stored[rows], epsilon).to(runtime.device)
            members = F.one_hot(member, len(rows)).float().to(runtime.device)  # (batch, rows)
            with frozen(model):
                for _ in range(steps):
                    gradient = self._gradient(model, batch, delta[member], randomness, job)
                    # A product, as a scattered sum would add in no fixed order.
                    gradient = (members.T @ gradient.flatten(1)).view(delta.shape)
                    delta = (delta - self.step_size / 255 * gradient.sign()).clamp(-epsilon, epsilon)
            noise.stored[rows] = pack(delta, epsilon).cpu()
            job.progress(words, number + 1, len(deals))
        if runtime.world > 1:
            noise.stored.copy_(runtime.sum(noise.stored.to(runtime.device)).cpu())

    def _gradient(
        self, model: nn.Module, batch: Batch, delta: Tensor, randomness: torch.Generator, job: Job
    ) -> Tensor:
        """Return the gradient of the loss with respect to each image's noise."""
        delta = delta.detach().requires_grad_()
        with torch.enable_grad():
            loss = self._loss(model, self._views(batch, delta, randomness), delta, batch.labels, job)
        return torch.autograd.grad(loss, delta)[0]

    def _loss(self, model: nn.Module, views: Tensor, delta: Tensor, labels: Tensor, job: Job) -> Tensor:
        """Return what the noise lowers."""
        return contrastive_loss(model, views, runtime=job.runtime)

    def _views(self, batch: Batch, delta: Tensor, randomness: torch.Generator) -> Tensor:
        """Return two views of every noisy image, (2 * batch, 3, height, width)."""
        grey = batch.grey.view(-1, 1, 1, 1)
        delta = torch.where(grey, delta.mean(1, keepdim=True), delta)  # as it will be delivered
        seen = (batch.x + delta).clamp(0, 1)
        size = seen.shape[2], seen.shape[3]
        return ContrastiveViews(self.flip).draw(2 * len(seen), size, randomness).apply(seen)
