"""First-order inversions: one loop for many members, of which each stops when it is done."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from privet.leakage.base import Inversion
from privet.leakage.labels import count_again
from privet.leakage.moments import disagreement, mismatch
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
from privet.learning.checkpoint import load_state, part, save_state
from privet.learning.job import Job

EXPLODED = 1e6  # times a member's first distance
RECOUNTS = (0.1, 0.2, 0.3, 0.4, 0.5)  # shares of the steps after which labels are counted again
CHECK = 25  # steps between looks at who is done


@dataclass(frozen=True, kw_only=True)
class Descent(Inversion):
    """An inversion that follows the gradient of a loss in variables of its own.

    Labels of a batch that were inferred are counted again along the way, from what the network makes of the images
    so far (labels.py).

    A member that ends (its numbers are not finite, it has reached the noise floor, nothing is left to
    gain) keeps what it has from that step on, and is taken out of the stack soon after.

    Attributes:
        batch_norm: weight of the mismatch with batch norm's statistics, where the client sent them (Yin et al.,
            arXiv 2104.07586); 0 to do without. Which iterate is the best is decided by the gradient alone.
        group: weight of the squared distance to the mean of the victim's restarts, where there are several and
            batch norm's statistics were sent (ibid.).
    """

    batch_norm: float = 0.1
    group: float = 0.0

    @abstractmethod
    def _start(self, problem: Problem) -> dict[str, Tensor]:
        """Return the variables, each (members, ...)."""

    def _constants(self, problem: Problem) -> dict[str, Tensor]:
        """Return what else `_decode` needs, each (members, ...)."""
        return {}

    @abstractmethod
    def _decode(self, problem: Problem, variables: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Turn variables and constants into pixels and probabilities of classes.

        Returns:
            (members, images, colours, height, width) and (members, images, classes).
        """

    @abstractmethod
    def _loss(self, problem: Problem, x: Tensor, distance: Tensor) -> Tensor:
        """Return what is minimised, (members,)."""

    @abstractmethod
    def _optimizer(self, variables: Iterable[Tensor]) -> Optimizer:
        """Return what changes the variables."""

    @abstractmethod
    def _rate(self, done: float) -> float:
        """Return the learning rate when this share of the steps is done."""

    def _direction(self, slope: Tensor) -> Tensor:
        """Return what the optimiser is given for a gradient."""
        return slope

    def _project(self, variables: dict[str, Tensor]) -> None:
        """Bring the variables back into their range, in place."""

    def _refine(self, problem: Problem, solved: Solved, job: Job) -> Solved:
        """Return something better than what the loop found, if the method knows how."""
        return solved

    @property
    def _keeps_last(self) -> bool:
        """Whether the last iterate counts, not the one with the least distance."""
        return False

    @final
    def _solve(self, problem: Problem, report: Callable[[int], None], job: Job) -> Solved:
        whole = problem
        variables = {name: value.requires_grad_() for name, value in self._start(problem).items()}
        constants = self._constants(problem)
        optimizer = self._optimizer(variables.values())
        ledger: _Ledger | None = None
        path, done = job.file("descent.safetensors"), 0
        if state := load_state(path):
            tensors = {name: value.to(problem.evidence.floor.device) for name, value in state[0].items()}
            done, ledger = _Ledger.restored(part(tensors, "ledger/"), state[1])
            if done < self.steps:
                if len(ledger.rows) < len(problem.starts):
                    problem = problem.subset(ledger.rows)
                    constants = {name: value[ledger.rows] for name, value in constants.items()}
                variables = {name: tensors[f"variable/{name}"].requires_grad_() for name in variables}
                optimizer = self._optimizer(variables.values())
                for name, variable in variables.items():
                    optimizer.state[variable] = part(tensors, f"optimizer/{name}/")
                problem = replace(problem, known=tensors.get("known"))
        recounts = {round(share * self.steps) for share in RECOUNTS}
        for step in range(done + 1, self.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = self._rate((step - 1) / self.steps)
            x, y = self._decode(problem, {**variables, **constants})
            gradient, moments = problem.client.simulate(x, y)
            distance = self._distance(problem, gradient)
            loss = self._loss(problem, x, distance)
            if self.batch_norm and problem.moments:
                loss = loss + self.batch_norm * mismatch(moments, problem.moments)
            if self.group and problem.moments:
                counted = None if ledger is None else ledger.open
                loss = loss + self.group * disagreement(x, problem.victims, counted)
            slopes = torch.autograd.grad(loss.sum(), list(variables.values()))
            found = x.detach(), y.detach(), distance.detach()
            ledger = ledger or _Ledger(*found)
            ledger.enter(step, *found, self._floor(problem), last=self._keeps_last)
            for variable, slope in zip(variables.values(), slopes, strict=True):
                variable.grad = self._direction(slope)
            optimizer.step()
            with torch.no_grad():
                self._project(variables)
            if step % max(1, self.steps // POINTS) == 0:
                ledger.note(step)
            if problem.known is not None and problem.bias is not None and step in recounts:
                again = count_again(
                    problem.known,
                    problem.bias,
                    problem.client,
                    found[0],
                    clipped=problem.evidence.clipped,
                    noise=problem.evidence.variance.sqrt(),
                )
                problem = replace(problem, known=again)
            over = step == self.steps
            if step % CHECK == 0 and (kept := ledger.leave()) is not None:
                over = over or not len(kept)
                if not over:
                    problem = problem.subset(kept)
                    variables = {
                        name: value.detach()[kept].requires_grad_() for name, value in variables.items()
                    }
                    constants = {name: value[kept] for name, value in constants.items()}
                    optimizer = _carry(optimizer, self._optimizer(variables.values()), kept)
            if path is not None and job.checkpoint_due(over):
                record = search_record(self.steps if over else step, ledger.ends, ledger.history)
                known = {} if problem.known is None else {"known": problem.known}
                save_state(path, {**ledger.state(), **_state(variables, optimizer), **known}, record)
            report(step)
            if over:
                break
        assert ledger is not None
        if whole.bias is not None:
            whole = replace(whole, known=ledger.y.argmax(2))
        return self._refine(whole, ledger.solved(self.steps), job)


class _Ledger:
    """What is kept of each member of a stack, also when it has left; `rows` are those still in it."""

    TENSORS = ("rows", "open", "x", "y", "best", "limit")

    def __init__(self, x: Tensor, y: Tensor, distance: Tensor) -> None:
        self.rows = torch.arange(len(x), device=x.device)
        self.open = torch.ones_like(distance, dtype=torch.bool)
        self.x, self.y = torch.full_like(x, 0.5), torch.zeros_like(y)
        self.best = torch.full_like(distance, torch.inf)
        self.limit = EXPLODED * distance
        self.ends: Ends = {}
        self.history: History = []

    @classmethod
    def restored(cls, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> tuple[int, Self]:
        """Return the step after which a search was saved, and the ledger that had this `state` then."""
        ledger = cls(state["x"], state["y"], state["best"])
        for name in cls.TENSORS:
            setattr(ledger, name, state[name])
        step, ledger.ends, ledger.history = read_search(record)
        return step, ledger

    def state(self) -> dict[str, Tensor]:
        """Return its tensors."""
        return {f"ledger/{name}": getattr(self, name) for name in self.TENSORS}

    def enter(self, step: int, x: Tensor, y: Tensor, distance: Tensor, floor: Tensor, *, last: bool) -> None:
        """Keep what is better than before (or whatever is `last`), and mark the members that are done."""
        sound = (distance <= self.limit[self.rows]) & torch.isfinite(x).flatten(1).all(1)
        better = self.open & sound & (last | (distance < self.best[self.rows]))
        chosen = self.rows[better]
        self.x[chosen], self.y[chosen], self.best[chosen] = x[better], y[better], distance[better]
        for reason, which in (
            (f"{FAILED}not finite, or exploding, at step {step}", ~sound),
            ("noise floor", (floor > 0) & (distance <= floor)),
            ("converged", distance <= CONVERGED[distance.dtype]),
        ):
            ends = self.open & which
            if bool(ends.any()):
                self.ends |= dict.fromkeys(self.rows[ends].tolist(), (step, reason))
                self.open = self.open & ~ends

    def note(self, step: int) -> None:
        """Write down every member's distance."""
        self.history.append((step, self.best.nan_to_num(posinf=HUGE).tolist()))

    def leave(self) -> Tensor | None:
        """Return the positions that stay in the stack, none if all are done, or None if nobody left."""
        kept = self.open.nonzero()[:, 0]
        if len(kept) == 1:  # see Client: never alone
            kept = torch.cat((kept, (~self.open).nonzero()[0])).sort().values
        if len(kept) == len(self.open):
            return None
        self.rows, self.open = self.rows[kept], self.open[kept]
        return kept

    def solved(self, steps: int) -> Solved:
        """Return everything that was kept."""
        return Solved.after(steps, x=self.x, y=self.y, ends=self.ends, history=self.history)


def _state(variables: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """Return variables and what the optimiser knows of each."""
    slots = {
        f"optimizer/{name}/{slot}": value
        for name, variable in variables.items()
        for slot, value in optimizer.state[variable].items()
    }
    return {f"variable/{name}": value for name, value in variables.items()} | slots


def _carry(old: Optimizer, new: Optimizer, kept: Tensor) -> Optimizer:
    """Give the new optimiser the old one's state of the kept members."""
    before = [old.state[variable] for group in old.param_groups for variable in group["params"]]
    after = [variable for group in new.param_groups for variable in group["params"]]
    for state, variable in zip(before, after, strict=True):
        new.state[variable] = {
            name: value[kept] if value.ndim else value.clone() for name, value in state.items()
        }
    return new
