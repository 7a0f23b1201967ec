"""What recoveries are worth: how much of what a protection took away they bring back.

    python benchmarks/recover.py --small       CIFAR-10, 5,000 images, small networks: hours on 2 cores
    python benchmarks/recover.py --large       Tiny-ImageNet, 64 pixels, likewise
    python benchmarks/recover.py --ablation    what each part of ours is worth, on CIFAR-10
    python benchmarks/recover.py --paper       CIFAR-10, 40,000 images, ResNet-18, a prior of 36 million weights: a GPU
    python benchmarks/recover.py --speed       ours against JCDP as released, in one run: minutes

The prior learns from images that are neither protected nor tested. Every recovered set is written and read again
before anything learns from it. The tables resume: every finished learner is one line of recover-NAME.jsonl in
--results, with the hardware, and a line is never measured twice; files and unfinished work are kept in --work. Where
both outlive the machine, a table can be filled in as many calls as it takes, each killed when its time is over, and
in parts (--only 'lsp/*/0'). The data are Parquet in the hub's
layout, found by --data or in the folder that PRIVET_DATA names.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from privet.files import append_line, read_lines, write_bytes, write_json
from privet.images import ImageSet, align, open_images
from privet.learning import Job, Learner, Runtime, accuracy, learn
from privet.learning.runtime import end_with_parent
from privet.protection import METHODS, publish
from privet.recovery import JCDP, PriorTraining, Purify, Versions, create_recovery, restore, train_prior
from privet.recovery.base import Recovery
from protect import Lines, entry, hardware, machines

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CLEAN = "clean"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A benchmark: protections, and what is tried against each.

    Attributes:
        data: folder of train.parquet and test.parquet.
        images: how many are protected, the first of the training images.
        reference: how many images after those the prior learns from.
        watched: test images on which a learner is measured after every epoch, or None for all. After the last
            epoch it is measured on all.
        preset: of the protections.
        protections: names; "clean" are the images as they are, on which a recovery shows what it costs.
        recoveries: names for `create_recovery`, or keys of `variants`; the dear ones last.
        once: more of them, measured with the first seed alone.
        variants: recoveries that have no name of their own, made with a prior.
        training: of the prior.
        learner: how every learner trains.
        seeds: of learners. Protections and recoveries have seed 0.
        close: a protection under recoveries that come out level with the seeds above, and three seeds more.
    """

    data: str
    images: int
    reference: int
    watched: int | None
    preset: str
    protections: tuple[str, ...]
    recoveries: tuple[str, ...]
    once: tuple[str, ...] = ()
    variants: dict[str, Callable[[str], Recovery]] = field(default_factory=dict)
    training: PriorTraining
    learner: Learner
    seeds: tuple[int, ...]
    close: tuple[tuple[str, str], ...]


def versions(prior: str, *names: str) -> Recovery:
    """Return versions of each image as these recoveries leave it."""
    return Versions(tuple(create_recovery(name, prior=prior) for name in names))


RECOVERIES = (
    "versions",
    "jpeg-10",
    "purify-gently",
    "none",
    "grayscale",
    "projection",
    "projection+versions",
    "jcdp",
    "avatar",
)
ONCE = ("jpeg-10+grayscale",)
SMALL = Table(
    data="cifar10",
    images=5000,
    reference=10_000,
    watched=1000,
    preset="cpu",
    protections=(CLEAN, "em", "sem", "tap", "lsp", "ar", "ops"),
    recoveries=(*RECOVERIES, "versions, colour denoised"),
    once=(*ONCE, "auto"),
    variants={
        "versions, colour denoised": lambda prior: versions(
            prior, "purify-gently", "purify-gently+grayscale", "jpeg-10+grayscale"
        ),
    },
    training=PriorTraining(scale="tiny", steps=6000, batch_size=32, learning_rate=1e-3),
    learner=Learner(architecture="resnet10-w16", epochs=20),
    seeds=(0, 1, 2),
    close=(
        ("ar", "versions"),
        ("ar", "purify-gently"),
        ("ar", "jcdp"),
        ("ar", "versions, colour denoised"),
    ),
)
TABLES = {
    "small": SMALL,
    "large": replace(
        SMALL,
        data="tiny-imagenet-20",
        images=3000,
        reference=6000,
        watched=None,
        protections=(CLEAN, "sem", "lsp"),
        recoveries=RECOVERIES,
        once=ONCE,
        close=(),
        # As many pixels a step as of the smaller images.
        training=PriorTraining(scale="tiny", steps=6000, batch_size=8, learning_rate=1e-3),
    ),
    "ablation": replace(
        SMALL,
        protections=(CLEAN, "em", "sem", "tap", "ops"),
        recoveries=(
            "versions",
            "versions without a prior",
            "versions, purify-1",
            "versions, no grayscale",
            "purify-gently+grayscale",
            "purify-gently",
            "pull",
            "ball",
            "perceptual",
            "lower levels",
            "two rounds",
            "two evaluations",
            "purify",
            "one round",
            "three rounds",
        ),
        once=(),
        variants={
            "versions without a prior": lambda prior: create_recovery("versions"),
            "versions, purify-1": lambda prior: versions(
                prior, "jpeg-10", "jpeg-10+grayscale", "purify-1+grayscale"
            ),
            "versions, no grayscale": lambda prior: versions(prior, "jpeg-10", "purify-gently"),
            "pull": lambda prior: replace(Purify.gently(prior), pull=0.1),
            "ball": lambda prior: replace(Purify.gently(prior), ball=12.0),
            "perceptual": lambda prior: replace(Purify.gently(prior), perceptual=1.0),
            "lower levels": lambda prior: replace(Purify.gently(prior), levels=(20, 10)),
            "two rounds": lambda prior: replace(Purify.gently(prior), rounds=2),
            "two evaluations": lambda prior: replace(Purify.gently(prior), levels=(30,), rounds=2),
            "one round": lambda prior: Purify(prior, rounds=1),
            "three rounds": lambda prior: Purify(prior, rounds=3),
        },
        seeds=(0,),
        close=(),
    ),
    "paper": replace(
        SMALL,
        images=40_000,
        reference=10_000,
        watched=None,
        preset="paper",
        protections=(CLEAN, "em", "sem", "rem", "tap", "lsp", "ar", "ops", "cuda"),
        recoveries=(*RECOVERIES, "adversarial-8", "coin"),
        once=ONCE,
        training=PriorTraining(scale="ddpm", steps=80_000, decay=0.9999),
        learner=Learner(epochs=120, schedule="step"),
        seeds=(0, 1, 2, 3, 4),
        close=(),
    ),
}


@dataclass(frozen=True, order=True, kw_only=True)
class Cell:
    """One learner of a table."""

    protection: str
    recovery: str
    seed: int

    def __str__(self) -> str:
        return f"{self.protection}/{self.recovery}/{self.seed}"


def cells(table: Table) -> Iterator[Cell]:
    """Go through a table's cells, one seed after the other, so that a short run fills all of it."""
    for seed in table.seeds:
        for recovery in (*(table.once if seed == table.seeds[0] else ()), *table.recoveries):
            for protection in table.protections:
                yield Cell(protection=protection, recovery=recovery, seed=seed)
    for seed in range(max(table.seeds) + 1, max(table.seeds) + 4):
        for protection, recovery in table.close:
            yield Cell(protection=protection, recovery=recovery, seed=seed)


class Bench:
    """Makes a table's files and trains learners on them, in one process."""

    def __init__(self, name: str, data: Path, work: Path, device: str, compile: bool) -> None:
        self.table, self.work = TABLES[name], work
        self.kind = "paper" if name == "paper" else "large" if name == "large" else "small"
        self.runtime = Runtime.find(device, compile=compile)
        folder = data / self.table.data
        every = open_images(folder / "train.parquet", limit=self.table.images + self.table.reference)
        self.clean = every.subset(list(range(self.table.images)))
        self.reference = every.subset(list(range(self.table.images, len(every))))
        self.test = align(open_images(folder / "test.parquet", size=self.clean.size), self.clean.class_names)
        self.watched = self.test.subset(list(range(self.table.watched or len(self.test))))
        self.prior = work / f"{self.kind}-prior"

    def train_prior(self) -> None:
        """Train the prior on the reference images, if that is not done, with as many threads as there are now."""
        if not (self.prior / "prior.json").exists():
            train_prior(
                self.reference, self.table.training, self.prior, runtime=self.runtime, progress=Lines()
            )

    @lru_cache(maxsize=1)  # noqa: B019 - for the next cell of the same files; there is one bench in a process
    def protected(self, protection: str) -> ImageSet:
        """Return protected files, made now if they are not there."""
        if protection == CLEAN:
            return self.clean
        out = self.work / f"{self.kind}-{protection}-0"
        publish(self.clean, METHODS[protection].preset(self.table.preset), out, runtime=self.runtime)
        return self._read(out)

    @lru_cache(maxsize=1)  # noqa: B019
    def recovered(self, protection: str, name: str) -> tuple[ImageSet, float | None, dict[str, Any]]:
        """Return recovered files, made now if they are not there, the seconds that it took, and its facts."""
        images, recovery = self.protected(protection), self.recovery(name)
        if recovery.trains or name == "none":
            return images, None, {}
        out = self.work / f"{self.kind}-{protection}-0-{name.replace(' ', '-')}"
        note, fresh, started = out.with_suffix(".seconds"), not out.exists(), time.perf_counter()
        facts = restore(images, recovery, out, runtime=self.runtime).run["facts"]
        if fresh:  # what goes on after an interruption is not timed
            note.write_text(f"{time.perf_counter() - started:.2f}")
        return self._read(out), float(note.read_text()) if note.exists() else None, facts

    def recovery(self, name: str) -> Recovery:
        """Return a recovery, or a variant of the table's."""
        if name in self.table.variants:
            return self.table.variants[name](str(self.prior))
        return create_recovery(name, prior=str(self.prior))

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Train one cell's learner; return its line for the results."""
        images, seconds, facts = self.recovered(cell.protection, cell.recovery)
        recovery, started = self.recovery(cell.recovery), time.perf_counter()
        checkpoint = self.work / f"{self.kind}-{cell.protection}-{cell.recovery}-{cell.seed}.safetensors"
        learned = learn(
            images,
            recovery.present(self.watched, facts),
            recovery.adapt(self.table.learner).for_versions(len(images) // self.table.images),
            runtime=self.runtime,
            seed=cell.seed,
            checkpoint=checkpoint,
        )
        checkpoint.unlink(missing_ok=True)
        return {
            "cell": asdict(cell),
            "last": accuracy(learned.model, recovery.present(self.test, facts), runtime=self.runtime),
            "best": learned.best.accuracy,
            "seconds": round(time.perf_counter() - started, 1),
            "recovery_seconds": seconds,
            "images": len(images),
            "test": len(self.test),
            "watched": len(self.watched),
            "hardware": hardware(self.runtime.device, torch.get_num_threads()),
        }

    def _read(self, out: Path) -> ImageSet:
        return align(open_images(out, size=self.clean.size), self.clean.class_names)


_bench: Bench
_until: float


def _start(name: str, data: Path, work: Path, device: str, compile: bool, until: float) -> None:
    global _bench, _until
    end_with_parent()
    torch.set_num_threads(1)
    _bench, _until = Bench(name, data, work, device, compile), until


def _work(cell: Cell) -> dict[str, Any] | None:
    """Return a cell's line, or None if the time is over."""
    return _bench(cell) if time.time() < _until else None


def run_table(
    name: str,
    data: Path,
    work: Path,
    results: Path,
    device: str,
    compile: bool,
    workers: int,
    seconds: float,
    only: str = "*",
) -> None:
    """Fill a table, or what `only` chooses of it, as far as the time allows, and write it after every cell."""
    path, until = results / f"recover-{name}.jsonl", time.time() + seconds
    results.mkdir(parents=True, exist_ok=True)
    done = {Cell(**line["cell"]) for line in read_lines(path)}
    todo = [cell for cell in cells(TABLES[name]) if cell not in done and fnmatch(str(cell), only)]
    print(f"{len(done)} cells are measured, {len(todo)} are left", flush=True)
    write_bytes(results / f"recover-{name}.md", markdown(name, read_lines(path)).encode())
    if not todo or not seconds:
        return
    Bench(name, data, work, device, compile).train_prior()
    with ProcessPoolExecutor(
        workers,
        mp_context=torch.multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(name, data, work, device, compile, until),
    ) as pool:
        # Row by row: no two cells of a row need the same files, so each is made once, by the cell that needs it first.
        for seed, recovery in dict.fromkeys((cell.seed, cell.recovery) for cell in todo):
            row = [cell for cell in todo if (cell.seed, cell.recovery) == (seed, recovery)]
            for line in pool.map(_work, row):
                if line is not None:
                    keep(path, line)
                    write_bytes(results / f"recover-{name}.md", markdown(name, read_lines(path)).encode())


def keep(path: Path, line: dict[str, Any]) -> None:
    """Store and print one finished cell."""
    append_line(path, line)
    cell = line["cell"]
    print(
        f"{cell['protection']:>6} under {cell['recovery']}, seed {cell['seed']}: {line['last']:.1%} "
        f"(best {line['best']:.1%}) in {line['seconds']:.0f} s",
        flush=True,
    )


def markdown(name: str, lines: Sequence[dict[str, Any]]) -> str:
    """Return the table: last-epoch accuracy on clean test images, mean and spread over seeds."""
    table = TABLES[name]
    found: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        cell = line["cell"]
        found.setdefault((cell["protection"], cell["recovery"]), []).append(100 * line["last"])
    protections = [one for one in table.protections if one != CLEAN]
    text = ["| recovery | " + " | ".join((*table.protections, "mean of protected")) + " |"]
    text.append("| --- |" + " ---: |" * (len(table.protections) + 1))
    for recovery in (*table.recoveries, *table.once):
        row = [entry(found.get((protection, recovery))) for protection in table.protections]
        means = [found.get((protection, recovery)) for protection in protections]
        mean = sum(sum(one) / len(one) for one in means if one) / len(means) if all(means) else None
        row.append("not measured" if mean is None else f"{mean:.1f}")
        text.append(f"| {recovery} | " + " | ".join(row) + " |")
    tests = " and ".join(f"{count:,}" for count in sorted({line["test"] for line in lines}))
    text += [
        "",
        f"Accuracy after the last epoch on {tests} clean test images, %: mean ± standard deviation (seeds).",
    ]
    text += ["", machines(lines)]
    return "\n".join(text) + "\n"


def run_speed(data: Path, work: Path, results: Path, device: str) -> None:
    """Time ours against JCDP as released, on the same images with the same prior."""
    bench = Bench("small", data, work, device, compile=False)
    bench.train_prior()
    images = bench.clean.subset(list(range(512 if bench.runtime.device.type == "cpu" else 5000)))
    found: dict[str, Any] = {
        "images": len(images),
        "hardware": hardware(bench.runtime.device, torch.get_num_threads()),
    }
    prior = str(bench.prior)
    ours = create_recovery("versions", prior=prior), Purify.gently(prior), Purify(prior)
    for recovery in (*ours, JCDP(prior), JCDP(prior, guide=0.0)):
        name = recovery.name if not isinstance(recovery, JCDP) or recovery.guide else "jcdp without guidance"
        few = images.subset(list(range(32)))
        recovery.recover(few, Job(runtime=bench.runtime))  # whatever happens once
        started, job = time.perf_counter(), Job(runtime=bench.runtime)
        recovery.recover(images, job)
        seconds = time.perf_counter() - started
        found[name] = {"seconds": round(seconds, 2), "images/s": round(len(images) / seconds, 2), **job.facts}
        print(f"{name}: {len(images) / seconds:.1f} images/s", flush=True)
    for recovery in ours:
        ratio = found[recovery.name]["images/s"] / found["jcdp"]["images/s"]
        found[f"{recovery.name}: times as fast"] = round(ratio, 2)
    write_json(results / "recover-speed.json", found)


def main() -> None:
    """Read the command line and run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    for name in (*TABLES, "speed"):
        kind.add_argument(f"--{name}", action="store_const", const=name, dest="kind")
    parser.add_argument("--data", type=Path, help="folder of the image sets")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for files that are made")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--workers", type=int, help="jobs at a time (default: the cores, or 1 on a GPU)")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no further learner after so many")
    parser.add_argument(
        "--only", default="*", help="cells of a table, as PROTECTION/RECOVERY/SEED with wildcards"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what was measured")
    chosen = parser.parse_args()
    data = chosen.data or Path(os.environ.get("PRIVET_DATA", ""))
    if not (data / "cifar10" / "train.parquet").exists():
        sys.exit(f"There is no {data / 'cifar10'}; name its folder with --data, or set PRIVET_DATA.")
    gpu = chosen.device != "cpu" and torch.cuda.is_available()
    if chosen.kind == "speed":
        run_speed(data, chosen.work, chosen.results, chosen.device)
        return
    workers = chosen.workers or (1 if gpu else os.cpu_count() or 1)
    run_table(
        chosen.kind,
        data,
        chosen.work,
        chosen.results,
        chosen.device,
        chosen.compile,
        workers,
        60 * chosen.minutes,
        chosen.only,
    )


if __name__ == "__main__":
    main()
