"""What ungeneralizable examples are optimised for, on one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from privet.protection.feature_space import FeatureSpace
from privet.protection.matching import cosine_distance, residual, weight_gradient
from privet.protection.trajectory import Point
from privet.protection.undistil import undistillation


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The sum of three losses, of which each is a mean over its networks.

    Attributes:
        matching: "cosine" or "residual".
        distance: "repel", "permute" or "surrogate".
        distance_weight: of that loss.
        undistil: weight of the third.
        networks: the authorised ones; of each, its architecture.
        spaces: feature spaces.
        targets: for each class another one, (classes,).
    """

    matching: str
    distance: str
    distance_weight: float
    undistil: float
    networks: Sequence[nn.Module]
    spaces: Sequence[FeatureSpace]
    targets: Tensor

    def __call__(
        self, seen: Tensor, originals: Tensor, labels: Tensor, *, points: Sequence[Point], weight: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss and what it consists of.

        Args:
            seen: views of the changed images in [0, 1], (batch, 3, height, width).
            originals: the same views of the originals.
            labels: (batch,).
            points: of each authorised network's training, one.
            weight: of the matching.
        """
        losses, measured = [], {"cosine": 0.0, "residual": 0.0}
        for model, point in zip(self.networks, points, strict=True):
            wanted, meant = weight_gradient(model, point.state, originals, labels)
            given, said = weight_gradient(model, point.state, seen, labels, differentiable=True)
            mismatch = {
                "cosine": cosine_distance(wanted, given),
                "residual": residual(wanted, given, point.scale),
            }
            losses.append(weight * mismatch[self.matching])
            if self.undistil and point.late:
                losses.append(self.undistil * undistillation(meant, said, labels))
            for name, value in mismatch.items():
                measured[name] += float(value.detach()) / len(self.networks)
        apart = torch.stack([self._distance(space, seen, originals, labels) for space in self.spaces]).mean()
        measured["distance"] = float(apart.detach())
        return torch.stack(losses).sum() / len(self.networks) + self.distance_weight * apart, measured

    def _distance(self, space: FeatureSpace, seen: Tensor, originals: Tensor, labels: Tensor) -> Tensor:
        if self.distance == "repel":
            return space.repel(seen, originals)
        if self.distance == "permute":
            return space.permute(seen, labels, self.targets[labels])
        return space.surrogate(seen, self.targets[labels])
