"""Deep Leakage from Gradients: pixels and labels that give the same gradient, by L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from privet.leakage.base import Inversion
from privet.leakage.pixels import search_pixels, start_pixels
from privet.leakage.problem import Problem, Solved
from privet.learning.job import Job


@dataclass(frozen=True, kw_only=True)
class DLG(Inversion):
    """Deep Leakage from Gradients (Zhu et al., arXiv 1906.08935), and with inferred labels iDLG.

    The squared distance between the two gradients is minimised over pixels and, with
    `labels="joint"` as published, over the labels' logits; `labels="infer"` is iDLG (Zhao et al.,
    arXiv 2001.02610). Nothing prefers natural images.

    Deviations: in double precision, with a line search (lbfgs.py), where the released code takes
    blind steps of L-BFGS and often diverges; a step here is one search, at least one evaluation. The
    search stops where no point along the way is better: with max pooling the distance has jumps,
    and that may come soon.
    """

    steps: int = 300
    labels: str = "joint"

    name: ClassVar[str] = "dlg"
    precision: ClassVar[torch.dtype] = torch.float64

    def _solve(self, problem: Problem, report: Callable[[int], None], job: Job) -> Solved:
        return search_pixels(
            problem,
            start_pixels(problem),
            distance=self._distance,
            floor=self._floor(problem),
            steps=self.steps,
            report=report,
            job=job,
        )
