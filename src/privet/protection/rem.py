"""Robust error-minimizing noise (REM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from privet.learning.attack import pgd
from privet.learning.job import Job
from privet.protection.sem import SEM


@dataclass(frozen=True, kw_only=True)
class REM(SEM):
    """Robust error-minimizing noise (Fu et al., arXiv 2203.14533): SEM's predecessor, nine times its cost.

    As `SEM`, but each view is disturbed adversarially, not at random:

        noise:  min over |δ| <= ε of  E_t max over |a| <= ρ of CE(f(t(x + δ) + a), y)

    The inner attack is PGD with `attack_steps` steps from a random start, run again for every view
    of every descent. Many implementations under this name leave it, or the surrogate's adversarial
    training, out; this one has both.
    """

    name: ClassVar[str] = "rem"

    def _disturb(
        self, model: nn.Module, views: Tensor, labels: Tensor, randomness: torch.Generator, job: Job
    ) -> Tensor:
        """Attack the views: the one thing in which REM differs from SEM."""
        return pgd(
            model,
            views,
            labels,
            radius=self.radius / 255,
            step_size=self.attack_step_size / 255,
            steps=self.attack_steps,
            generator=randomness,
            runtime=job.runtime,
        )
