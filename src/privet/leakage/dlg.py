"""Deep Leakage from Gradients: pixels and labels that give the same gradient, by L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from privet.leakage.base import Inversion
from privet.leakage.descent import CONVERGED, HUGE, POINTS
from privet.leakage.lbfgs import LBFGS
from privet.leakage.pixels import start_pixels
from privet.leakage.problem import FAILED, Problem, Solved


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

    def _solve(self, problem: Problem, report: Callable[[int], None]) -> Solved:
        start = start_pixels(problem)
        members, pixels = len(problem.starts), start["x"][0].numel()

        def decode(point: Tensor) -> tuple[Tensor, Tensor]:
            y = problem.targets
            if y is None:
                y = point[:, pixels:].view(members, -1, problem.update.classes).softmax(2)
            return point[:, :pixels].view(start["x"].shape), y

        def value(point: Tensor) -> tuple[Tensor, Tensor]:
            point = point.detach().requires_grad_()
            x, y = decode(point)
            distance = self._distance(problem, problem.client.gradient(x, y))
            return distance.detach(), torch.autograd.grad(distance.sum(), point)[0]

        search = LBFGS(value, torch.cat([part.flatten(1) for part in start.values()], 1))
        ends, steps = ["steps"] * members, [self.steps] * members
        history = []
        floor = self._floor(problem).clamp_min(CONVERGED[torch.float64])
        for step in range(self.steps + 1):
            before = search.active.clone()
            if step:
                search.step()
            arrived = search.loss <= floor
            for i in (before & (arrived | ~search.active)).nonzero()[:, 0].tolist():
                ends[i] = _end(bool(arrived[i]), float(floor[i]), step)
                steps[i] = step
            search.active &= ~arrived
            if step % max(1, self.steps // POINTS) == 0:
                history.append((step, search.loss.nan_to_num(posinf=HUGE).tolist()))
            report(step)
            if not bool(search.active.any()):
                break
        x, y = decode(search.point)
        ends = [
            end if bool(torch.isfinite(search.loss[i])) else f"{FAILED}not finite at the start"
            for i, end in enumerate(ends)
        ]
        return Solved(x=x, y=y, steps=steps, ends=ends, history=history)


def _end(arrived: bool, floor: float, step: int) -> str:
    if not arrived:
        return f"no better point after step {step}"
    return "noise floor" if floor > CONVERGED[torch.float64] else "converged"
