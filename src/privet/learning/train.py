"""How a learner learns: standard or adversarial training on an image set, judged on clean images.

The image set lives on the device as uint8; a batch is one gather there, so the processor never
waits for images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.errors import InputError, UsageError
from privet.files import sha256
from privet.images.augment import augmentation_for
from privet.images.image_set import ImageSet
from privet.learning.attack import frozen, pgd
from privet.learning.checkpoint import load_checkpoint, save_checkpoint
from privet.learning.hardest import hardest
from privet.learning.runtime import Runtime
from privet.models import create_model, load_backbone, placeless
from privet.models.projection import PREFIX
from privet.progress import Progress, silent
from privet.seeds import derive, generator

SCHEDULES = ("cosine", "step")
OPTIMISERS = ("sgd", "adamw")
# Of distillation (Hinton et al., arXiv 1503.02531), as Nasty Teacher (Ma et al., arXiv 2105.07381) tries it.
TEMPERATURE, IMITATION = 4.0, 0.9
EVALUATION_BATCH = 512
# What the names of transformers have in them, timm's too; all that `transformers:` loads is taken for one.
TRANSFORMERS = ("vit", "deit", "swin", "beit", "transformers:")


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What an unauthorised party trains, and how.

    Attributes:
        architecture: a name for `create_model`; with `simclr:` before it, it learns without labels, and a
            linear probe on its features with them (`privet.learning.contrastive`).
        epochs: passes over the image set.
        batch_size: images a step; the last, smaller batch of an epoch is left out.
        optimiser: "sgd" (momentum 0.9) or "adamw"; None for the network's usual one: AdamW where the name has one of
            `TRANSFORMERS` in it, else SGD. Without labels AdamW is for those alone.
        learning_rate: None for the optimiser's usual one (AdamW 0.001, SGD 0.1; SGD without labels 0.5 for batches
            of at least 512, and in proportion for smaller ones).
        weight_decay: None likewise (AdamW 0.05, SGD 0.0005, SGD without labels 0.0001).
        schedule: "cosine" to zero, or "step": a tenth after 40 % and after 80 % of the steps, as in
            the evaluation of the SEM paper. Both rise linearly over the first 5 %.
        radius: of adversarial training, L-infinity, in 1/255; 0 is standard training.
        attack_steps: of its PGD, each a fifth of the radius (twice the radius over the steps if
            there are fewer than ten, so that every point of the ball can be reached).
        distort: whether views are distorted as well (`privet.images.distort`).
        draws: distortions of each image, of which the one with the highest loss is learned.
        hard_share: share of the epochs, from the first, in which there are so many; later there is one.
        flip: whether views are mirrored; no for handwriting.
        weights: safetensors to start from (fine-tuning), or None for random weights.
    """

    architecture: str = "resnet18"
    epochs: int = 60
    batch_size: int = 128
    optimiser: str | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    schedule: str = "cosine"
    radius: float = 0.0
    attack_steps: int = 10
    distort: bool = False
    draws: int = 1
    hard_share: float = 1.0
    flip: bool = True
    weights: Path | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UsageError(f"Unknown schedule {self.schedule!r}; expected {' or '.join(SCHEDULES)}.")
        if self.optimiser not in (None, *OPTIMISERS):
            raise UsageError(f"Unknown optimiser {self.optimiser!r}; expected {' or '.join(OPTIMISERS)}.")
        if self.optimiser == "adamw" and self.architecture.startswith(PREFIX) and not self.transformer:
            raise UsageError(
                f"{self.architecture} learns without labels, with SGD alone; leave the optimiser out."
            )
        if not (self.learning_rate is None or 0 < self.learning_rate < math.inf) or not (
            self.weight_decay is None or 0 <= self.weight_decay < math.inf
        ):
            raise UsageError(
                "A learner needs a positive learning rate and a weight decay of at least 0, got "
                f"{self.learning_rate} and {self.weight_decay}."
            )
        if self.epochs < 1 or self.batch_size < 2:
            raise UsageError(
                f"A learner needs at least 1 epoch and batches of 2, got {self.epochs} and {self.batch_size}."
            )
        if not 0 <= self.radius <= 255 or self.attack_steps < 1:
            raise UsageError(
                f"Adversarial training needs a radius of 0 to 255 (in 1/255) and at least 1 step, got "
                f"{self.radius} and {self.attack_steps}."
            )
        if self.distort and self.architecture.startswith(PREFIX):
            raise UsageError(
                f"{self.architecture} learns without labels, and which distortion is the hardest is a question of "
                "labels. Leave the recovery ueraser out, or the learner."
            )
        if self.draws < 1 or not 0 <= self.hard_share <= 1:
            raise UsageError(
                f"Distortion needs at least 1 draw, and a share of the epochs from 0 to 1; got {self.draws} and "
                f"{self.hard_share}."
            )

    def record(self) -> dict[str, Any]:
        """Return what a training depends on, as JSON values: weights and pretrained networks by hash, not by place.

        Raises:
            InputError: there is no such weights file.
        """
        if self.weights is not None and not self.weights.is_file():
            raise InputError(f"There is no weights file {self.weights}.")
        return {
            **asdict(self),
            "architecture": placeless(self.architecture),
            "weights": sha256(self.weights.read_bytes()) if self.weights else None,
        }

    def for_versions(self, count: int) -> Learner:
        """Return it with so much fewer epochs that on `count` versions of each image it takes as many steps."""
        return replace(self, epochs=max(1, round(self.epochs / count)))

    @property
    def transformer(self) -> bool:
        """Whether its network is one, by its name."""
        return any(word in self.architecture for word in TRANSFORMERS)

    @property
    def adamw(self) -> bool:
        """Whether it trains with AdamW, and else with SGD."""
        return (self.optimiser or ("adamw" if self.transformer else "sgd")) == "adamw"

    @property
    def rate(self) -> float:
        """Its highest learning rate, with labels."""
        return self.learning_rate or (1e-3 if self.adamw else 0.1)

    @property
    def step_size(self) -> float:
        """Of a step of the attack, in 1/255."""
        return self.radius * max(0.2, 2 / self.attack_steps)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of a learner's history; accuracies are shares of 1."""

    epoch: int
    loss: float
    train_accuracy: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What came of a training; `accuracy` is on clean images after the last epoch."""

    model: nn.Module
    history: tuple[Epoch, ...] = field(repr=False)

    @property
    def accuracy(self) -> float:
        return self.history[-1].accuracy

    @property
    def best(self) -> Epoch:
        """The first epoch with the highest accuracy on clean images: what early stopping could reach."""
        return max(self.history, key=lambda epoch: epoch.accuracy)

    def record(self) -> dict[str, Any]:
        """Return what is kept of a training beside the network, as JSON values."""
        return {
            "last": self.accuracy,
            "best": self.best.accuracy,
            "best_epoch": self.best.epoch,
            "history": [asdict(epoch) for epoch in self.history],
        }


def learn(
    train: ImageSet,
    test: ImageSet,
    learner: Learner,
    *,
    runtime: Runtime,
    seed: int = 0,
    answers: Tensor | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> Learned:
    """Train a learner and measure it on clean images after every epoch.

    Args:
        train: the images it learns from.
        test: clean images with the same classes, in the same order of classes.
        learner: the network and how it is trained.
        runtime: where.
        seed: of weights, order, views and attacks; the same seed gives the same learner.
        answers: another network's logits for the training images, (images, classes), which the learner imitates
            beside the labels (distillation), or None.
        checkpoint: a file to keep after each epoch and to go on from, or None.
        progress: told about images seen.

    Raises:
        InputError: the sets do not fit each other, or are empty, or there is no such weights file.
        OutputError: the checkpoint is another training's, or damaged.
        UsageError: answers of another shape, or for a learner without labels.
    """
    _check(train, test, learner)
    if answers is not None and (
        answers.shape != (len(train), train.classes) or learner.architecture.startswith(PREFIX)
    ):
        raise UsageError(
            f"Expected answers ({len(train)}, {train.classes}) for a learner with labels, got {tuple(answers.shape)} "
            f"for {learner.architecture}."
        )
    if learner.architecture.startswith(PREFIX):
        from privet.learning.contrastive import learn_contrastive  # which uses this module

        return learn_contrastive(
            train, test, learner, runtime=runtime, seed=seed, checkpoint=checkpoint, progress=progress
        )
    origin = origin_of(train, test, learner, seed, answers) if checkpoint is not None else {}
    model, optimizer, rate, history = begin(
        train, learner, runtime=runtime, seed=seed, checkpoint=checkpoint, origin=origin
    )
    trained = runtime.distribute(model)

    pixels, labels = runtime.hold(train.pixels), runtime.hold(train.labels)
    augmentation = augmentation_for(train.size, flip=learner.flip)
    batch = min(learner.batch_size, len(train))
    steps = len(train) // batch
    for epoch in range(len(history), learner.epochs):
        order = torch.randperm(len(train), generator=generator(seed, "order", epoch))
        order = order.to(runtime.device)
        randomness = generator(seed, "views", epoch, runtime.rank, device=runtime.device)
        draws = learner.draws if epoch < round(learner.hard_share * learner.epochs) else 1
        totals = torch.zeros(3, device=runtime.device)  # loss, correct, seen
        with runtime.drawing(derive(seed, "network", epoch, runtime.rank)):
            for step in range(steps):
                index = runtime.share(order[step * batch : (step + 1) * batch])
                y = runtime.take(labels, index)
                views = augmentation.draw(len(index), train.size, randomness)
                x = views.apply(runtime.take(pixels, index)).float() / 255
                with frozen(model):
                    if learner.distort:
                        x = hardest(model, x, y, draws=draws, generator=randomness, runtime=runtime)
                    x = pgd(
                        model,
                        x,
                        y,
                        radius=learner.radius / 255,
                        step_size=learner.step_size / 255,
                        steps=learner.attack_steps,
                        generator=randomness,
                        runtime=runtime,
                    )
                fraction = (epoch * steps + step) / (learner.epochs * steps)
                loss, correct = training_step(
                    trained,
                    optimizer,
                    x,
                    y,
                    rate=rate * schedule(learner.schedule, fraction),
                    answers=None if answers is None else runtime.take(answers, index),
                    runtime=runtime,
                )
                totals += torch.stack((loss * len(index), correct, correct.new_tensor(len(index))))
                progress("learning", (epoch * steps + step + 1) * batch, learner.epochs * steps * batch)
        runtime.agree(model)
        total_loss, correct_, seen = runtime.sum(totals).tolist()
        history.append(
            Epoch(
                epoch=epoch + 1,
                loss=total_loss / seen if math.isfinite(total_loss) else float("1e30"),
                train_accuracy=correct_ / seen,
                accuracy=accuracy(model, test, runtime=runtime),
            )
        )
        keep(checkpoint, model, optimizer, history, origin=origin, runtime=runtime)
    return Learned(model=model.eval(), history=tuple(history))


def origin_of(
    train: ImageSet, test: ImageSet, learner: Learner, seed: int, answers: Tensor | None = None
) -> dict[str, Any]:
    """Return what tells a training's checkpoint from another's, as JSON values."""
    told = None if answers is None else sha256(answers.detach().cpu().float().numpy().tobytes())
    return {**learner.record(), "seed": seed, "train": train.digest, "test": test.digest, "answers": told}


def begin(
    train: ImageSet,
    learner: Learner,
    *,
    runtime: Runtime,
    seed: int,
    checkpoint: Path | None,
    origin: Mapping[str, Any],
) -> tuple[nn.Module, torch.optim.Optimizer, float, list[Epoch]]:
    """Return a learner's network, its optimiser, its highest rate and its history, as `keep` left them if it did.

    Raises:
        OutputError: the checkpoint is of another origin, or damaged.
    """
    model = create_model(
        learner.architecture, classes=train.classes, size=train.size, seed=derive(seed, "weights")
    )
    if learner.weights is not None:
        load_backbone(learner.weights, model)
    model = runtime.place(model)
    optimizer, rate = make_optimizer(model, learner)
    history: list[Epoch] = []
    if checkpoint is not None and (
        state := load_checkpoint(checkpoint, model=model, optimizer=optimizer, origin=origin)
    ):
        history = [Epoch(**epoch) for epoch in state[1]["history"]]
    return model, optimizer, rate, history


def keep(
    checkpoint: Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: Sequence[Epoch],
    *,
    origin: Mapping[str, Any],
    runtime: Runtime,
) -> None:
    """Write what `begin` goes on from, if there is a file for it."""
    if checkpoint is not None and runtime.rank == 0:
        record = {"history": [asdict(line) for line in history], "origin": origin}
        save_checkpoint(checkpoint, model=model, optimizer=optimizer, record=record)


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet, *, runtime: Runtime) -> float:
    """Return the share of images that the network labels rightly, views and attacks aside."""
    correct = 0
    with frozen(model), runtime.autocast():
        for start in range(0, len(images), EVALUATION_BATCH):
            x = images.pixels[start : start + EVALUATION_BATCH].to(runtime.device)
            y = images.labels[start : start + EVALUATION_BATCH].to(runtime.device)
            correct += int((model(x.float() / 255).argmax(1) == y).sum())
    return correct / len(images)


def make_optimizer(model: nn.Module, learner: Learner) -> tuple[torch.optim.Optimizer, float]:
    """Return the optimiser of a learner and its highest learning rate."""
    rate, decay = learner.rate, learner.weight_decay
    if learner.adamw:
        return torch.optim.AdamW(
            model.parameters(), rate, weight_decay=0.05 if decay is None else decay
        ), rate
    optimizer = torch.optim.SGD(
        model.parameters(), rate, momentum=0.9, weight_decay=5e-4 if decay is None else decay
    )
    return optimizer, rate


def schedule(name: str, fraction: float) -> float:
    """Return the learning rate, as a share of the highest, after this fraction of all steps."""
    warmup = min(1.0, fraction / 0.05 + 0.01)
    if name == "step":
        return warmup * 0.1 ** ((fraction >= 0.4) + (fraction >= 0.8))
    return warmup * 0.5 * (1 + math.cos(math.pi * fraction))


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    *,
    rate: float,
    answers: Tensor | None = None,
    runtime: Runtime,
) -> tuple[Tensor, Tensor]:
    """Do one step of the optimiser; return the mean loss and the number of right answers.

    With another network's `answers` (logits), the loss is that of distillation.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    with torch.enable_grad(), runtime.autocast():
        logits = model(x).float()
        loss = F.cross_entropy(logits, labels)
        if answers is not None:
            soft = F.cross_entropy(logits / TEMPERATURE, F.softmax(answers / TEMPERATURE, dim=1))
            loss = (1 - IMITATION) * loss + IMITATION * TEMPERATURE**2 * soft
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    # Without it a single bad batch ends a network that has no batch norm.
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def _check(train: ImageSet, test: ImageSet, learner: Learner) -> None:
    if len(train) < 2 or len(test) < 1:
        raise InputError(
            f"A learner needs at least 2 training images and 1 test image, got {len(train)} and {len(test)}."
        )
    if train.class_names != test.class_names:
        raise InputError(
            f"Training and test images must have the same classes, got {list(train.class_names)} and "
            f"{list(test.class_names)}."
        )
    if train.size != test.size:
        raise InputError(f"Training images are {train.size}, test images {test.size}; open both at one size.")
