"""Transferable unlearnable examples (TUE)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.errors import UsageError
from privet.learning.job import Job
from privet.protection.ucl import UCL

SMALLEST = 1e-5  # distances count as no less


@dataclass(frozen=True, kw_only=True)
class TUE(UCL):
    """Transferable unlearnable examples (Ren et al., arXiv 2210.10114): contrastive noise that labels go with.

    Contrastive noise of each image alone (`UCL`) says nothing of its class, so learners with labels are not
    stopped by it. Here the noise also lowers `class_separation`: the noise of a class becomes a cluster that
    a straight line tells from the others.

    Deviations: as for `UCL`, without its class-wise rounds; the surrogate trains by SGD. The gradient of the
    spread inside classes counts, as the paper's formula has it; the authors' code leaves it out. Their command
    for SimCLR also gives the contrastive loss no weight in the noise, which then depends on no surrogate at
    all; here it has the weight 1, as in their command for MoCo.

    Attributes:
        separation: weight of the class-wise separability.
    """

    class_rounds: int = 0
    train_steps: int = 20
    noise_steps: int = 20
    separation: float = 1.0

    name: ClassVar[str] = "tue"
    labelled: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "cpu": {**UCL.presets["cpu"], "class_rounds": 0, "rounds": 20},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.separation < float("inf"):
            raise UsageError(
                f"tue needs a positive weight of the separation, got {self.separation}; without one it is ucl."
            )

    def _loss(self, model: nn.Module, views: Tensor, delta: Tensor, labels: Tensor, job: Job) -> Tensor:
        contrastive = super()._loss(model, views, delta, labels, job)
        return contrastive + self.separation * class_separation(delta, labels)


def class_separation(delta: Tensor, labels: Tensor) -> Tensor:
    """Return how badly the noise of a batch clusters by class: 0 is one distinct point for each class.

    The mean over ordered pairs of classes of (σ_i + σ_j) / d_ij, σ being the mean distance of a class's noise
    from its centre, and d the distance of two centres (the paper's class-wise separability discriminant).

    Args:
        delta: noise, (batch, ...), in any unit.
        labels: (batch,).
    """
    points = delta.flatten(1)
    present, member = torch.unique(labels, return_inverse=True)
    if len(present) < 2:
        return points.new_zeros(())
    members = F.one_hot(member, len(present)).to(points.dtype)  # (batch, classes)
    shares = members / members.sum(0)
    centres = shares.T @ points  # (classes, values)
    spread = shares.T @ torch.linalg.vector_norm(points - members @ centres, dim=1)
    square = centres.square().sum(1)
    distance = (square[:, None] + square - 2 * centres @ centres.T).clamp(min=SMALLEST**2).sqrt()
    ratios: Tensor = (spread[:, None] + spread) / distance
    others = ~torch.eye(len(present), dtype=torch.bool, device=points.device)
    return ratios[others].mean()
