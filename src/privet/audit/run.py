"""Run an audit: train every learner of the grid on written files, and say what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from privet.audit.flags import Facts, Flag, PriorFacts, find_flags
from privet.audit.pool import each, looks
from privet.audit.statistics import Row, chance, rows
from privet.audit.store import DATA, Cell, Plan, RunStore
from privet.audit.verdict import Verdict, judge
from privet.errors import InputError, UsageError
from privet.files import (
    WORKSPACE,
    append_line,
    claim,
    finish,
    read_lines,
    released,
    write_bytes,
)
from privet.images import Budget, ImageSet, Similarity, align, by_psnr, compare_all, open_images, pair
from privet.images.image_set import SourceFile
from privet.images.picture import PictureError, decode
from privet.images.similarity import compare
from privet.learning import Job, Runtime, learn
from privet.learning.publication import protection_record, versions
from privet.learning.runtime import describe_device
from privet.models import create_model
from privet.progress import Progress, silent
from privet.protection import RandomNoise, publish
from privet.recovery import create_recovery, load_prior, noise_error
from privet.recovery.prior import fingerprints
from privet.version import VERSION

CONTROL = "control"
LARGE = 32  # in 1/255; beyond it nobody claims an L-infinity budget
CELLS, COSTS, EXAMPLES = "cells.jsonl", "recoveries.jsonl", "examples.safetensors"
SHOWN = 8  # images kept to look at


@dataclass(frozen=True, kw_only=True)
class Material:
    """The files of an audit, opened: the same images three times, and clean test images."""

    clean: ImageSet
    random: ImageSet
    protected: ImageSet
    test: ImageSet
    similarities: tuple[Similarity, ...]  # of each protected image to its original
    shown: tuple[int, ...]  # images to look at, those that were changed most
    facts: Facts

    def sets(self) -> dict[str, ImageSet]:
        """Return what learners need, without the means to read files again."""
        every = {name: getattr(self, name) for name in (*DATA, "test")}
        return {name: images.without_files() for name, images in every.items()}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A finished audit.

    Attributes:
        plan: the grid.
        material: the files.
        results: of each cell, as JSON values.
        table: the results, seeds put together.
        flags: reasons for doubt.
        verdict: what it comes to.
        costs: of each recovery of the protected images: seconds (None if it was interrupted) and facts.
        examples: what each recovery that changes images made of the shown ones, uint8; all of them once for each
            version that it makes.
        run: what the results depend on.
    """

    plan: Plan
    material: Material
    results: dict[Cell, dict[str, Any]]
    table: tuple[Row, ...]
    flags: tuple[Flag, ...]
    verdict: Verdict
    costs: dict[str, dict[str, Any]]
    examples: dict[str, torch.Tensor]
    run: dict[str, Any]


def run_audit(
    clean: str | Path,
    protected: str | Path,
    *,
    test: str | Path,
    out: Path,
    plan: Plan,
    runtime: Runtime,
    seed: int = 0,
    size: int | None = None,
    split: str | None = None,
    test_split: str | None = None,
    limit: int | None = None,
    workers: int = 1,
    progress: Progress = silent,
    finished: Callable[[Cell, dict[str, Any], int, int], None] | None = None,
) -> Audit:
    """Measure what a protection is worth, on files.

    Args:
        clean: the images as they were; anything `open_images` takes.
        protected: the same images as published, under the same names.
        test: clean images that nobody trains on.
        out: folder for the control's files, cells.jsonl and run.json; a killed audit goes on there.
        plan: the grid.
        runtime: where learners train.
        seed: of the random control.
        size: as for `open_images`.
        split: of the clean images, likewise.
        test_split: of the test images, likewise.
        limit: use only so many of the clean images, likewise.
        workers: learners trained at a time, each in a process of its own with one thread. On a CPU
            two such processes do more than one with two threads; on a GPU leave it at 1.
        progress: told about images while files are prepared, and while learners train.
        finished: told about each cell, its result, and how many of how many are done.

    Raises:
        InputError: the sets do not belong together.
        OutputError: `out` holds another audit.
    """
    first = open_images(clean, size=size, split=split, limit=limit, progress=progress)
    second = open_images(protected, size=first.size, progress=progress)
    third = open_images(test, size=first.size, split=test_split, progress=progress)
    for architecture in plan.architectures:  # before hours of work
        create_model(architecture, classes=first.classes, size=first.size)
    threads = 1 if runtime.device.type == "cpu" else torch.get_num_threads()
    run = {
        "privet": VERSION,
        "plan": plan.settings(),
        "seed": seed,
        "clean": first.digest,
        "protected": second.digest,
        "test": third.digest,
        "precision": runtime.precision,
        "compile": runtime.compile,
        # Recoveries and the control are made here, learners with one thread each.
        "device": describe_device(runtime.device, torch.get_num_threads()),
        "versions": versions(),
    }
    claim(out, run)
    with released(out):
        material = _prepare(
            first, second, third, protection_record(protected), plan, out, runtime, seed, progress
        )
    store = RunStore(out / CELLS, Cell)
    todo = [cell for cell in plan.cells() if cell not in store.results]
    total = len(plan.cells())
    sets = material.sets()
    measured = {(line["data"], line["recovery"]) for line in read_lines(out / COSTS)}
    for data, recovery in dict.fromkeys((cell.data, cell.recovery) for cell in todo):
        begun, started = _folder(out, data, recovery).exists(), time.perf_counter()
        _, found = recover(
            sets[data], data, recovery, plan=plan, out=out, runtime=runtime, seed=seed, progress=progress
        )
        seconds = None if begun else round(time.perf_counter() - started, 3)  # of a part it would mislead
        if (data, recovery) not in measured:
            append_line(out / COSTS, {"data": data, "recovery": recovery, "seconds": seconds, "facts": found})

    def keep(trained: tuple[Cell, dict[str, Any], float]) -> None:
        cell, result, seconds = trained
        store.add(cell, result, seconds=seconds)
        if finished is not None:
            finished(cell, result, total - len(todo) + sum(one in store.results for one in todo), total)

    each(
        todo,
        Trainer,
        (sets, plan, runtime, seed, out),
        keep=keep,
        images=[looks(plan.learner_of(cell), material.facts.paired) for cell in todo],
        workers=workers,
        threads=threads,
        progress=progress,
    )
    table = rows(plan, store.results)
    flags = find_flags(plan, table, material.facts)
    audit = Audit(
        plan=plan,
        material=material,
        results={cell: store.results[cell] for cell in plan.cells()},
        table=tuple(table),
        flags=tuple(flags),
        verdict=judge(plan, table, flags, material.facts),
        costs={line["recovery"]: line for line in read_lines(out / COSTS) if line["data"] == "protected"},
        examples=_examples(material, sets["protected"], plan, out, runtime, seed),
        run=run,
    )
    finish(out, run, {"verdict": audit.verdict.grade})
    return audit


def _prepare(
    clean: ImageSet,
    protected: ImageSet,
    test: ImageSet,
    protection: dict[str, Any] | None,
    plan: Plan,
    out: Path,
    runtime: Runtime,
    seed: int,
    progress: Progress,
) -> Material:
    """Pair the sets, measure what was changed, and write the random control."""
    total = len(clean) + len(protected)
    clean, protected = pair(clean, protected)
    test = align(test, clean.class_names)
    similarities = tuple(compare_all(clean.pixels, protected.pixels))
    linf = max(similarity.linf for similarity in similarities)
    if linf == 0:
        raise InputError("The protected images equal the clean ones: there is nothing to audit.")
    claimed = _claimed(protection)
    seen = {_bytes(image) for image in clean.pixels}
    facts = Facts(
        chance=chance(test),
        test=len(test),
        paired=len(clean),
        unpaired=total - 2 * len(clean),
        overlap=sum(_bytes(image) in seen for image in test.pixels),
        linf=linf,
        excess=_excess(claimed, clean, protected, similarities, protection),
        protection=protection,
        prior=_prior_facts(plan.prior, clean, test, runtime) if plan.prior else None,
    )
    # Last, when nothing more can be found wrong: a refused audit leaves nothing behind.
    noise = _control(similarities, clean.size, claimed)
    publish(clean, noise, out / CONTROL, runtime=runtime, seed=seed, progress=progress)
    random = align(open_images(out / CONTROL, size=clean.size, progress=progress), clean.class_names)
    return Material(
        clean=clean,
        random=random,
        protected=protected,
        test=test,
        similarities=similarities,
        shown=tuple(by_psnr(similarities, clean.names)[:SHOWN]),
        facts=facts,
    )


def _control(changes: Sequence[Similarity], size: tuple[int, int], claimed: Budget | None) -> RandomNoise:
    """Return random noise as large as the largest change (of pixels: as many as may), in the claimed norm.

    Without a claim small changes are taken for L-infinity, others for L2; L2 also stands in for no norm.
    """
    linf = max(change.linf for change in changes)
    norm = claimed.norm if claimed else "linf" if linf <= LARGE else "l2"
    if norm == "linf":
        return RandomNoise(epsilon=min(127, linf))
    if claimed and norm == "l0":
        return RandomNoise(norm="l0", epsilon=int(claimed.amount))
    for_each = Budget(norm="l2", amount=1).allowed(size, seen=size)
    return RandomNoise(norm="l2", epsilon=max(change.l2 for change in changes) / for_each)


def _prior_facts(source: str, clean: ImageSet, test: ImageSet, runtime: Runtime) -> PriorFacts:
    """Return what the prior has seen, and whether it knows images like these."""
    prior = load_prior(source, runtime=runtime)
    known = prior.images

    def seen(images: ImageSet) -> int | None:
        return None if known is None else sum(not known.isdisjoint(marks) for marks in fingerprints(images))

    return PriorFacts(
        clean=seen(clean),
        test=seen(test),
        own=prior.about.get("loss"),
        here=noise_error(prior, test, Job(runtime=runtime)),
    )


def _claimed(protection: dict[str, Any] | None) -> Budget | None:
    """Return the budget that run.json states, or None if it states none."""
    if not protection or "budget" not in protection:
        return None
    try:
        return Budget(**protection["budget"])
    except (TypeError, UsageError) as error:
        raise InputError(f"The run.json of the protected images states no budget: {error}") from error


def _excess(
    claimed: Budget | None,
    clean: ImageSet,
    protected: ImageSet,
    similarities: Sequence[Similarity],
    protection: dict[str, Any] | None,
) -> str | None:
    """Return by what an image exceeds the budget that run.json states, or None if none does.

    Of a file that has the size at which networks see it, its similarity is known. Others are compared themselves:
    to make them smaller smooths a change of single pixels away, or makes several of one.
    """
    if claimed is None:
        return None
    height, width = (protection or {}).get("size", clean.size)
    for one, other, similarity in zip(clean.files, protected.files, similarities, strict=True):
        if one.size != other.size:
            return (
                f"its size ({' x '.join(map(str, other.size))}, not {' x '.join(map(str, one.size))}); the "
                f"budget is {claimed.amount:g} ({claimed.norm})"
            )
        change = similarity if one.size == clean.size else _compare(one, other)
        if words := claimed.excess(change, one.size, seen=(height, width)):
            return words
    return None


def _compare(one: SourceFile, other: SourceFile) -> Similarity:
    """Compare two files at their own size."""
    try:
        before, after = decode(one.read()), decode(other.read())
    except PictureError as error:
        raise InputError(f"{other.file} could be read a moment ago, and now cannot: {error}") from error
    return compare(before.rgb, after.rgb, ssim=False)


def recover(
    images: ImageSet,
    data: str,
    recovery: str,
    *,
    plan: Plan,
    out: Path,
    runtime: Runtime,
    seed: int,
    progress: Progress = silent,
) -> tuple[ImageSet, dict[str, Any]]:
    """Return what a recovery makes of one of the three sets, from disk if it was made before, and its facts."""
    job = Job(runtime=runtime, seed=seed, workspace=_folder(out, data, recovery), progress=progress)
    return create_recovery(recovery, prior=plan.prior).recover(images, job), job.facts


def _examples(
    material: Material, protected: ImageSet, plan: Plan, out: Path, runtime: Runtime, seed: int
) -> dict[str, torch.Tensor]:
    """Return what recoveries made of the shown images; kept, for the recovered sets themselves are not."""
    path = out / EXAMPLES
    if not path.exists():
        index, found = list(material.shown), {}
        for recovery in plan.recoveries:
            images, _ = recover(
                protected, "protected", recovery, plan=plan, out=out, runtime=runtime, seed=seed
            )
            if images.pixels is not protected.pixels:
                every = images.pixels.reshape(-1, len(protected), *images.pixels.shape[1:])  # versions first
                found[recovery] = every[:, index].flatten(0, 1).contiguous()
        write_bytes(path, safetensors.torch.save(found))
    examples: dict[str, torch.Tensor] = safetensors.torch.load(path.read_bytes())
    return examples


def _folder(out: Path, data: str, recovery: str) -> Path:
    return out / WORKSPACE / f"{data}-{recovery}"


class Trainer:
    """Trains one cell after the other, keeping the images that the last one used."""

    def __init__(self, sets: dict[str, ImageSet], plan: Plan, runtime: Runtime, seed: int, out: Path) -> None:
        self.sets, self.plan, self.runtime, self.seed, self.out = sets, plan, runtime, seed, out
        self.key: tuple[str, str] | None = None
        self.images: tuple[ImageSet, ImageSet]

    def __call__(self, cell: Cell, progress: Progress) -> tuple[Cell, dict[str, Any], float]:
        """Return the cell, its result as JSON values, and the seconds that it took."""
        started = time.perf_counter()
        recovery = create_recovery(cell.recovery, prior=self.plan.prior)
        if self.key != (cell.data, cell.recovery):
            images, facts = recover(
                self.sets[cell.data],
                cell.data,
                cell.recovery,
                plan=self.plan,
                out=self.out,
                runtime=self.runtime,
                seed=self.seed,
            )
            self.images = images, recovery.present(self.sets["test"], facts)
            self.key = cell.data, cell.recovery
        learner = self.plan.learner_of(cell).for_versions(len(self.images[0]) // len(self.sets[cell.data]))
        name = f"{cell.data}-{cell.recovery}-{cell.architecture}-{cell.seed}".replace("/", "-").replace(
            ":", "-"
        )
        checkpoint = self.out / WORKSPACE / f"{name}.safetensors"
        learned = learn(
            *self.images,
            learner,
            runtime=self.runtime,
            seed=cell.seed,
            checkpoint=checkpoint,
            progress=progress,
        )
        checkpoint.unlink(missing_ok=True)
        return cell, learned.record(), time.perf_counter() - started


def _bytes(image: torch.Tensor) -> bytes:
    return bytes(image.contiguous().numpy().tobytes())
