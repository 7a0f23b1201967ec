"""What inversions prefer among images that explain a gradient equally well: smooth ones."""

from __future__ import annotations

from torch import Tensor

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


def smoothness(x: Tensor, *, temperature: Tensor, unit: Tensor) -> Tensor:
    """Return the weight of `squared_variation` that gives the most probable image, (members,).

    The differences of neighbours are taken to be normal with standard deviation `NEIGHBOURS`.

    Args:
        x: (members, images, colours, height, width).
        temperature: what minus the log-likelihood is to be multiplied with to give a distance in units of a gradient,
            (members,); 0 without noise, and then so is the weight.
        unit: the distance that counts as 1, (members,).
    """
    return temperature * x[0].numel() / (4 * NEIGHBOURS**2 * unit)
