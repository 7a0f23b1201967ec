"""Projected gradient descent on the input (Madry et al., arXiv 1706.06083)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.learning.runtime import Runtime


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Put the network into evaluation mode for the block, as attacks and noise steps need it."""
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


def input_gradient(model: nn.Module, x: Tensor, labels: Tensor, *, runtime: Runtime) -> Tensor:
    """Return the gradient of the summed cross-entropy with respect to the input.

    Args:
        model: a network in evaluation mode.
        x: pixels in [0, 1], (batch, 3, height, width).
        labels: (batch,).
        runtime: gives the precision of the pass; the gradient is float32.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad(), runtime.autocast():
        loss = F.cross_entropy(model(x).float(), labels, reduction="sum")
    return torch.autograd.grad(loss, x)[0]


def uniform(like: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    """Return uniform noise in [-radius, radius], of the shape and memory layout of `like`."""
    batch, channels, height, width = like.shape
    noise = torch.rand(batch, height, width, channels, generator=generator, device=generator.device)
    return noise.sub_(0.5).mul_(2 * radius).permute(0, 3, 1, 2)


@torch.no_grad()
def pgd(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    radius: float,
    step_size: float,
    steps: int,
    generator: torch.Generator,
    runtime: Runtime,
) -> Tensor:
    """Return inputs within `radius` of `x` (L-infinity) that raise the loss, from a random start.

    Args:
        model: a network in evaluation mode.
        x: pixels in [0, 1], (batch, 3, height, width).
        labels: (batch,).
        radius: in units of the pixel range [0, 1]; with 0 the input comes back unchanged.
        step_size: likewise.
        steps: ascents along the gradient's sign.
        generator: draws the start.
        runtime: gives the precision.
    """
    if radius == 0:
        return x
    adversarial = (x + uniform(x, radius, generator)).clamp_(0, 1)
    low, high = (x - radius).clamp_(min=0), (x + radius).clamp_(max=1)
    for _ in range(steps):
        gradient = input_gradient(model, adversarial, labels, runtime=runtime)
        adversarial = adversarial.add_(gradient.sign_(), alpha=step_size)
        adversarial = torch.maximum(torch.minimum(adversarial, high), low)
    return adversarial
