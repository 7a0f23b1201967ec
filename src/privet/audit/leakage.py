"""Audit what updates give away: every inversion against every defence, with controls beside each failure."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from privet.audit.leakage_plan import LAYER, NONE, LeakagePlan, Setting, Store
from privet.audit.utility import defended_accuracy
from privet.files import WORKSPACE, claim, finish, released
from privet.images import ImageSet
from privet.leakage import Gallery
from privet.leakage.attack import Attack, attack_once, others
from privet.leakage.defences import create_defence
from privet.leakage.measure import matched
from privet.leakage.results import digest, summary, victim_row
from privet.leakage.victims import Victim, simulate
from privet.learning import Runtime
from privet.learning.confidence import clopper_pearson
from privet.learning.runtime import describe_device
from privet.learning.update import short
from privet.progress import Progress, silent
from privet.version import VERSION


@dataclass(frozen=True, kw_only=True, eq=False)
class LeakageAudit:
    """A finished audit.

    Attributes:
        plan: the grid.
        results: of each setting, as JSON values.
        images: what each setting found, matched to the private images, uint8.
        victims: by defence, in one order.
        errors: of each defence: see `gradient_errors`.
        accuracies: of networks trained with each defence (see `defended_accuracy`), or none without test images.
        chance: the accuracy of a guess: the share of the commonest class of the test images; 0 without any.
        public: images of the same kind, in [0, 1], or None.
        gallery: photographs to be identified in, or None.
        run: what the results depend on.
    """

    plan: LeakagePlan
    results: dict[Setting, dict[str, Any]]
    images: dict[Setting, Tensor]
    victims: dict[str, list[Victim]]
    errors: dict[str, dict[str, float]]
    accuracies: dict[str, float]
    chance: float
    public: Tensor | None
    gallery: Gallery | None
    run: dict[str, Any]

    @property
    def judged(self) -> list[Setting]:
        """The settings whose success counts: whole updates under the defences that were asked for."""
        return [one for one in self.results if one.attacker != LAYER and one.defence in self.plan.defences]

    @property
    def control_failed(self) -> bool:
        """Whether no inversion recovered anything without a defence either: then failures say nothing of defences."""
        controls = [self.results[Setting(method=one.name)] for one in self.plan.inversions]
        return all(one["summary"]["victims_recovered"] == 0 for one in controls)

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
    test: ImageSet | None = None,
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
        test: images with the same classes, to measure what each defence costs in accuracy, or None.
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
        "images": images.digest,
        "test": test and test.digest,
        "gallery": gallery and gallery.record(),
        "device": describe_device(runtime.device, torch.get_num_threads()),
        "torch": torch.__version__,
    }
    claim(out, run)
    store = Store(out)
    settings = plan.settings(layers_of(model))
    for done, setting in enumerate(settings, start=1):
        if setting not in store.results:
            started, unfinished = time.perf_counter(), out / WORKSPACE / f"setting-{done}"
            attacked = [_seen(victim, setting.layer) for victim in victims[setting.defence]]
            with released(out):
                one = attack_once(
                    attacked,
                    plan.inversion(setting),
                    runtime=runtime,
                    success=plan.success,
                    seed=plan.seed,
                    gallery=gallery,
                    workspace=unfinished,
                    progress=progress,
                )
            store.add(setting, _result(one), _pictures(one, attacked), seconds=time.perf_counter() - started)
            shutil.rmtree(unfinished, ignore_errors=True)
        if finished is not None:
            finished(setting, store.results[setting], done, len(settings))
    if test is not None:
        for name in victims:
            if name in store.accuracies:
                continue
            trained = defended_accuracy(
                model,
                images,
                test,
                architecture=architecture,
                clients=plan.clients,
                defence=None if name == NONE else create_defence(name),
                rounds=plan.rounds,
                seed=plan.seed,
                runtime=runtime,
                progress=progress,
            )
            store.add_accuracy(name, trained)
    finish(out, run, {})
    return LeakageAudit(
        plan=plan,
        results={setting: store.results[setting] for setting in settings},
        images={setting: store.images(setting) for setting in settings},
        victims=victims,
        errors={name: gradient_errors(victims[NONE], treated) for name, treated in victims.items()},
        accuracies=store.accuracies,
        chance=0.0 if test is None else float(torch.bincount(test.labels).max()) / len(test),
        public=public,
        gallery=gallery,
        run=run,
    )


def layers_of(model: nn.Module) -> list[str]:
    """Return the layers that map their input linearly, by their names in records, first to last."""
    return [
        short(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]


def gradient_errors(plain: Sequence[Victim], treated: Sequence[Victim]) -> dict[str, float]:
    """Return how far defended updates are from true ones.

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
