"""Audit what updates give away: every inversion against every defence, with controls beside each failure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from privet.errors import OutputError, UsageError
from privet.files import append_line, claim, finish, read_lines, write_bytes
from privet.images import ImageSet
from privet.leakage import Analytic, Gallery, Inversion
from privet.leakage.attack import Attack, attack_once, digest, others, summary, victim_row
from privet.leakage.defences import create_defence
from privet.leakage.measure import Success, matched
from privet.leakage.victims import Victim, simulate
from privet.learning import Runtime
from privet.learning.confidence import clopper_pearson
from privet.learning.runtime import describe_device
from privet.models.weights import read_tensors
from privet.progress import Progress, silent
from privet.version import VERSION

CELLS, IMAGES = "cells.jsonl", "cells"
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


@dataclass(frozen=True, kw_only=True)
class LeakagePlan:
    """The grid: every inversion against every defence, aware of it and naively.

    Attributes:
        inversions: each kind once; the first that searches also attacks single layers.
        defences: names for `create_defence`; "none" is always attacked as well, as the control.
        layers: whether single layers are attacked.
        clients: who is attacked.
        success: what counts as recovered, fixed before the runs.
        seed: of the choice of images, the defences and the attacks.
    """

    inversions: tuple[Inversion, ...]
    defences: tuple[str, ...] = (NONE,)
    layers: bool = True
    clients: Clients = field(default_factory=Clients)
    success: Success = field(default_factory=Success)
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
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class LeakageAudit:
    """A finished audit.

    Attributes:
        plan: the grid.
        results: of each setting, as JSON values.
        images: what each setting found, matched to the private images, uint8.
        victims: by defence, in one order.
        errors: of each defence: see `gradient_errors`.
        public: images of the same kind, in [0, 1], or None.
        gallery: photographs to be identified in, or None.
        run: what the results depend on.
    """

    plan: LeakagePlan
    results: dict[Setting, dict[str, Any]]
    images: dict[Setting, Tensor]
    victims: dict[str, list[Victim]]
    errors: dict[str, dict[str, float]]
    public: Tensor | None
    gallery: Gallery | None
    run: dict[str, Any]

    @property
    def judged(self) -> list[Setting]:
        """The settings whose success counts: whole updates under the defences that were asked for."""
        return [one for one in self.results if one.attacker != LAYER and one.defence in self.plan.defences]

    @property
    def highest(self) -> float:
        """The highest upper 95 % bound of the probability of success under any setting that counts."""
        return max(float(self.results[one]["summary"]["bounds"][1]) for one in self.judged)


def audit_leakage(
    model: nn.Module,
    images: ImageSet,
    *,
    architecture: str,
    out: Path,
    plan: LeakagePlan,
    runtime: Runtime,
    source: dict[str, Any],
    public: Tensor | None = None,
    gallery: Gallery | None = None,
    progress: Progress = silent,
    finished: Callable[[Setting, dict[str, Any], int, int], None] | None = None,
) -> LeakageAudit:
    """Attack simulated clients in every way of a plan. A killed audit goes on with the same call.

    Args:
        model: the network, as the server sent it.
        images: whose first classes are the network's.
        architecture: the network's name.
        out: a folder for cells.jsonl, what was found, and run.json.
        plan: the grid.
        runtime: where.
        source: where images and network come from, for the report.
        public: images of the same kind that are not private, in [0, 1], for the baselines.
        gallery: of the people whom the images show; the private photographs are left out.
        progress: told about steps.
        finished: told about each setting, its result, and how many of how many are done.

    Raises:
        OutputError: `out` holds something else, or a damaged audit.
        UsageError: too few images, or an inversion that cannot be applied.
    """
    victims = {
        name: simulate(
            model,
            images,
            architecture=architecture,
            defence=None if name == NONE else create_defence(name),
            seed=plan.seed,
            **asdict(plan.clients),
        )
        for name in dict.fromkeys((NONE, *plan.defences))
    }
    gallery = others(gallery, victims[NONE], plan.success)
    run = {
        "privet": VERSION,
        "plan": plan.record(),
        "source": source,
        "victims": digest(victims[NONE], public),
        "gallery": gallery and gallery.record(),
        "device": describe_device(runtime.device, torch.get_num_threads()),
        "torch": torch.__version__,
    }
    claim(out, run)
    store = Store(out)
    settings = plan.settings(layers_of(model))
    for done, setting in enumerate(settings, start=1):
        if setting not in store.results:
            started = time.perf_counter()
            attacked = [_seen(victim, setting.layer) for victim in victims[setting.defence]]
            one = attack_once(
                attacked,
                plan.inversion(setting),
                runtime=runtime,
                success=plan.success,
                seed=plan.seed,
                gallery=gallery,
                progress=progress,
            )
            store.add(setting, _result(one), _pictures(one, attacked), seconds=time.perf_counter() - started)
        if finished is not None:
            finished(setting, store.results[setting], done, len(settings))
    finish(out, run, {})
    return LeakageAudit(
        plan=plan,
        results={setting: store.results[setting] for setting in settings},
        images={setting: store.images(setting) for setting in settings},
        victims=victims,
        errors={name: gradient_errors(victims[NONE], treated) for name, treated in victims.items()},
        public=public,
        gallery=gallery,
        run=run,
    )


class Store:
    """Finished settings: one JSON line each, and a file with the images that were found."""

    def __init__(self, out: Path) -> None:
        self.path, self.folder = out / CELLS, out / IMAGES
        self.results: dict[Setting, dict[str, Any]] = {}
        try:
            for line in read_lines(self.path):
                setting = Setting(**line["setting"])
                if self._file(setting).exists():
                    self.results[setting] = line["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self.path} is damaged: {error!r}. Delete it to run its cells again."
            ) from error

    def add(self, setting: Setting, result: dict[str, Any], images: Tensor, *, seconds: float) -> None:
        """Keep a finished setting; the line comes last, so a kill in between repeats the setting."""
        pixels = (255 * images).round().to(torch.uint8).contiguous()
        write_bytes(self._file(setting), safetensors.torch.save({"images": pixels}))
        line = {"setting": asdict(setting), "result": result, "seconds": round(seconds, 2)}
        append_line(self.path, line)
        self.results[setting] = result

    def images(self, setting: Setting) -> Tensor:
        """Return what a setting found, uint8, (images, 3, height, width)."""
        return read_tensors(self._file(setting))[0]["images"]

    def _file(self, setting: Setting) -> Path:
        return self.folder / f"{setting.name}.safetensors"


def layers_of(model: nn.Module) -> list[str]:
    """Return the layers that map their input linearly, by their names in records, first to last."""
    return [
        name.removeprefix("network.")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]


def gradient_errors(plain: Sequence[Victim], treated: Sequence[Victim]) -> dict[str, float]:
    """Return how far defended updates are from true ones: a stand-in for what the defence costs in accuracy.

    The relative L2 error after the best common scaling, sqrt(1 - cosine^2), which a learning rate cannot mend:
    0 if nothing was lost, 1 if nothing is left.

    Args:
        plain: clients without a defence.
        treated: the same clients with it.

    Returns:
        "one": the mean over clients; "mean": of the mean update of all of them, which the server applies.
    """
    pairs = [(_flat(one), _flat(other)) for one, other in zip(plain, treated, strict=True)]
    sums = [torch.stack(each).sum(0) for each in zip(*pairs, strict=True)]
    return {"one": sum(_error(*pair) for pair in pairs) / len(pairs), "mean": _error(sums[0], sums[1])}


def needed_victims(limit: float) -> int:
    """Return how many victims it takes for the upper bound of no success at all to reach a limit."""
    count = 1
    while clopper_pearson(0, count)[1] > limit:
        count += 1
    return count


def _seen(victim: Victim, layer: str) -> Victim:
    """Return the victim as somebody sees it who gets one layer alone and knows the labels."""
    if not layer:
        return victim
    update = victim.update
    values = {name: value for name, value in update.values.items() if name.rpartition(".")[0] == layer}
    return replace(victim, update=replace(update, values=values, labels=victim.labels))


def _result(one: Attack) -> dict[str, Any]:
    """Return what an attack came to, as JSON values."""
    return {
        "summary": summary(one.found),
        "identification": one.identified and one.identified.summary(),
        "victims": [
            victim_row(result, found) for result, found in zip(one.reconstructions, one.found, strict=True)
        ],
    }


def _pictures(one: Attack, victims: Sequence[Victim]) -> Tensor:
    """Return what an attack found, matched to the private images."""
    pairs = zip(one.reconstructions, victims, strict=True)
    return torch.cat(
        [matched(result, victim.images) for result, victim in pairs if victim.images is not None]
    )


def _flat(victim: Victim) -> Tensor:
    return torch.cat([value.double().flatten() for value in victim.update.values.values()])


def _error(one: Tensor, other: Tensor) -> float:
    cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    return math.sqrt(max(0.0, 1 - cosine**2))
