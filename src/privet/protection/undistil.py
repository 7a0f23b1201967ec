"""Undistillation: what a network says of the wrong classes must not be worth imitating."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from privet.learning.train import TEMPERATURE

SURE = 0.9  # probability of the label from which on an image counts as learned
BOUND = 1.0  # no distribution is asked to be farther away


def undistillation(originals: Tensor, changed: Tensor, labels: Tensor) -> Tensor:
    """Return the negative distance of what a network says of the wrong classes of originals and changed images.

    The mean over images that the network is sure of of -min(1, KL(q(x) || q(x_u))), q being the softmax over
    all classes but the label's at temperature 4; and what the label's logit lacks of being the largest, so that the
    answer itself stays. 0 if the network is sure of none.

    Args:
        originals: logits of the originals, (batch, classes).
        changed: of the changed images.
        labels: (batch,).
    """
    sure = originals.softmax(1).gather(1, labels[:, None])[:, 0] > SURE
    own = F.one_hot(labels, originals.shape[1]).bool()

    def wrong(logits: Tensor) -> Tensor:
        return logits[~own].view(len(logits), -1)  # (batch, classes - 1)

    said = F.log_softmax(wrong(changed) / TEMPERATURE, 1)
    meant = F.log_softmax(wrong(originals.detach()) / TEMPERATURE, 1)
    distance = F.kl_div(said, meant, reduction="none", log_target=True).sum(1)
    lacking = F.relu(wrong(changed).amax(1) - changed[own])
    return ((lacking - distance.clamp(max=BOUND)) * sure).sum() / torch.clamp(sure.sum(), min=1)
