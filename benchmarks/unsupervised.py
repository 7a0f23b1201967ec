"""What protections are worth against learners that need no labels, and what recoveries make of that.

    python benchmarks/unsupervised.py --small    CIFAR-10, 5,000 images, small networks, three seeds: a day on 2 cores
    python benchmarks/unsupervised.py --short    2,000 images, smaller networks, one seed: to see it work

Learners are SimCLR with a linear probe, and supervised ones for comparison. Each line of
results/unsupervised-NAME.jsonl is one learner, with the hardware; a line is never measured twice. `last` is the
accuracy on clean test images of a probe that learned from the same files as its encoder, which is all that somebody who
found them has; `clean_probe` that of a probe on the clean originals, which the paper on contrastive poisoning
reports and which measures the encoder alone. Random features (an encoder that learned nothing) are the floor of both.

--prior names the folder of a prior that was trained on other images, and adds the recovery purify.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from privet.files import append_line, read_lines, write_bytes
from privet.images import ImageSet, align, open_images
from privet.learning import Job, Learner, Runtime, accuracy, learn
from privet.learning.probe import probe
from privet.models import create_model
from privet.models.projection import PREFIX, other_head
from privet.protection import METHODS, publish
from privet.recovery import create_recovery
from privet.seeds import derive
from protect import HERE, RESULTS, Lines, entry, hardware, machines, outcome

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A benchmark: protections by learners, and some of them by recoveries.

    Attributes:
        images: training images used.
        test: test images used.
        architecture: of surrogates and of encoders.
        protections: method and settings by name; None for the clean files.
        contrastive: how learners without labels train.
        supervised: how the others do.
        recovered: protections on which recoveries are tried, by learners without labels.
        seeds: of protection and learner alike.
    """

    images: int
    test: int
    architecture: str
    protections: dict[str, tuple[str, Settings] | None]
    contrastive: Learner
    supervised: Learner
    recovered: tuple[str, ...]
    seeds: tuple[int, ...]


PROTECTIONS: dict[str, tuple[str, Settings] | None] = {
    "clean": None,
    "random": ("random", {}),
    "em": ("em", {}),
    "ucl": ("ucl", {}),
    "ucl-class": ("ucl", {"class_rounds": 40, "rounds": 0}),
    "tue": ("tue", {}),
}
SHORT: Settings = {"rounds": 10, "train_steps": 8, "batch_size": 250}
TABLES = {
    "small": Table(
        images=5000,
        test=2000,
        architecture="resnet10-w16",
        protections=PROTECTIONS,
        contrastive=Learner(epochs=100, batch_size=256),
        supervised=Learner(epochs=30),
        recovered=("clean", "ucl", "ucl-class", "tue"),
        seeds=(0, 1, 2),
    ),
    "short": Table(
        images=2000,
        test=1000,
        architecture="resnet8-w16",
        protections={
            "clean": None,
            "ucl": ("ucl", {**SHORT, "class_rounds": 10, "class_steps": 8}),
            "tue": ("tue", {**SHORT, "noise_steps": 4}),
            "ucl-class": ("ucl", {**SHORT, "class_rounds": 20, "class_steps": 8, "rounds": 0}),
            "em": ("em", {"train_steps": 16, "max_rounds": 15}),
            "random": ("random", {}),
        },
        contrastive=Learner(epochs=30, batch_size=250),
        supervised=Learner(epochs=20, batch_size=125),
        recovered=("clean", "ucl", "tue"),
        seeds=(0,),
    ),
}
RECOVERIES = ("jpeg-10", "grayscale")


@dataclass(frozen=True, order=True, kw_only=True)
class Cell:
    """One learner of a table."""

    protection: str
    recovery: str
    learner: str
    seed: int


def cells(table: Table, prior: str | None) -> Iterator[Cell]:
    """Go through a table seed by seed: protections first, then recoveries."""
    recoveries = (*RECOVERIES, *(["purify"] if prior else []))
    for seed in table.seeds:
        for learner in ("simclr", "supervised"):
            for protection in table.protections:
                yield Cell(protection=protection, recovery="none", learner=learner, seed=seed)
        for protection in table.recovered:
            for recovery in recoveries:
                yield Cell(protection=protection, recovery=recovery, learner="simclr", seed=seed)


class Bench:
    """Makes protected files, recovers them, and trains learners on them."""

    def __init__(self, name: str, data: Path, work: Path, device: str, prior: str | None) -> None:
        self.table, self.name, self.work, self.prior = TABLES[name], name, work, prior
        self.runtime = Runtime.find(device)
        self.clean = open_images(data / "train.parquet", limit=self.table.images)
        self.test = align(open_images(data / "test.parquet", limit=self.table.test), self.clean.class_names)

    def protected(self, name: str, seed: int) -> tuple[ImageSet, float | None]:
        """Return the files of a protection, made now if they are not there, and the seconds it took."""
        chosen = self.table.protections[name]
        if chosen is None:
            return self.clean, None
        method, settings = METHODS[chosen[0]], dict(chosen[1])
        if hasattr(method, "surrogate"):
            settings["surrogate"] = self.table.architecture
        out = self.work / f"unsupervised-{self.name}-{name}-{seed}"
        started, finished = time.perf_counter(), (out / "run.json").exists()
        protection = method.preset("cpu", **settings)
        publish(self.clean, protection, out, runtime=self.runtime, seed=seed, progress=Lines())
        seconds = None if finished else time.perf_counter() - started
        return align(open_images(out, size=self.clean.size), self.clean.class_names), seconds

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Train one cell's learner; return its line for the results."""
        images, noise_seconds = self.protected(cell.protection, cell.seed)
        recovery = create_recovery(cell.recovery, prior=self.prior)
        job = Job(runtime=self.runtime, seed=cell.seed)
        images = recovery.recover(images, job)
        test = recovery.present(self.test, job.facts)
        contrastive = cell.learner == "simclr"
        learner = self.table.contrastive if contrastive else self.table.supervised
        name = (PREFIX if contrastive else "") + self.table.architecture
        started = time.perf_counter()
        checkpoint = self.work / ("-".join(map(str, asdict(cell).values())) + f"-{self.name}.safetensors")
        learned = learn(
            images,
            test,
            replace(learner, architecture=name),
            runtime=self.runtime,
            seed=cell.seed,
            checkpoint=checkpoint,
            progress=Lines(),
        )
        checkpoint.unlink(missing_ok=True)
        return {
            "cell": asdict(cell),
            **outcome(learned),
            "clean_probe": self.probed(learned.model, recovery.present(self.clean, job.facts), test)
            if contrastive
            else None,
            "seconds": round(time.perf_counter() - started, 1),
            "noise_seconds": None if noise_seconds is None else round(noise_seconds, 1),
            "images": len(images),
            "test": len(self.test),
            "hardware": hardware(self.runtime.device, torch.get_num_threads()),
        }

    def probed(self, model: torch.nn.Module, images: ImageSet, test: ImageSet) -> float:
        """Return the accuracy of a probe that learned from these images."""
        layer, _ = probe(model, images, runtime=self.runtime)
        with other_head(model, layer):
            return accuracy(model, test, runtime=self.runtime)

    def floor(self, seed: int) -> float:
        """Return the accuracy of a probe on an encoder that learned nothing, with clean images."""
        model = create_model(
            PREFIX + self.table.architecture,
            classes=self.clean.classes,
            size=self.clean.size,
            seed=derive(seed, "weights"),
        )
        return self.probed(self.runtime.place(model), self.clean, self.test)


def run_table(
    name: str, data: Path, work: Path, device: str, prior: str | None, seconds: float, only: str | None
) -> None:
    """Fill a table as far as the time allows, and write it."""
    table, path = TABLES[name], RESULTS / f"unsupervised-{name}.jsonl"
    done = {Cell(**line["cell"]) for line in read_lines(path)}
    todo = [
        cell
        for cell in cells(table, prior)
        if cell not in done and (only is None or cell.protection in only.split(","))
    ]
    print(f"{len(done)} cells are measured, {len(todo)} are left", flush=True)
    bench, until = Bench(name, data, work, device, prior), time.monotonic() + seconds
    for cell in todo:
        if time.monotonic() > until:
            break
        line = bench(cell)
        append_line(path, line)
        words = "" if line["clean_probe"] is None else f", clean probe {line['clean_probe']:.1%}"
        print(f"{cell}: {line['last']:.1%}{words} in {line['seconds']:.0f} s", flush=True)
    floors = [100 * bench.floor(seed) for seed in table.seeds]
    write_bytes(RESULTS / f"unsupervised-{name}.md", markdown(read_lines(path), floors).encode())


def markdown(lines: list[dict[str, Any]], floors: list[float]) -> str:
    """Return the table: last-epoch accuracy on clean test images, mean and spread over seeds."""
    columns = (
        ("simclr", "last", "SimCLR, probe on the same files"),
        ("simclr", "clean_probe", "SimCLR, probe on clean files"),
        ("supervised", "last", "supervised"),
    )
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for line in lines:
        cell = line["cell"]
        for learner, key, _ in columns:
            if cell["learner"] == learner:
                at = (cell["protection"], cell["recovery"], learner, key)
                found.setdefault(at, []).append(100 * line[key])
    rows = dict.fromkeys((line["cell"]["protection"], line["cell"]["recovery"]) for line in lines)
    text = ["| files | recovery | " + " | ".join(words for *_, words in columns) + " |"]
    text.append("| --- | --- |" + " ---: |" * len(columns))
    for row in rows:
        fields = [entry(found.get((*row, learner, key))) for learner, key, _ in columns]
        text.append(f"| {row[0]} | {row[1]} | " + " | ".join(fields) + " |")
    text += ["", "Last-epoch accuracy on clean test images in %, mean ± standard deviation (seeds)."]
    text += ["", f"A probe on random features reaches {entry(floors)}."]
    text += ["", machines(lines)]
    return "\n".join(text) + "\n"


def main() -> None:
    """Read the command line and run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    for name, words in (("small", "the table"), ("short", "to see it work")):
        kind.add_argument(f"--{name}", action="store_const", const=name, dest="kind", help=words)
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for protected files")
    parser.add_argument("--prior", help="folder of a prior, for the recovery purify")
    parser.add_argument("--only", help="protections, with commas between")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no learner after so many")
    chosen = parser.parse_args()
    data = chosen.data or Path(os.environ.get("PRIVET_DATA", "")) / "cifar10"
    if not (data / "train.parquet").exists():
        sys.exit(f"There is no {data / 'train.parquet'}; name its folder with --data, or set PRIVET_DATA.")
    run_table(chosen.kind, data, chosen.work, chosen.device, chosen.prior, 60 * chosen.minutes, chosen.only)


if __name__ == "__main__":
    main()
