"""The grid of an audit, and the file that keeps each finished cell as one line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from privet.errors import OutputError, UsageError
from privet.files import append_line, read_lines
from privet.learning import Learner
from privet.models import create_model
from privet.recovery import create_recovery, uses_prior
from privet.recovery.prior import fingerprint

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind = TypeVar("Kind", bound="DataclassInstance")
DATA = ("clean", "random", "protected")
RECOVERIES = ("none", "jpeg-10", "jpeg-50", "jpeg-75", "grayscale", "versions", "adversarial-4")


@dataclass(frozen=True, order=True, kw_only=True)
class Cell:
    """One learner to train.

    Attributes:
        data: what it learns from: the clean, the randomly noised or the protected files.
        recovery: what is done against the protection.
        architecture: its network.
        seed: of weights, order and views.
    """

    data: str
    recovery: str
    architecture: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The grid: every combination of data, recovery, architecture and seed.

    Attributes:
        recoveries: names for `create_recovery`; "none" must be among them, as the reference.
        architectures: names for `create_model`.
        seeds: how often each cell is repeated, with which seeds.
        learner: how each learner trains, its architecture aside.
        prior: a folder or a model of the hub, for recoveries that denoise with one.
    """

    recoveries: tuple[str, ...] = RECOVERIES
    architectures: tuple[str, ...]
    seeds: tuple[int, ...]
    learner: Learner
    prior: str | None = None

    def __post_init__(self) -> None:
        for kind, values in (
            ("recovery", self.recoveries),
            ("architecture", self.architectures),
            ("seed", self.seeds),
        ):
            if not values or len(set(values)) < len(values):
                raise UsageError(
                    f"An audit needs at least one {kind}, and each only once; got {list(values)}."
                )
        if "none" not in self.recoveries:
            raise UsageError(
                "An audit needs the recovery 'none': without it there is nothing to compare with."
            )
        for architecture in self.architectures:
            create_model(architecture, classes=2, size=(32, 32))
        if self.prior is not None and not any(uses_prior(name, given=True) for name in self.recoveries):
            raise UsageError(
                f"None of the recoveries {', '.join(self.recoveries)} denoises with a prior: leave the prior out, or "
                "add one that does (purify, jcdp, avatar, versions)."
            )
        for recovery in self.recoveries:
            tried = create_recovery(recovery, prior=self.prior)
            for architecture in self.architectures:
                tried.adapt(replace(self.learner, architecture=architecture))

    def cells(self) -> list[Cell]:
        """Return all cells, those that share images next to each other, references first."""
        return [
            Cell(data=data, recovery=recovery, architecture=architecture, seed=seed)
            for recovery in self.recoveries
            for data in DATA
            for architecture in self.architectures
            for seed in self.seeds
        ]

    def learner_of(self, cell: Cell) -> Learner:
        """Return how a cell's learner trains, where its recovery makes one version of each image."""
        recovery = create_recovery(cell.recovery, prior=self.prior)
        return recovery.adapt(replace(self.learner, architecture=cell.architecture))

    def settings(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        learner = self.learner.record()
        learner.pop("architecture")
        return {
            "recoveries": list(self.recoveries),
            "prior": None if self.prior is None else fingerprint(self.prior),
            "architectures": list(self.architectures),
            "seeds": list(self.seeds),
            "learner": learner,
        }


def plan(
    preset: str,
    *,
    recoveries: tuple[str, ...] | None = None,
    architectures: tuple[str, ...] | None = None,
    seeds: int | None = None,
    epochs: int | None = None,
    flip: bool = True,
    prior: str | None = None,
) -> Plan:
    """Return a preset's grid, parts of it replaced.

    Args:
        preset: "paper" (the evaluation of the SEM paper: 40,000 steps at 50,000 images) or "cpu".
        recoveries: names, or None for all of them.
        architectures: names, or None for the preset's.
        seeds: how many, or None for the preset's.
        epochs: of each learner, or None for the preset's.
        flip: whether views are mirrored.
        prior: as in `Plan`.

    Raises:
        UsageError: no such preset, or an empty or unknown part.
    """
    if preset not in PRESETS:
        raise UsageError(f"Unknown preset {preset!r}; an audit has {', '.join(PRESETS)}.")
    grid = PRESETS[preset]
    if seeds is not None and seeds < 1:
        raise UsageError(f"An audit needs at least 1 seed, got {seeds}.")
    return replace(
        grid,
        prior=prior,
        recoveries=recoveries if recoveries is not None else grid.recoveries,
        architectures=architectures if architectures is not None else grid.architectures,
        seeds=tuple(range(seeds)) if seeds is not None else grid.seeds,
        learner=replace(grid.learner, epochs=grid.learner.epochs if epochs is None else epochs, flip=flip),
    )


PRESETS = {
    "paper": Plan(
        architectures=("resnet18", "vgg16", "densenet121"),
        seeds=(0, 1, 2),
        learner=Learner(epochs=103, schedule="step"),
    ),
    "cpu": Plan(
        architectures=("resnet10-w16", "vgg11-w16"),
        seeds=(0, 1),
        learner=Learner(epochs=20, attack_steps=5),
    ),
}


class RunStore(Generic[Kind]):
    """Finished cells, one JSON line each, in the order in which they finished."""

    def __init__(self, path: Path, kind: type[Kind]) -> None:
        """Read what is there.

        Args:
            path: of the file.
            kind: of the cells, a dataclass of JSON values.

        Raises:
            OutputError: it is damaged.
        """
        self.path = path
        self.results: dict[Kind, dict[str, Any]] = {}
        try:
            for line in read_lines(path):
                self.results[kind(**line["cell"])] = line["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} is damaged: {error!r}. Delete it to run its cells again.") from error

    def add(self, cell: Kind, result: dict[str, Any], *, seconds: float) -> None:
        """Keep a finished cell."""
        append_line(self.path, {"cell": asdict(cell), "result": result, "seconds": round(seconds, 2)})
        self.results[cell] = result
