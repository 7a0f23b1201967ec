"""What protections are worth, and how fast ours is.

    python benchmarks/protect.py --small    CIFAR-10, 5,000 images, small networks: hours on 2 cores
    python benchmarks/protect.py --paper    CIFAR-10, 50,000 images, ResNet-18, all published settings: a GPU
    python benchmarks/protect.py --speed    SEM against a plain version of it, in one run: minutes

The tables resume: every finished learner is one line of results/protect-NAME.jsonl, with the hardware, and a line is
never measured twice. Protected files are kept in --work. The data are Parquet in the hub's layout, found by --data or
in the folder that PRIVET_DATA names.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import privet
from privet.files import append_line, read_lines, write_bytes
from privet.images import ImageSet, align, open_images
from privet.learning import Learned, Learner, Runtime, learn
from privet.learning.runtime import describe_device, end_with_parent
from privet.progress import Progress, silent
from privet.protection import METHODS, publish

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A benchmark: protections by name, learners by architecture and radius of adversarial training.

    Attributes:
        images: training images used.
        test: test images used, or None for all.
        protections: method and settings by name; None for the clean files.
        learner: how every learner trains.
        adversarial: settings in which adversarial training differs: it costs several times as much.
        victims: architecture and radii for each.
        only: learners, as (architecture, radius), of those protections that are not tried on all.
        seeds: of protection and learner alike.
    """

    images: int | None
    test: int | None
    protections: dict[str, tuple[str, dict[str, Any]] | None]
    learner: Learner
    adversarial: dict[str, Any]
    victims: dict[str, tuple[float, ...]]
    only: dict[str, tuple[tuple[str, float], ...]]
    seeds: tuple[int, ...]


PROTECTIONS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "clean": None,
    "random": ("random", {}),
    "em": ("em", {}),
    "sem": ("sem", {}),
    "rem": ("rem", {}),
    "pil": ("pil", {}),
    "pil-published": ("pil", {"views": 0}),
    # What four times the work on the surrogate's training changes.
    "sem-long": (
        "sem",
        {
            "train_steps": 4000,
            "decay_steps": 1600,
            "train_noise_steps": 2,
            "step_size": 0.8,
            "attack_steps": 4,
            "attack_step_size": 1.0,
        },
    ),
}
TABLES = {
    "small": Table(
        images=5000,
        test=2000,
        protections=PROTECTIONS,
        learner=Learner(epochs=30),
        adversarial={"epochs": 16, "attack_steps": 3},
        victims={"resnet10-w16": (0, 2, 4), "vgg11-w16": (0,), "cnn-w32": (0,)},
        only={
            "random": (("resnet10-w16", 0),),
            "rem": (("resnet10-w16", 0), ("resnet10-w16", 2), ("resnet10-w16", 4)),
            "pil-published": (("resnet10-w16", 0),),
            "sem-long": (("resnet10-w16", 0), ("resnet10-w16", 2), ("resnet10-w16", 4)),
        },
        seeds=(0, 1, 2),
    ),
    "paper": Table(
        images=None,
        test=None,
        protections={name: PROTECTIONS[name] for name in ("clean", "random", "em", "sem", "rem", "pil")},
        learner=Learner(epochs=103, schedule="step"),
        adversarial={},
        victims={"resnet18": (0, 1, 2, 3, 4)},
        only={"random": (("resnet18", 0),)},
        seeds=(0,),
    ),
}


@dataclass(frozen=True, order=True, kw_only=True)
class Cell:
    """One learner of a table."""

    protection: str
    architecture: str
    radius: float
    seed: int


STAGES = (("clean", "random", "pil", "pil-published", "em", "sem"), ("rem",), ("sem-long",))  # by cost


def cells(table: Table, protections: Sequence[str]) -> Iterator[Cell]:
    """Go through the cells of some protections, cheap ones first, so that a short run fills whole columns."""
    radii = sorted({radius for values in table.victims.values() for radius in values})
    for radius in radii:
        for seed in table.seeds:
            for architecture, tried in table.victims.items():
                for protection in (name for name in protections if name in table.protections):
                    learner = (architecture, radius)
                    if radius in tried and learner in table.only.get(protection, (learner,)):
                        yield Cell(protection=protection, architecture=architecture, radius=radius, seed=seed)


def hardware(device: torch.device, threads: int) -> dict[str, Any]:
    """Return what a figure depends on beside its settings."""
    return {
        "device": describe_device(device, threads),
        "torch": torch.__version__,
        "privet": privet.__version__,
        "cores": os.cpu_count(),
    }


def machines(lines: Sequence[dict[str, Any]]) -> str:
    """Return the last line of a table: on what its figures were measured."""
    found = sorted({f"{line['hardware']['device']}, torch {line['hardware']['torch']}" for line in lines})
    return f"Measured on: {'; '.join(found) or 'nothing yet'}."


def outcome(learned: Learned) -> dict[str, Any]:
    """Return what came of a learner, for its line."""
    return {
        "last": learned.accuracy,
        "best": learned.best.accuracy,
        "best_epoch": learned.best.epoch,
        "train_accuracy": learned.history[-1].train_accuracy,
    }


class Bench:
    """Makes protected files and trains learners on them, in one process."""

    def __init__(self, name: str, data: Path, work: Path, device: str, compile: bool) -> None:
        self.table, self.name, self.work = TABLES[name], name, work
        self.preset = "paper" if name == "paper" else "cpu"
        self.runtime = Runtime.find(device, compile=compile)
        self.clean = open_images(data / "train.parquet", limit=self.table.images)
        self.test = align(open_images(data / "test.parquet", limit=self.table.test), self.clean.class_names)

    def protected(self, name: str, seed: int, progress: Progress) -> tuple[ImageSet, float | None]:
        """Return the files of a protection, made now if they are not there, and the seconds it took."""
        chosen = self.table.protections[name]
        if chosen is None:
            return self.clean, None
        method, settings = chosen
        out = self.work / f"{self.name}-{name}-{seed}"
        started, finished = time.perf_counter(), (out / "run.json").exists()
        publish(
            self.clean,
            METHODS[method].preset(self.preset, **settings),
            out,
            runtime=self.runtime,
            seed=seed,
            progress=progress,
        )
        seconds = None if finished else time.perf_counter() - started
        return align(open_images(out, size=self.clean.size), self.clean.class_names), seconds

    def __call__(self, cell: Cell, progress: Progress = silent) -> dict[str, Any]:
        """Train one cell's learner; return its line for the results."""
        images, noise_seconds = self.protected(cell.protection, cell.seed, progress)
        learner = replace(
            self.table.learner,
            architecture=cell.architecture,
            radius=cell.radius,
            **(self.table.adversarial if cell.radius else {}),
        )
        started = time.perf_counter()
        checkpoint = (
            self.work
            / f"{self.name}-{cell.protection}-{cell.architecture}-{cell.radius:g}-{cell.seed}.safetensors"
        )
        learned = learn(
            images,
            self.test,
            learner,
            runtime=self.runtime,
            seed=cell.seed,
            checkpoint=checkpoint,
            progress=progress,
        )
        checkpoint.unlink(missing_ok=True)
        return {
            "cell": asdict(cell),
            **outcome(learned),
            "seconds": round(time.perf_counter() - started, 1),
            "noise_seconds": None if noise_seconds is None else round(noise_seconds, 1),
            "images": len(images),
            "test": len(self.test),
            "hardware": hardware(self.runtime.device, torch.get_num_threads()),
        }


_bench: Bench


def _start(name: str, data: Path, work: Path, device: str, compile: bool) -> None:
    global _bench
    end_with_parent()
    torch.set_num_threads(1)
    _bench = Bench(name, data, work, device, compile)


def _prepare(protection: str, seed: int) -> str:
    _bench.protected(protection, seed, silent)
    return f"{protection}, seed {seed}: files are there"


def _work(cell: Cell) -> dict[str, Any]:
    return _bench(cell)


def run_table(
    name: str, data: Path, work: Path, device: str, compile: bool, workers: int, seconds: float
) -> None:
    """Fill a table as far as the time allows, and write it."""
    table, path = TABLES[name], RESULTS / f"protect-{name}.jsonl"
    done = {Cell(**line["cell"]) for line in read_lines(path)}
    stages = [[cell for cell in cells(table, stage) if cell not in done] for stage in STAGES]
    until = time.monotonic() + seconds
    print(f"{len(done)} cells are measured, {sum(map(len, stages))} are left", flush=True)
    if workers == 1:
        bench = Bench(name, data, work, device, compile)
        for cell in (cell for stage in stages for cell in stage):
            if time.monotonic() > until:
                break
            keep(path, bench(cell, Lines()))
    else:
        with ProcessPoolExecutor(
            workers,
            mp_context=torch.multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(name, data, work, device, compile),
        ) as pool:
            for todo in stages:
                if time.monotonic() > until:
                    break
                # Files first: two cells that share a protection must not both make it.
                wanted = {
                    (cell.protection, cell.seed): None for cell in todo if table.protections[cell.protection]
                }
                for words in pool.map(_prepare, *zip(*wanted, strict=True)) if wanted else ():
                    print(words, flush=True)
                for line in pool.map(_work, todo):
                    keep(path, line)
                    if time.monotonic() > until:
                        pool.shutdown(cancel_futures=True)
                        break  # out of both loops: the time is over for the next stage too
    write_bytes(RESULTS / f"protect-{name}.md", markdown(name, read_lines(path)).encode())


def keep(path: Path, line: dict[str, Any]) -> None:
    """Store and print one finished cell."""
    append_line(path, line)
    cell = line["cell"]
    print(
        f"{cell['protection']:>8} {cell['architecture']:>13} radius {cell['radius']:g} seed {cell['seed']}: "
        f"{line['last']:.1%} (best {line['best']:.1%}) in {line['seconds']:.0f} s",
        flush=True,
    )


def markdown(name: str, lines: Sequence[dict[str, Any]]) -> str:
    """Return the table: last-epoch accuracy on clean test images, mean and spread over seeds."""
    table = TABLES[name]
    found: dict[tuple[str, str, float], list[float]] = {}
    for line in lines:
        cell = line["cell"]
        found.setdefault((cell["protection"], cell["architecture"], cell["radius"]), []).append(
            100 * line["last"]
        )
    columns = [(architecture, radius) for architecture, radii in table.victims.items() for radius in radii]
    text = ["| protection | " + " | ".join(f"{a}, AT {r:g}/255" if r else a for a, r in columns) + " |"]
    text.append("| --- |" + " ---: |" * len(columns))
    for protection in table.protections:
        row = [entry(found.get((protection, *column))) for column in columns]
        text.append(f"| {protection} | " + " | ".join(row) + " |")
    text += ["", "Last-epoch accuracy on clean test images in %, mean ± standard deviation (seeds)."]
    text += ["", machines(lines)]
    return "\n".join(text) + "\n"


def entry(values: list[float] | None) -> str:
    """Return one field of a table."""
    if not values:
        return "not measured"
    if len(values) == 1:
        return f"{values[0]:.1f} (1)"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)})"


class Lines:
    """Prints progress now and then."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if time.monotonic() - self.last > 20:
            self.last = time.monotonic()
            print(f"    {stage}: {done / total:.0%}", flush=True)


def main() -> None:
    """Read the command line and run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    for name, words in (("small", "a table for CPUs"), ("paper", "the full table"), ("speed", "time SEM")):
        kind.add_argument(f"--{name}", action="store_const", const=name, dest="kind", help=words)
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for protected files")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--workers", type=int, help="learners at a time (default: the cores, or 1 on a GPU)")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no learner after so many")
    chosen = parser.parse_args()
    data = chosen.data or Path(os.environ.get("PRIVET_DATA", "")) / "cifar10"
    if not (data / "train.parquet").exists():
        sys.exit(f"There is no {data / 'train.parquet'}; name its folder with --data, or set PRIVET_DATA.")
    gpu = chosen.device != "cpu" and torch.cuda.is_available()
    if chosen.kind == "speed":
        from speed import run_speed

        run_speed(data, chosen.device, RESULTS)
        return
    workers = chosen.workers or (1 if gpu else os.cpu_count() or 1)
    run_table(chosen.kind, data, chosen.work, chosen.device, chosen.compile, workers, 60 * chosen.minutes)


if __name__ == "__main__":
    main()
