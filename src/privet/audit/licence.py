"""Audit a release and its licence: who learns from the files, with the licence and without."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from privet.audit.licence_plan import DISTILLED, LICENSEE, RECOVERY, LicencePlan, Seat
from privet.audit.licence_verdict import LicenceRow, LicenceVerdict, judge_licence, licence_rows
from privet.audit.outsiders import Released, Sets, prepare
from privet.audit.pool import each, looks
from privet.audit.statistics import chance
from privet.audit.store import RunStore
from privet.errors import InputError
from privet.files import WORKSPACE, claim, finish, write_bytes
from privet.images import align, open_images, pair
from privet.learning import Runtime, learn
from privet.learning.runtime import describe_device
from privet.licensing import Licence, verify
from privet.models import SavedModel, create_model, load_model, save_model
from privet.progress import Progress, silent
from privet.version import VERSION

CELLS = "cells.jsonl"
TEACHER, INITIAL = "licensee.safetensors", "initial.safetensors"
BATCH = 512


@dataclass(frozen=True, kw_only=True)
class LicenceAudit:
    """A finished audit.

    Attributes:
        plan: the grid.
        results: of each learner, as JSON values.
        table: seeds put together.
        verdict: what it comes to.
        facts: of files and licence: pairs, test images, chance, the largest change, what the licence holds.
        run: what the results depend on.
    """

    plan: LicencePlan
    results: dict[Seat, dict[str, Any]]
    table: tuple[LicenceRow, ...]
    verdict: LicenceVerdict
    facts: dict[str, Any]
    run: dict[str, Any]


def audit_licence(
    folder: Path,
    licence: Licence,
    *,
    clean: str | Path,
    test: str | Path,
    out: Path,
    plan: LicencePlan,
    runtime: Runtime,
    split: str | None = None,
    test_split: str | None = None,
    workers: int = 1,
    progress: Progress = silent,
    finished: Callable[[Seat, dict[str, Any], int, int], None] | None = None,
) -> LicenceAudit:
    """Train the licensee and everybody else on a release. A killed audit goes on with the same call.

    Args:
        folder: the release.
        licence: for it; the audit is its vendor's.
        clean: the originals.
        test: clean images of the same classes that nobody trains on.
        out: folder for cells.jsonl and run.json; nothing secret stays in it.
        plan: the grid.
        runtime: where.
        split: of the originals, as for `open_images`.
        test_split: of the test images, likewise.
        workers: learners trained at a time, each in a process of its own.
        progress: told about images while files are read, and while learners train.
        finished: told about each learner, its result, and how many of how many are done.

    Raises:
        LicenceError: the release or the licence does not hold.
        InputError: the sets do not belong together.
        OutputError: `out` holds something else.
    """
    verify(folder, licence=licence, progress=progress)
    protected = open_images(folder, progress=progress)
    originals = open_images(clean, size=protected.size, split=split, progress=progress)
    tested = open_images(test, size=protected.size, split=test_split, progress=progress)
    tested = align(tested, originals.class_names)
    originals, protected = pair(originals, protected)
    for architecture in plan.architectures:  # before hours of work
        create_model(architecture, classes=originals.classes, size=originals.size)
    threads = 1 if runtime.device.type == "cpu" else torch.get_num_threads()
    run = {
        "privet": VERSION,
        "plan": plan.settings(),
        "release": licence.terms.release,
        "commitments": licence.commitments,
        "clean": originals.digest,
        "protected": protected.digest,
        "test": tested.digest,
        "precision": runtime.precision,
        "compile": runtime.compile,
        "device": describe_device(runtime.device, threads),
        "torch": torch.__version__,
    }
    claim(out, run)
    bare = [one.without_files() for one in (originals, protected, tested)]
    release = Released(
        clean=bare[0],
        protected=bare[1],
        test=bare[2],
        unlocked=licence.unlock(bare[1]),
        presented=licence.present(bare[2]),
        asked=licence.present(bare[1]),
        stem=licence.stem,
        lock=licence.lock is not None,
        prior=plan.prior,
    )
    initial = out / WORKSPACE / INITIAL if licence.weights else None
    if initial is not None:
        write_bytes(initial, safetensors.torch.save(licence.weights), private=True)
    store = RunStore(out / CELLS, Seat)
    seats = plan.seats(
        stem=licence.stem is not None, lock=licence.lock is not None, weights=bool(licence.weights)
    )
    arguments = (release, plan, runtime, out / WORKSPACE, initial)

    def keep(trained: tuple[Seat, dict[str, Any], float]) -> None:
        seat, result, seconds = trained
        store.add(seat, result, seconds=seconds)
        if finished is not None:
            finished(seat, result, sum(one in store.results for one in seats), len(seats))

    # The licensee's network must be there before anybody imitates it.
    for imitators in (False, True):
        todo = [one for one in seats if one not in store.results and (one.who == DISTILLED) == imitators]
        each(
            todo,
            Trainer,
            arguments,
            keep=keep,
            images=[looks(plan.learner_of(seat, weights=None), len(originals)) for seat in todo],
            workers=workers,
            threads=threads,
            progress=progress,
        )
    results = {seat: store.results[seat] for seat in seats}
    table = licence_rows(results)
    at_random = chance(tested)
    audit = LicenceAudit(
        plan=plan,
        results=results,
        table=tuple(table),
        verdict=judge_licence(plan, table, chance=at_random),
        facts={
            "pairs": len(originals),
            "test": len(tested),
            "chance": at_random,
            "size": list(originals.size),
            "classes": list(originals.class_names),
            "linf": _largest(originals.pixels, protected.pixels),
            "holds": [name for name in ("stem", "lock", "weights") if name in licence.commitments],
            "unlocked": _exactness(release),
        },
        run=run,
    )
    finish(out, run, {"verdict": audit.verdict.grade})
    return audit


def _exactness(release: Released) -> dict[str, float] | None:
    """Return how far what the licensee trains on is from the originals under the same stem, in 1/255; or None."""
    if not release.lock:
        return None
    pixels = release.clean.pixels
    if release.stem is not None:
        pixels = release.stem.apply_to(pixels)
    unlocked = release.unlocked.pixels
    return {
        "largest": _largest(pixels, unlocked),
        "values": float((unlocked != pixels).float().mean()),
    }


def _largest(pixels: Tensor, changed: Tensor) -> int:
    """Return the largest change of a value, in 1/255."""
    return int((changed.to(torch.int16) - pixels.to(torch.int16)).abs().max())


class Trainer:
    """Trains one learner after the other, keeping the images that the last one used."""

    def __init__(
        self, release: Released, plan: LicencePlan, runtime: Runtime, folder: Path, initial: Path | None
    ) -> None:
        self.release, self.plan, self.runtime = release, plan, runtime
        self.folder, self.initial = folder, initial
        self.who = ""
        self.sets: Sets

    def __call__(self, seat: Seat, progress: Progress) -> tuple[Seat, dict[str, Any], float]:
        """Return the seat, its result as JSON values, and the seconds that it took."""
        started = time.perf_counter()
        if self.who != seat.who:
            self.sets = prepare(
                seat.who,
                self.release,
                architecture=seat.architecture,
                share=self.plan.share,
                runtime=self.runtime,
            )
            self.who = seat.who
        learner = self.plan.learner_of(seat, weights=self.initial)
        if seat.who.startswith(RECOVERY):
            learner = learner.for_versions(len(self.sets[0]) // len(self.release.protected))
        name = "-".join(str(part) for part in (seat.who, seat.architecture, seat.seed, seat.freedom))
        checkpoint = self.folder / f"{name.replace('/', '-').replace(':', '-').replace(' ', '-')}.safetensors"
        learned = learn(
            *self.sets,
            learner,
            runtime=self.runtime,
            seed=seat.seed,
            answers=self._answers() if seat.who == DISTILLED else None,
            checkpoint=checkpoint,
            progress=progress,
        )
        main, first = self.plan.architectures[0], self.plan.seeds[0]
        if seat == Seat(who=LICENSEE, architecture=main, seed=first):
            about = SavedModel(
                architecture=main,
                class_names=self.release.clean.class_names,
                size=self.release.clean.size,
            )
            save_model(self.folder / TEACHER, learned.model, about)
        checkpoint.unlink(missing_ok=True)
        return seat, learned.record(), time.perf_counter() - started

    @torch.no_grad()
    def _answers(self) -> Tensor:
        """Return what the licensee's network says of the release, which it is asked about file by file."""
        if not (self.folder / TEACHER).exists():
            raise InputError(f"{self.folder / TEACHER} is gone. Delete the audit's folder and begin again.")
        model = self.runtime.place(load_model(self.folder / TEACHER)[0]).eval()
        parts = torch.split(self.release.asked.pixels, BATCH)
        return torch.cat([model(part.to(self.runtime.device).float() / 255).float().cpu() for part in parts])
