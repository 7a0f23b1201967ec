"""Inverting Gradients: pixels are moved until the gradient points the same way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from privet.errors import UsageError
from privet.leakage.descent import Descent
from privet.leakage.objective import Tensors
from privet.leakage.pixels import start_pixels
from privet.leakage.problem import Problem
from privet.leakage.regularise import smoothness, squared_variation, total_variation


@dataclass(frozen=True, kw_only=True)
class IG(Descent):
    """Inverting Gradients (Geiping et al., arXiv 2003.14053).

    1 minus the cosine between the two gradients, over all layers together, plus total variation, by
    Adam on the sign of the pixels' gradient, each step back into [0, 1]; the learning rate falls to a
    tenth after 3/8, 5/8 and 7/8 of the steps. Where the client took several steps, they are followed.

    Deviations: pixels in [0, 1], not normalised ones, so the learning rate is a quarter of the
    published 0.1; under noise the squared variation of its most probable image is added.

    Attributes:
        learning_rate: in units of the pixel range.
        total_variation: weight of the mean absolute difference of neighbours; 1e-2 is the paper's for LeNet.
    """

    learning_rate: float = 0.025
    total_variation: float = 1e-2

    name: ClassVar[str] = "ig"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learning_rate:
            raise UsageError("ig needs a learning rate above 0.")

    def _distance(self, problem: Problem, gradient: Tensors) -> Tensor:
        return problem.evidence.cosine(gradient)

    def _floor(self, problem: Problem) -> Tensor:
        """Return 1 minus the cosine between the true gradient and itself with noise."""
        share = (problem.evidence.noise / self._squares(problem)).clamp(0, 1)
        return 1 - (1 - share).sqrt()

    def _start(self, problem: Problem) -> dict[str, Tensor]:
        return start_pixels(problem)

    def _decode(self, problem: Problem, variables: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        y = problem.targets
        return variables["x"], variables["logits"].softmax(2) if y is None else y

    def _loss(self, problem: Problem, x: Tensor, distance: Tensor) -> Tensor:
        # Near what was sent, t, the distance of a gradient is that of its squares over 2 |t|^2.
        noisy = smoothness(
            x, temperature=2 * problem.evidence.variance, unit=2 * self._squares(problem)
        ) * squared_variation(x)
        return distance + self.total_variation * total_variation(x) + noisy

    def _squares(self, problem: Problem) -> Tensor:
        """Return the squared length of what was sent; of signs, which have none, what random images leave."""
        squares = problem.evidence.squares
        return torch.where(squares > 0, squares, problem.unit)

    def _direction(self, slope: Tensor) -> Tensor:
        return slope.sign()

    def _project(self, variables: dict[str, Tensor]) -> None:
        variables["x"].clamp_(0, 1)

    def _optimizer(self, variables: Iterable[Tensor]) -> Optimizer:
        return torch.optim.Adam(variables, self.learning_rate)

    def _rate(self, done: float) -> float:
        return self.learning_rate * 0.1 ** sum(done >= share for share in (3 / 8, 5 / 8, 7 / 8))
