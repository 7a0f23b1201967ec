"""What inversions prefer among images that explain a gradient equally well: smooth ones."""

from __future__ import annotations

from torch import Tensor

from privet.leakage.problem import Problem

# Standard deviation of the difference of neighbouring pixels that is expected, in [0, 1].
NEIGHBOURS = 0.1


def squared_variation(x: Tensor) -> Tensor:
    """Return twice the mean squared difference of neighbours, down and across, (members,).

    Args:
        x: (members, images, colours, height, width).
    """
    down, across = x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]
    return 2 * (down.square().flatten(1).mean(1) + across.square().flatten(1).mean(1))


def total_variation(x: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbours, down plus across, (members,)."""
    down, across = x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]
    return down.abs().flatten(1).mean(1) + across.abs().flatten(1).mean(1)


def smoothness(problem: Problem, x: Tensor, least: float) -> Tensor:
    """Return the weight of `squared_variation` beside the relative distance, (members,).

    Under noise it is that of the most probable image, if the differences of neighbours are normal
    with standard deviation `NEIGHBOURS`; without noise, and never less than, `least`.
    """
    evidence, values = problem.evidence, x[0].numel()
    return least + evidence.temperature * values / (4 * NEIGHBOURS**2 * problem.unit)
