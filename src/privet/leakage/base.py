"""What every inversion is: private images and labels reconstructed from what a client sent."""

from __future__ import annotations

import dataclasses
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from privet.errors import UsageError
from privet.leakage.client import Client, network_of
from privet.leakage.labels import Head, infer_labels
from privet.leakage.moments import sent_moments
from privet.leakage.objective import Evidence, Tensors
from privet.leakage.problem import FAILED, Problem, Solved, calibrated
from privet.learning.checkpoint import load_state, save_state
from privet.learning.job import Job
from privet.learning.runtime import Runtime
from privet.learning.update import Update
from privet.progress import Progress, silent

LABELS = ("infer", "joint")
LARGEST = torch.finfo(torch.float32).max  # of any setting
TOGETHER = 16  # members in one pass: more gain little on a processor


@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruction:
    """What came out of one update.

    Attributes:
        images: float32 in [0, 1], (images, colours, height, width), of the restart with the least distance.
        labels: (images,).
        distance: how far the gradient of these images is from what was sent, as a share of the
            distance of a gradient of zero.
        distances: the same for every restart; infinite where it failed.
        floor: the distance that noise on the update explains by itself.
        end: why the restart stopped.
        steps: how many steps it took.
        history: pairs of step and distance.
        equations: numbers that were sent.
        unknowns: numbers that were looked for.
    """

    images: Tensor
    labels: Tensor
    distance: float
    distances: tuple[float, ...]
    floor: float
    end: str
    steps: int
    history: tuple[tuple[int, float], ...]
    equations: int
    unknowns: int

    @property
    def failed(self) -> bool:
        """Whether every restart ended in numbers that are not finite."""
        return self.end.startswith(FAILED)


@dataclass(frozen=True, kw_only=True)
class Inversion(ABC):
    """A way to reconstruct images and labels from updates; subclasses implement `_solve`.

    It knows the records and nothing else. Labels that a record does not know are inferred before
    (labels.py), or looked for together with the images.

    Attributes:
        steps: at most so many.
        restarts: starts from other random numbers; the one with the least distance is kept.
        labels: "infer" or "joint".
        aware: whether it makes use of what is known of the update's treatment.
    """

    steps: int = 1000
    restarts: int = 1
    labels: str = "infer"
    aware: bool = True

    name: ClassVar[str]
    precision: ClassVar[torch.dtype] = torch.float32  # at least
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not 0 <= value <= LARGEST:
                raise UsageError(
                    f"{self.name} needs {field.name} as a number from 0 to {LARGEST:.2g}, got {value}."
                )
        if self.steps < 1 or self.restarts < 1:
            raise UsageError(
                f"Expected at least one step and one restart, got {self.steps} and {self.restarts}."
            )
        if self.labels not in LABELS:
            raise UsageError(f"Expected labels to be {' or '.join(LABELS)}, got {self.labels!r}.")

    @classmethod
    def preset(cls, name: str = "default", **settings: Any) -> Self:
        """Return the inversion with the settings of a preset, and these on top.

        Raises:
            UsageError: no such preset.
        """
        if name not in cls.PRESETS:
            raise UsageError(f"{cls.name} has no preset {name!r}; it has {', '.join(cls.PRESETS)}.")
        return cls(**{**cls.PRESETS[name], **settings})

    def lasting(self, times: int) -> Self:
        """Return the inversion with so many times the steps."""
        return replace(self, steps=times * self.steps)

    def record(self) -> dict[str, Any]:
        """Return what the result depends on, as JSON values."""
        return {"inversion": self.name, "settings": dataclasses.asdict(self)}

    @final
    def invert(
        self,
        updates: Sequence[Update],
        *,
        runtime: Runtime,
        seed: int = 0,
        network: nn.Module | None = None,
        together: int = TOGETHER,
        workspace: Path | None = None,
        checkpoint_seconds: float = 20.0,
        progress: Progress = silent,
    ) -> list[Reconstruction]:
        """Attack updates that are alike, side by side.

        Each one's result is the same whatever others are attacked beside it. Whatever the runtime's
        precision, numbers have at least 32 bits: differences of gradients need them.

        Args:
            updates: records with one architecture, size, batch and number of steps.
            runtime: where.
            seed: of the starting points.
            network: the client's network, if privet does not know the architecture.
            together: members (victims times restarts) in one pass; limits memory. A victim's restarts are never parted.
            workspace: a folder for what a killed attack goes on from, or None to keep nothing. Whoever calls
                sees to it that it belongs to these arguments.
            checkpoint_seconds: how often an unfinished pass is saved there.
            progress: told about steps of members.

        Raises:
            UsageError: the records differ, or do not fit the network or this inversion.
        """
        if not updates:
            return []
        network = network if network is not None else network_of(updates[0])
        known = [self._labels(update, network) for update in updates]
        members = [(victim, start) for victim in range(len(updates)) for start in range(self.restarts)]
        found: list[Reconstruction] = []
        at_once = max(2, together // self.restarts * self.restarts, self.restarts)
        for first in range(0, len(members), at_once):
            part = members[first : first + at_once]
            finished = None if workspace is None else workspace / f"{first}.safetensors"
            if rows := _load(finished):
                found += rows
                continue

            def report(step: int, first: int = first, count: int = len(part)) -> None:
                done = first * self.steps + min(step, self.steps) * count
                progress(f"inverting with {self.name}", done, len(members) * self.steps)

            stacked = part if len(part) > 1 else part * 2  # see Client: never alone
            problem = self._problem(
                [updates[victim] for victim, _ in stacked],
                network,
                known=[known[victim] for victim, _ in stacked],
                victims=torch.tensor([victim for victim, _ in stacked]),
                starts=tuple(start for _, start in stacked),
                seed=seed,
                device=runtime.device,
            )
            job = Job(
                runtime=runtime,
                seed=seed,
                workspace=None if workspace is None else workspace / f"{first}",
                checkpoint_seconds=checkpoint_seconds,
            )
            rows = self._finished(problem, self._solve(problem, report, job))[: len(part)]
            if finished is not None:
                _save(finished, rows)
                shutil.rmtree(finished.with_suffix(""), ignore_errors=True)
            found += rows
            report(self.steps)
        groups = [found[i : i + self.restarts] for i in range(0, len(found), self.restarts)]
        return [_choose(group) for group in groups]

    def _problem(
        self,
        updates: Sequence[Update],
        network: nn.Module,
        *,
        known: Sequence[Tensor | None],
        victims: Tensor,
        starts: tuple[int, ...],
        seed: int,
        device: torch.device,
    ) -> Problem:
        """Stack what members have to solve."""
        dtype = torch.promote_types(next(iter(updates[0].values.values())).dtype, self.precision)
        client = Client.of(updates, network, device=device, dtype=dtype)
        moments = [sent_moments(update, network) for update in updates]
        labels = [one for one in known if one is not None]  # of all members or of none, see Client
        counted = labels and updates[0].labels is None and updates[0].images > 1
        heads = [Head.of(update).bias for update in updates] if counted else []
        biases = [bias for bias in heads if bias is not None]
        evidence = Evidence.of(updates, aware=self.aware, device=device, dtype=dtype)
        problem = Problem(
            client=client,
            evidence=evidence,
            unit=torch.ones_like(evidence.floor),
            known=torch.stack(labels).to(device) if labels else None,
            bias=torch.stack(biases).to(device, dtype) if biases else None,
            victims=victims.to(device),
            starts=starts,
            seed=seed,
            moments={
                name: torch.stack([one[name] for one in moments]).to(device, dtype) for name in moments[0]
            },
        )
        return calibrated(problem, selective=self._selective)

    @property
    def _selective(self) -> bool:
        """Whether tensors that hardly depend on the image are left out of distances."""
        return True

    @abstractmethod
    def _solve(self, problem: Problem, report: Callable[[int], None], job: Job) -> Solved:
        """Look for images and labels; `report` is told every finished step, `job` says what to keep of it."""

    def _distance(self, problem: Problem, gradient: Tensors) -> Tensor:
        """Return how far gradients are from what was sent, relative to those of random images, (members,)."""
        return problem.evidence.distance(gradient) / problem.unit

    def _floor(self, problem: Problem) -> Tensor:
        """Return the distance that noise explains by itself, (members,)."""
        return problem.evidence.floor / problem.unit

    def _labels(self, update: Update, network: nn.Module) -> Tensor | None:
        if update.labels is not None:
            return torch.tensor(update.labels)
        return infer_labels(update, network, aware=self.aware) if self.labels == "infer" else None

    @torch.no_grad()
    def _finished(self, problem: Problem, solved: Solved) -> list[Reconstruction]:
        """Measure what came back, whatever the method says of it."""
        x = solved.x.nan_to_num(0.5).clamp(0, 1)
        y = solved.y.nan_to_num(0.0)
        distances = self._distance(problem, problem.client.gradient(x, y))
        finite = torch.isfinite(distances).tolist()
        floors = self._floor(problem).tolist()
        members = []
        for i, end in enumerate(solved.ends):
            end = end if finite[i] or end.startswith(FAILED) else f"{FAILED}the gradient is not finite"
            members.append(
                Reconstruction(
                    images=x[i].float().cpu(),
                    labels=y[i].argmax(1).cpu(),
                    distance=torch.inf if end.startswith(FAILED) else float(distances[i]),
                    distances=(),
                    floor=floors[i],
                    end=end,
                    steps=solved.steps[i],
                    history=tuple((step, row[i]) for step, row in solved.history if step <= solved.steps[i]),
                    equations=int(problem.evidence.equations[i]),
                    unknowns=x[i].numel() + (y[i].numel() if problem.known is None else 0),
                )
            )
        return members


# What JSON can say of a reconstruction.
_PLAIN = [
    field.name for field in dataclasses.fields(Reconstruction) if field.name not in ("images", "labels")
]


def _choose(restarts: Sequence[Reconstruction]) -> Reconstruction:
    """Return the restart whose gradient is nearest to what was sent; the truth plays no part."""
    best = min(restarts, key=lambda one: one.distance)
    return dataclasses.replace(best, distances=tuple(one.distance for one in restarts))


def _save(path: Path, rows: Sequence[Reconstruction]) -> None:
    """Write what came of the members of a pass."""
    tensors = {f"images/{i}": row.images for i, row in enumerate(rows)}
    tensors |= {f"labels/{i}": row.labels for i, row in enumerate(rows)}
    rest = [{name: getattr(row, name) for name in _PLAIN} for row in rows]
    save_state(path, tensors, {"members": rest})


def _load(path: Path | None) -> list[Reconstruction]:
    """Return what `_save` wrote, or nothing if it wrote nothing."""
    state = load_state(path)
    if state is None:
        return []
    tensors, record = state
    rows = []
    for i, rest in enumerate(record["members"]):
        history = tuple((step, distance) for step, distance in rest.pop("history"))
        distances = tuple(rest.pop("distances"))
        images, labels = tensors[f"images/{i}"], tensors[f"labels/{i}"]
        rows.append(
            Reconstruction(**rest, images=images, labels=labels, distances=distances, history=history)
        )
    return rows
