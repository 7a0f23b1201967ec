"""Adversarial training as a recovery: the learner that small noise cannot mislead."""

from __future__ import annotations

from dataclasses import dataclass, replace

from privet.learning.train import Learner
from privet.recovery.base import Recovery


@dataclass(frozen=True)
class AdversarialTraining(Recovery):
    """Train against PGD (Madry et al., arXiv 1706.06083) within `radius` (L-infinity, in 1/255)."""

    radius: float

    @property
    def name(self) -> str:
        return f"adversarial-{self.radius:g}"

    @property
    def trains(self) -> bool:
        return True

    def adapt(self, learner: Learner) -> Learner:
        return replace(learner, radius=self.radius)
