"""A perceptual distance that needs no download: by features of the prior itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.learning.job import Job
from privet.learning.pieces import in_pieces
from privet.recovery.prior import piece


def perceptual_gradient(model: nn.Module, one: Tensor, other: Tensor, job: Job) -> Tensor:
    """Return the gradient, with respect to `one`, of each image's perceptual distance to `other`.

    The distance is that of LPIPS without learned weights: features are normalised at each place, their squared
    differences summed over channels, and averaged over places; the layers are added.
    """

    def gradient(one: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            aims = features(model, other, job)
        one = one.detach().requires_grad_()
        with torch.enable_grad():
            total = torch.zeros((), device=one.device)
            for found, aim in zip(features(model, one, job), aims, strict=True):
                difference = F.normalize(found.float(), dim=1) - F.normalize(aim.float(), dim=1)
                total = total + difference.square().sum(1).mean((1, 2)).sum()
            return torch.autograd.grad(total, one)[0]

    return in_pieces(gradient, one, other, size=piece(len(one)))


def features(model: Any, x: Tensor, job: Job) -> Sequence[Tensor]:
    """Return what the downward half of the prior's network makes of images, at each level, as at time 0."""
    with job.runtime.autocast():
        time = torch.zeros(len(x), dtype=torch.long, device=x.device)
        embedding = model.time_embedding(model.time_proj(time).to(x.dtype))
        hidden, found = model.conv_in(x), []
        for block in model.down_blocks:
            hidden, _ = block(hidden_states=hidden, temb=embedding)
            found.append(hidden)
    return found
