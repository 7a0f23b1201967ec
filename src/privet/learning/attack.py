"""Projected gradient descent on the input (Madry et al., arXiv 1706.06083)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.learning.pieces import in_pieces
from privet.learning.runtime import Runtime


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Put the network into evaluation mode for the block, and spare the gradients of its weights.

    Attacks and noise steps need neither; a compiled network would compute the latter all the same.
    """
    training = model.training
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()
    for weight in learned:
        weight.requires_grad_(False)
    try:
        yield model
    finally:
        model.train(training)
        for weight in learned:
            weight.requires_grad_(True)


def input_gradient(model: nn.Module, x: Tensor, labels: Tensor, *, runtime: Runtime) -> Tensor:
    """Return the gradient of the summed cross-entropy with respect to the input.

    Args:
        model: a network in evaluation mode.
        x: pixels in [0, 1], (batch, 3, height, width).
        labels: (batch,).
        runtime: gives the precision of the pass; the gradient is float32.
    """

    def gradient(piece: Tensor, answers: Tensor) -> Tensor:
        piece = piece.detach().requires_grad_()
        with torch.enable_grad(), runtime.autocast():
            loss = F.cross_entropy(model(piece).float(), answers, reduction="sum")
        return torch.autograd.grad(loss, piece)[0]

    return in_pieces(gradient, x, labels)


def uniform(like: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    """Return noise in [-radius, radius], uniform over 256 levels, shaped and laid out like `like`.

    Eight levels are cut from each random number, which takes a fifth of the time of one number each.
    """
    batch, channels, height, width = like.shape
    count = like.numel()
    words = torch.randint(
        -(2**63), 2**63 - 1, (-(-count // 8),), generator=generator, device=generator.device
    )
    noise = words.view(torch.uint8)[:count].float().mul_(2 * radius / 255).sub_(radius)
    return noise.view(batch, height, width, channels).permute(0, 3, 1, 2)


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
    return ascend(
        x,
        lambda inputs: input_gradient(model, inputs, labels, runtime=runtime),
        radius=radius,
        step_size=step_size,
        steps=steps,
        generator=generator,
    )


@torch.no_grad()
def ascend(
    x: Tensor,
    gradient: Callable[[Tensor], Tensor],
    *,
    radius: float,
    step_size: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Do the same for any loss, given its gradient with respect to the inputs."""
    if radius == 0:
        return x
    adversarial = (x + uniform(x, radius, generator)).clamp_(0, 1)
    low, high = (x - radius).clamp_(min=0), (x + radius).clamp_(max=1)
    for _ in range(steps):
        adversarial = adversarial.add_(gradient(adversarial).sign_(), alpha=step_size)
        adversarial = torch.maximum(torch.minimum(adversarial, high), low)
    return adversarial
