"""Points on the way of a network's training, at which gradients are matched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from privet.images.augment import augmentation_for
from privet.images.image_set import ImageSet
from privet.learning.checkpoint import load_checkpoint, part, save_checkpoint
from privet.learning.job import Job
from privet.learning.train import Learner, make_optimizer, schedule, training_step
from privet.protection.matching import squared_norm, weight_gradient
from privet.seeds import generator

SIGNAL_BATCHES = 8  # that the mean gradient at a point is estimated from
FLOOR = 0.1  # of the mean over points: one whose gradient has vanished must not decide alone
LATE = 0.75  # of the steps


@dataclass(frozen=True, kw_only=True)
class Point:
    """A network at one moment of its training.

    Attributes:
        state: its weights and statistics by the names of `state_dict`, on the processor.
        scale: squared norm of the mean gradient of the original images there, and a floor.
        late: whether three quarters of the training are over.
    """

    state: dict[str, Tensor]
    scale: float
    late: bool


def follow(
    model: nn.Module,
    learner: Learner,
    images: ImageSet,
    originals: ImageSet,
    *,
    count: int,
    name: str,
    job: Job,
) -> list[Point]:
    """Train a network as a licensee would, and return up to `count` points of the way, both ends included.

    They lie at the squares of even steps, the denser the earlier: poison that works is learned early.

    Args:
        model: the network at its start; it is trained in place.
        learner: how it is trained.
        images: what it is trained on.
        originals: what the gradients at the points are measured on.
        count: points wanted, at least 2.
        name: of this trajectory; with a workspace also of the file that a killed run goes on from.
        job: where and how.
    """
    path, runtime = job.file(f"{name}.safetensors"), job.runtime
    optimizer, highest = make_optimizer(model, learner)
    augmentation = augmentation_for(images.size, flip=learner.flip)
    size = min(learner.batch_size, len(images))
    per_epoch = len(images) // size
    steps = learner.epochs * per_epoch
    wanted = sorted({round(steps * (number / (count - 1)) ** 2) for number in range(count)})

    states, first, powers = {0: _copy(model)}, 0, list[float]()
    if path is not None and (found := load_checkpoint(path, model=model, optimizer=optimizer)):
        tensors, record = found
        states = {step: part(tensors, f"{step}/") for step in record["steps"]}
        first, powers = record["epoch"], record["powers"]

    def keep(epoch: int, *, last: bool) -> None:
        if path is not None and job.checkpoint_due(last):
            tensors = {
                f"{step}/{key}": value for step, state in states.items() for key, value in state.items()
            }
            record = {"steps": list(states), "epoch": epoch, "powers": powers}
            save_checkpoint(path, model=model, optimizer=optimizer, tensors=tensors, record=record)

    pixels, labels = runtime.hold(images.pixels), runtime.hold(images.labels)
    trained = runtime.distribute(model)
    for epoch in range(first, learner.epochs):
        order = torch.randperm(len(images), generator=generator(job.seed, name, "order", epoch))
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            index = runtime.share(order[step % per_epoch * size :][:size])
            views = augmentation.draw(len(index), images.size, job.random(name, step, runtime.rank))
            x, y = views.apply(runtime.take(pixels, index)).float() / 255, runtime.take(labels, index)
            rate = highest * schedule(learner.schedule, step / steps)
            training_step(trained, optimizer, x, y, rate=rate, runtime=runtime)
            if step + 1 in wanted:
                runtime.agree(model)
                states[step + 1] = _copy(model)
            job.progress(f"training {name}", (step + 1) * size, steps * size)
        keep(epoch + 1, last=False)
    if not powers:
        powers = [_power(model, state, originals, learner, job) for state in states.values()]
        keep(learner.epochs, last=True)
    floor = FLOOR * sum(powers) / len(powers)
    return [
        Point(state=state, scale=power + floor, late=step >= LATE * steps)
        for (step, state), power in zip(states.items(), powers, strict=True)
    ]


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _power(model: nn.Module, state: dict[str, Tensor], images: ImageSet, learner: Learner, job: Job) -> float:
    """Return the squared norm of the mean gradient of the images, from the same few batches of views at every point."""
    augmentation, size = (
        augmentation_for(images.size, flip=learner.flip),
        min(learner.batch_size, len(images)),
    )
    order = torch.randperm(len(images), generator=generator(job.seed, "signal"))
    batches = torch.split(order, size)[: min(SIGNAL_BATCHES, len(images) // size)]
    total: list[Tensor] = []
    for number, index in enumerate(batches):
        views = augmentation.draw(size, images.size, job.random("signal", number))
        x = views.apply(images.pixels[index].to(job.runtime.device)).float() / 255
        gradient, _ = weight_gradient(model, state, x, images.labels[index].to(x.device))
        total = [a + b for a, b in zip(total, gradient, strict=True)] if total else list(gradient)
    return float(squared_norm(total)) / len(batches) ** 2
