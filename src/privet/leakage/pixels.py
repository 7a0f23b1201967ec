"""Inversions over the pixels themselves: where they start, and the search for the same gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from privet.leakage.lbfgs import LBFGS
from privet.leakage.objective import Tensors
from privet.leakage.problem import (
    CONVERGED,
    FAILED,
    HUGE,
    POINTS,
    Ends,
    History,
    Problem,
    Solved,
    read_search,
    search_record,
)
from privet.learning.checkpoint import load_state, save_state
from privet.learning.job import Job

SPREAD = 0.25  # standard deviation of the first pixels around grey: 1 after the usual normalisation

Distance = Callable[[Problem, Tensors], Tensor]
"""Maps gradients to members' distances from what was sent, (members,)."""


def start_pixels(problem: Problem) -> Tensors:
    """Return normal pixels, (members, images, colours, height, width), and logits if no labels are known."""
    update = problem.update
    variables = {"x": 0.5 + SPREAD * problem.draw("x", update.images, problem.colours, *update.size)}
    if problem.known is None:
        variables["logits"] = problem.draw("logits", update.images, update.classes)
    return variables


def search_pixels(
    problem: Problem,
    start: Tensors,
    *,
    distance: Distance,
    floor: Tensor,
    steps: int,
    report: Callable[[int], None],
    job: Job,
    idle: Tensor | None = None,
) -> Solved:
    """Minimise the distance over pixels, and logits if there are any, by L-BFGS.

    Args:
        problem: what was sent.
        start: as `start_pixels` returns it.
        distance: what is minimised.
        floor: (members,), below which noise explains what is left.
        steps: line searches, at most.
        report: told every finished step.
        job: keeps an unfinished search.
        idle: (members,), those that stay where they are.
    """
    shape, count = start["x"].shape, start["x"][0].numel()

    def decode(point: Tensor) -> tuple[Tensor, Tensor]:
        y = problem.targets
        if y is None:
            y = point[:, count:].view(start["logits"].shape).softmax(2)
        return point[:, :count].view(shape), y

    def value(point: Tensor) -> tuple[Tensor, Tensor]:
        point = point.detach().requires_grad_()
        found = distance(problem, problem.client.gradient(*decode(point)))
        return found.detach(), torch.autograd.grad(found.sum(), point)[0]

    search = LBFGS(value, torch.cat([part.flatten(1) for part in start.values()], 1))
    limit = floor.clamp_min(CONVERGED[floor.dtype])
    ends: Ends = dict.fromkeys(
        (~search.active).nonzero()[:, 0].tolist(), (0, f"{FAILED}not finite at the start")
    )
    if idle is not None:
        search.active &= ~idle
    history: History = []
    path, done = job.file("pixels.safetensors"), -1
    if state := load_state(path):
        tensors, record = state
        search.restore({name: value.to(floor.device) for name, value in tensors.items()})
        done, ends, history = read_search(record)
    for step in range(done + 1, steps + 1):
        if step:
            search.step()
            report(step)
        arrived = search.loss <= limit
        search.active &= ~arrived
        for row in (~search.active).nonzero()[:, 0].tolist():
            ends.setdefault(row, (step, _reason(bool(arrived[row]), bool(floor[row] > 0))))
        if step % max(1, steps // POINTS) == 0:
            history.append((step, search.loss.nan_to_num(posinf=HUGE).tolist()))
        if not bool(search.active.any()):
            break
        if path is not None and job.checkpoint_due():
            save_state(path, search.state(), search_record(step, ends, history))
    x, y = decode(search.point)
    return Solved.after(steps, x=x, y=y, ends=ends, history=history)


def _reason(arrived: bool, noisy: bool) -> str:
    if not arrived:
        return "no better point"
    return "noise floor" if noisy else "converged"
