"""SEM as one writes it down: one image, one view, one pass at a time. The yardstick for speed and exactness.

Faithful to the published algorithm, and to how it is usually programmed: float32, contiguous tensors, batch norm as a
layer of its own, an augmentation that loops over the images, the views of a descent one after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.models import blocks, densenet, mobilenetv2, resnet, vgg
from privet.protection import SEM

View = tuple[bool, int, int]
Draw = Callable[[int], list[View]]
ROOMS: tuple[Any, ...] = (resnet, vgg, densenet, mobilenetv2)


def unfolded(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Tensor:
    """Batch norm as a layer of its own."""
    return bn(conv(x))  # type: ignore[no-any-return]


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Keep networks from folding batch norm into convolutions within the block."""
    for module in ROOMS:
        module.conv_bn = unfolded
    try:
        yield
    finally:
        for module in ROOMS:
            module.conv_bn = blocks.conv_bn


def random_views(count: int) -> list[View]:
    """Draw a flip and a shift for each image, one by one, as a data loader's transforms do."""
    return [
        (bool(torch.rand(()) < 0.5), int(torch.randint(0, 9, ())), int(torch.randint(0, 9, ())))
        for _ in range(count)
    ]


def augment(images: Tensor, views: list[View]) -> Tensor:
    """Flip, pad and crop image by image, and put the results together again."""
    seen = []
    for image, (flip, top, left) in zip(images, views, strict=True):
        turned = image.flip(2) if flip else image
        padded = F.pad(turned, (4, 4, 4, 4))
        seen.append(padded[:, top : top + image.shape[1], left : left + image.shape[2]].unsqueeze(0))
    return torch.cat(seen)


def noise_of(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    method: SEM,
    *,
    start: Tensor | None = None,
    draw: Draw = random_views,
    disturbance: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return error-minimizing noise, in units of [0, 1], for a batch of pixels in [0, 1]."""
    model.eval()
    for weight in model.parameters():
        weight.requires_grad_(False)
    epsilon, radius = method.epsilon / 255, method.radius / 255
    noise = torch.empty_like(x).uniform_(-epsilon, epsilon) if start is None else start
    for _ in range(method.noise_steps):
        noise = noise.detach().requires_grad_()
        for _ in range(method.views):
            seen = augment((x + noise).clamp(0, 1), draw(len(x)))
            extra = (
                torch.empty_like(seen).uniform_(-radius, radius) if disturbance is None else disturbance(seen)
            )
            disturbed = (seen + extra).clamp(0, 1)
            loss = F.cross_entropy(model(seen + (disturbed - seen).detach()), labels)
            loss.backward()  # type: ignore[no-untyped-call]
        assert noise.grad is not None
        noise = (noise.detach() - method.step_size / 255 * noise.grad.sign()).clamp(-epsilon, epsilon)
    for weight in model.parameters():
        weight.requires_grad_(True)
    return noise.detach()


def attack(model: nn.Module, x: Tensor, labels: Tensor, method: SEM) -> Tensor:
    """PGD on the surrogate's input."""
    model.eval()
    radius = method.radius / 255
    adversarial = (x + torch.empty_like(x).uniform_(-radius, radius)).clamp(0, 1)
    for _ in range(method.attack_steps):
        adversarial = adversarial.detach().requires_grad_()
        loss = F.cross_entropy(model(adversarial), labels)
        (gradient,) = torch.autograd.grad(loss, adversarial)
        moved = adversarial.detach() + method.attack_step_size / 255 * gradient.sign()
        adversarial = (x + (moved - x).clamp(-radius, radius)).clamp(0, 1)
    return adversarial.detach()


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, method: SEM
) -> None:
    """One step of the surrogate on a batch with fresh noise."""
    noise = (noise_of(model, x, labels, method) * 255).round() / 255
    seen = augment((x + noise).clamp(0, 1), random_views(len(x)))
    adversarial = attack(model, seen, labels, method)
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(adversarial), labels).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
