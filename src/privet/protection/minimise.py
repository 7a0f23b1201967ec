"""The inner problem that error-minimizing methods share: noise that makes a batch easy to fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from privet.images.augment import Augmentation
from privet.images.image_set import ImageSet
from privet.learning.attack import input_gradient
from privet.learning.runtime import Runtime

Disturb = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Maps views in [0, 1] and their labels to disturbed views in [0, 1]; the gradient passes straight."""

Confine = Callable[[Tensor], Tensor]
"""Maps gradients to their part in the directions that noise may take, (batch, 3, height, width)."""


class Batch(NamedTuple):
    """Images to find noise for.

    Attributes:
        x: pixels in [0, 1], (batch, 3, height, width).
        labels: (batch,).
        grey: (batch,), images on which the three channels must stay equal.
    """

    x: Tensor
    labels: Tensor
    grey: Tensor


class Batches:
    """An image set, held on the device if it fits there, in batches by position."""

    def __init__(self, images: ImageSet, runtime: Runtime) -> None:
        self.runtime = runtime
        self.held = [runtime.hold(rows) for rows in (images.pixels, images.labels, images.grey)]

    def __getitem__(self, index: Tensor) -> Batch:
        pixels, labels, grey = (self.runtime.take(rows, index) for rows in self.held)
        return Batch(pixels.float() / 255, labels, grey)


def pack(noise: Tensor, epsilon: float) -> Tensor:
    """Return noise in [-epsilon, epsilon] as int8, in steps of epsilon / 127."""
    return (noise * (127 / epsilon)).round().to(torch.int8)


def unpack(stored: Tensor, epsilon: float) -> Tensor:
    """Return what `pack` stored, up to its rounding."""
    return stored.float() * (epsilon / 127)


@torch.no_grad()
def minimise(
    model: nn.Module,
    batch: Batch,
    noise: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    augmentation: Augmentation | None = None,
    views: int = 1,
    disturb: Disturb | None = None,
    confine: Confine | None = None,
    generator: torch.Generator,
    runtime: Runtime,
) -> Tensor:
    """Return noise, starting from `noise`, that lowers the expected loss of a frozen network.

    Each step moves by the sign of the gradient of the mean over `views` draws of
    CE(model(disturb(t(clip(x + noise)))), label), t being drawn from the augmentation, and clips
    to the budget. The draws of a step share one forward and backward pass, which changes nothing
    as the network is in evaluation mode.

    Args:
        model: a network in evaluation mode.
        batch: the images.
        noise: where to start, in units of [0, 1], shaped like the pixels; not modified.
        epsilon: budget, in units of [0, 1].
        step_size: likewise.
        steps: descents.
        augmentation: the distribution of views, or None for the image itself.
        views: draws averaged in each step.
        disturb: what is done to each view before the network sees it, or None.
        confine: keeps descents to a part of all directions, or None.
        generator: draws views and disturbances.
        runtime: gives the precision of the passes.
    """
    x, labels, grey = batch
    repeated = labels.repeat(views)
    tie = grey.view(-1, 1, 1, 1) if bool(grey.any()) else None
    for _ in range(steps):
        moved = x + noise
        seen = moved.clamp(0, 1)
        if augmentation is not None:
            drawn = augmentation.draw(views * len(x), (x.shape[2], x.shape[3]), generator)
            inputs = drawn.apply(seen)
        else:
            inputs = seen
        if disturb is not None:
            inputs = disturb(inputs, repeated, generator)
        gradient = input_gradient(model, inputs, repeated, runtime=runtime)
        if augmentation is not None:
            gradient = drawn.adjoint(gradient)
            gradient = gradient.reshape(views, *x.shape).sum(0)
        gradient = gradient.masked_fill_(moved != seen, 0)  # the derivative of the clip
        if tie is not None:
            gradient = torch.where(tie, gradient.sum(1, keepdim=True), gradient)
        if confine is not None:
            gradient = confine(gradient)
        noise = (noise - step_size * gradient.sign_()).clamp_(-epsilon, epsilon)
    return noise
