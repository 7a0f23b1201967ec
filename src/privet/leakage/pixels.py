"""Where inversions start that move the pixels themselves."""

from __future__ import annotations

from torch import Tensor

from privet.leakage.problem import Problem

SPREAD = 0.25  # standard deviation of the first pixels around grey: 1 after the usual normalisation


def start_pixels(problem: Problem) -> dict[str, Tensor]:
    """Return normal pixels, (members, images, colours, height, width), and logits if no labels are known."""
    update = problem.update
    variables = {"x": 0.5 + SPREAD * problem.draw("x", update.images, problem.colours, *update.size)}
    if problem.known is None:
        variables["logits"] = problem.draw("logits", update.images, update.classes)
    return variables
