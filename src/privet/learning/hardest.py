"""Learning from the hardest of several distortions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.images.distort import distort
from privet.learning.pieces import in_pieces
from privet.learning.runtime import Runtime


@torch.no_grad()
def hardest(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    draws: int,
    generator: torch.Generator,
    runtime: Runtime,
) -> Tensor:
    """Return, of several random distortions of each image, the one on which the network's loss is highest.

    Args:
        model: a network in evaluation mode.
        x: pixels in [0, 1], (batch, 3, height, width).
        labels: (batch,).
        draws: distortions of each image; with 1 the network is not asked.
        generator: draws them.
        runtime: gives the precision.
    """
    chosen = distort(x, generator)
    if draws == 1:
        return chosen

    def losses(piece: Tensor, answers: Tensor) -> Tensor:
        with torch.no_grad(), runtime.autocast():
            return F.cross_entropy(model(piece).float(), answers, reduction="none")

    highest = in_pieces(losses, chosen, labels)
    for _ in range(1, draws):
        other = distort(x, generator)
        loss = in_pieces(losses, other, labels)
        chosen = torch.where((loss > highest).view(-1, 1, 1, 1), other, chosen)
        highest = torch.maximum(loss, highest)
    return chosen
