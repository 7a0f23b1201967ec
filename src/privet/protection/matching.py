"""How far the gradients of a network's training on changed images are from those on the originals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

LEAST = 1e-12  # squared norms count as no less


def weight_gradient(
    model: nn.Module, point: Mapping[str, Tensor], x: Tensor, labels: Tensor, *, differentiable: bool = False
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the gradient of the mean cross-entropy with respect to a network's weights, and the logits.

    The network runs as it trains: batch norm takes the batch's own statistics. Neither it nor the point is
    changed, running statistics included. Vectors (biases, batch norm) are left out, as dataset condensation does.
    All is float32: what is compared is small.

    Args:
        model: gives the architecture.
        point: its state, a value for each name of `state_dict`.
        x: images in [0, 1], (batch, 3, height, width).
        labels: (batch,).
        differentiable: whether the gradient itself can be differentiated with respect to `x`.
    """
    # Laid out alike wherever a point comes from, so that the same kernels give the same bits.
    state = {name: _laid_out(value.detach().to(x.device, copy=True)) for name, value in point.items()}
    learned = [state[name].requires_grad_() for name, weight in model.named_parameters() if weight.ndim >= 2]
    model.train()
    # Fused attention has no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        logits = torch.func.functional_call(model, state, (x,))
        loss = F.cross_entropy(logits, labels)
        gradient = torch.autograd.grad(loss, learned, create_graph=differentiable)
    return gradient, logits


def cosine_distance(gradient: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Return 1 - cos of the angle between two gradients, all tensors of each taken as one vector.

    Computed as half the squared distance of the unit vectors, which is exact for small angles.
    """
    a, b = (squared_norm(one).clamp(min=LEAST).rsqrt() for one in (gradient, other))
    return squared_norm([g * a - h * b for g, h in zip(gradient, other, strict=True)]) / 2


def residual(gradient: Sequence[Tensor], other: Sequence[Tensor], scale: float) -> Tensor:
    """Return the squared distance between two gradients, over `scale`."""
    return squared_norm([h - g for g, h in zip(gradient, other, strict=True)]) / scale


def squared_norm(gradient: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares over all tensors."""
    return torch.stack([part.square().sum() for part in gradient]).sum()


def _laid_out(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value.contiguous()
