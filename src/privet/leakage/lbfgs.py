"""L-BFGS for many independent problems at once, each with its own line search."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Value = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps points, (members, unknowns), to losses, (members,), and gradients, (members, unknowns)."""

SUFFICIENT, CURVATURE = 1e-4, 0.9  # the weak Wolfe conditions (Nocedal and Wright, section 3.1)
LONGEST_SEARCH = 20
STATE = ("point", "loss", "gradient", "fresh", "active")


class LBFGS:
    """Limited-memory BFGS (Nocedal 1980) with a weak Wolfe line search by bisection.

    The search (Lewis and Overton, Math. Program. 2013) needs no interpolation: too long a step halves
    the bracket from above, too short a one from below. So all members share each evaluation while
    every one of them takes a step of its own. A member whose search finds no better point forgets its
    history and goes along the plain gradient the next time; if that fails too, it has arrived.

    Args:
        value: the losses and gradients of all members.
        start: (members, unknowns).
        history: pairs of steps and changes of gradient that are kept.
    """

    def __init__(self, value: Value, start: Tensor, *, history: int = 50) -> None:
        self.value, self.history = value, history
        self.point = start.clone()
        self.loss, self.gradient = value(self.point)
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.fresh = torch.ones_like(self.loss, dtype=torch.bool)  # no history: the plain gradient
        self.active = torch.isfinite(self.loss) & torch.isfinite(self.gradient).all(1)

    def step(self) -> None:
        """Move every active member to a better point, or find that it has arrived."""
        direction = -self._inverse_hessian(self.gradient)
        slope = _dot(direction, self.gradient)
        uphill = slope >= 0  # rounding: take the plain gradient
        direction = torch.where(uphill[:, None], -self.gradient, direction)
        slope = torch.where(uphill, -_dot(self.gradient, self.gradient), slope)
        length = self.gradient.norm(dim=1).clamp_min(torch.finfo(self.loss.dtype).tiny)
        first = torch.where(self.fresh, (1 / length).clamp_max(1.0), 1.0)
        point, loss, gradient, better = self._search(direction, slope, first)
        step, change = point - self.point, gradient - self.gradient
        bend = _dot(step, change)
        curved = better & (bend > 1e-10 * _dot(change, change).clamp_min(torch.finfo(loss.dtype).tiny))
        inverse = torch.where(curved, 1 / torch.where(curved, bend, 1.0), 0.0)
        self.pairs = [(s, y, torch.where(better, rho, 0.0)) for s, y, rho in self.pairs]
        self.pairs = [*self.pairs, (step, change, inverse)][-self.history :]
        self.active &= better | ~self.fresh
        self.fresh = ~better | (self.fresh & ~curved)
        self.point, self.loss, self.gradient = point, loss, gradient

    def state(self) -> dict[str, Tensor]:
        """Return everything that `restore` needs to go on to the same bytes."""
        pairs = {
            f"pair/{index}/{place}": value
            for index, pair in enumerate(self.pairs)
            for place, value in enumerate(pair)
        }
        return {name: getattr(self, name) for name in STATE} | pairs

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become what another search of these members was when it returned its `state`."""
        for name in STATE:
            setattr(self, name, state[name])
        count = (len(state) - len(STATE)) // 3
        self.pairs = [
            (state[f"pair/{index}/0"], state[f"pair/{index}/1"], state[f"pair/{index}/2"])
            for index in range(count)
        ]

    def _inverse_hessian(self, gradient: Tensor) -> Tensor:
        """Apply the two-loop recursion; a pair whose inverse curvature is zero counts for nothing."""
        q, shares = gradient, []
        scale = torch.ones_like(self.loss)
        for step, change, rho in reversed(self.pairs):
            share = rho * _dot(step, q)
            q = q - share[:, None] * change
            shares.append(share)
        for _, change, rho in self.pairs:  # the newest valid pair scales the first guess
            inverse = 1 / (torch.where(rho > 0, rho, 1.0) * _dot(change, change).clamp_min(1e-300))
            scale = torch.where(rho > 0, inverse, scale)
        q = q * scale[:, None]
        for (step, change, rho), share in zip(self.pairs, reversed(shares), strict=True):
            q = q + (share - rho * _dot(change, q))[:, None] * step
        return q

    def _search(
        self, direction: Tensor, slope: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low, high = torch.zeros_like(first), torch.full_like(first, torch.inf)
        length, open_ = first.clone(), self.active.clone()
        best = (self.point, self.loss, self.gradient)
        better = torch.zeros_like(open_)
        for _ in range(LONGEST_SEARCH):
            if not bool(open_.any()):
                break
            point = self.point + length[:, None] * direction
            loss, gradient = self.value(point)
            # A loss that is not finite compares as false, so the step was too long.
            lower = (
                open_ & (loss <= self.loss + SUFFICIENT * length * slope) & torch.isfinite(gradient).all(1)
            )
            lower &= loss < self.loss
            enough = lower & (_dot(gradient, direction) >= CURVATURE * slope)
            best = (
                _choose(lower, point, best[0]),
                _choose(lower, loss, best[1]),
                _choose(lower, gradient, best[2]),
            )
            better |= lower
            high = torch.where(open_ & ~lower, length, high)
            low = torch.where(lower & ~enough, length, low)
            open_ &= ~enough
            length = torch.where(torch.isinf(high), 2 * length, (low + high) / 2)
        return *best, better


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _choose(where: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(where.view(-1, *[1] * (new.ndim - 1)), new, old)
