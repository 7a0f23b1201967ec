"""The grid of a leakage audit, and where its finished settings are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from privet.errors import OutputError, UsageError
from privet.files import append_line, read_lines, write_bytes
from privet.leakage import Analytic, Inversion
from privet.leakage.defences import create_defence
from privet.leakage.measure import Success
from privet.models.weights import read_tensors

CELLS, IMAGES, ACCURACIES = "cells.jsonl", "cells", "accuracies.jsonl"
NONE = "none"
PLAIN, AWARE, NAIVE, LAYER = "plain", "aware", "naive", "layer"


@dataclass(frozen=True, order=True, kw_only=True)
class Setting:
    """One cell of the grid: all victims, attacked in one way.

    Attributes:
        method: the inversion.
        defence: what clients did before they sent, or "none".
        attacker: "plain" (nothing was done), "aware" of what was done, or "naive"; "layer": nothing was done, but
            only one layer's gradient arrived, and the labels are known.
        layer: which one.
    """

    method: str
    defence: str = NONE
    attacker: str = PLAIN
    layer: str = ""

    @property
    def name(self) -> str:
        """A file name."""
        return "_".join(part for part in (self.method, self.defence, self.attacker, self.layer) if part)


@dataclass(frozen=True, kw_only=True)
class Clients:
    """The simulated clients, as for `simulate`."""

    victims: int = 10
    batch_size: int = 1
    local_steps: int = 1
    learning_rate: float = 0.1
    labels_known: bool = False
    statistics: bool = False


@dataclass(frozen=True, kw_only=True)
class LeakagePlan:
    """The grid: every inversion against every defence, aware of it and naively.

    Attributes:
        inversions: each kind once; the first that searches also attacks single layers.
        defences: names for `create_defence`; "none" is always attacked as well, as the control.
        layers: whether single layers are attacked.
        clients: who is attacked.
        success: what counts as recovered, fixed before the runs.
        rounds: steps of the server in the training that shows what a defence costs, if there are test images.
        seed: of the choice of images, the defences and the attacks.
    """

    inversions: tuple[Inversion, ...]
    defences: tuple[str, ...] = (NONE,)
    layers: bool = True
    clients: Clients = field(default_factory=Clients)
    success: Success = field(default_factory=Success)
    rounds: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, names in (
            ("inversion", [one.name for one in self.inversions]),
            ("defence", self.defences),
        ):
            if not names or len(set(names)) < len(names):
                raise UsageError(
                    f"An audit needs at least one {kind}, and each only once; got {list(names)}."
                )
        if self.rounds < 1:
            raise UsageError(f"Expected at least one round, got {self.rounds}.")
        for defence in self.defences:
            if defence != NONE:
                create_defence(defence)

    def settings(self, layers: Sequence[str]) -> list[Setting]:
        """Return all cells, controls first.

        Args:
            layers: of the network that can be attacked one by one.
        """
        names = [one.name for one in self.inversions]
        grid = [Setting(method=name) for name in names]
        grid += [
            Setting(method=name, defence=defence, attacker=attacker)
            for defence in self.defences
            if defence != NONE
            for name in names
            for attacker in (AWARE, NAIVE)
        ]
        searching = [name for name in names if name != Analytic.name]
        if self.layers and searching:
            grid += [Setting(method=searching[0], attacker=LAYER, layer=layer) for layer in layers]
        return grid

    def inversion(self, setting: Setting) -> Inversion:
        """Return the inversion that a setting takes."""
        chosen = next(one for one in self.inversions if one.name == setting.method)
        return replace(chosen, aware=setting.attacker != NAIVE)

    def record(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "inversions": [one.record() for one in self.inversions],
            "defences": list(self.defences),
            "layers": self.layers,
            "clients": asdict(self.clients),
            "success": asdict(self.success),
            "rounds": self.rounds,
            "seed": self.seed,
        }


class Store:
    """Finished settings: one JSON line each, and a file with the images that were found.

    Attributes:
        results: of each finished setting.
        accuracies: after training with each defence, as far as that was measured.
    """

    def __init__(self, out: Path) -> None:
        self.path, self.folder, self.trained = out / CELLS, out / IMAGES, out / ACCURACIES
        self.results: dict[Setting, dict[str, Any]] = {}
        self.accuracies: dict[str, float] = {}
        path = self.path
        try:
            for line in read_lines(path):
                setting = Setting(**line["setting"])
                if self._file(setting).exists():
                    self.results[setting] = line["result"]
            path = self.trained
            self.accuracies = {line["defence"]: float(line["accuracy"]) for line in read_lines(path)}
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} is damaged: {error!r}. Delete it to run its cells again.") from error

    def add(self, setting: Setting, result: dict[str, Any], images: Tensor, *, seconds: float) -> None:
        """Keep a finished setting; the line comes last, so a kill in between repeats the setting."""
        pixels = (255 * images).round().to(torch.uint8).contiguous()
        write_bytes(self._file(setting), safetensors.torch.save({"images": pixels}))
        line = {"setting": asdict(setting), "result": result, "seconds": round(seconds, 2)}
        append_line(self.path, line)
        self.results[setting] = result

    def add_accuracy(self, defence: str, accuracy: float) -> None:
        """Keep what training with a defence came to."""
        append_line(self.trained, {"defence": defence, "accuracy": accuracy})
        self.accuracies[defence] = accuracy

    def images(self, setting: Setting) -> Tensor:
        """Return what a setting found, uint8, (images, 3, height, width)."""
        return read_tensors(self._file(setting))[0]["images"]

    def _file(self, setting: Setting) -> Path:
        return self.folder / f"{setting.name}.safetensors"
