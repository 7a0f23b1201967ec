"""What codecs and samplers do to a federation: accuracy against the bytes that Flower moves.

    python benchmarks/federate.py --small     CIFAR-10, 10,000 images, LeNet, 50 clients: two hours on 2 cores
    python benchmarks/federate.py --paper     CIFAR-10, 50,000 images, ResNet-18, 50 clients: a GPU

Every finished federation is one line of results/federate-NAME.jsonl, with the hardware, and is never measured twice; a
killed one goes on. The table and its picture are written after each. The data are Parquet in the hub's layout, found
by --data or in the folder that PRIVET_DATA names.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from privet.federation.flower.federate import federate
from privet.federation.flower.plan import Plan
from privet.files import append_line, read_lines, write_bytes
from privet.images import ImageSet, open_images
from privet.learning import Runtime
from privet.progress import Progress, silent

matplotlib.use("Agg", force=False)

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LAST = 10  # rounds whose mean accuracy counts
WHOLE = "whole models (FedAvg)"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A benchmark: images, and a plan for each row.

    Attributes:
        images: training images, or None for all.
        test: test images.
        plan: what all rows share.
        rows: in what each differs.
        seeds: of everything.
    """

    images: int | None
    test: int
    plan: Plan
    rows: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]


def rows(rounds: int, hundredth: str) -> dict[str, dict[str, Any]]:
    """Return all rows; `hundredth` is a budget of a hundredth of the model's bytes."""
    budgets = {"budget": hundredth, "download_budget": hundredth}
    return {
        WHOLE: {"codec": "none", "download": "none"},
        "int8": {"codec": "int8", "download": "int8"},
        "EDEN": {"codec": "eden", "download": "eden"},
        "STC, a hundredth": {"codec": "stc", "download": "stc", **budgets},
        "DHQ, a hundredth": budgets,
        "DHQ, a hundredth, mean-split levels": {"codec": "dhq", "download": "dhq", **budgets},
        **sampling(rounds, budgets),
    }


def sampling(rounds: int, budgets: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return dynamic sampling beside a static fraction with as many participations in all."""
    # 50 clients: 0.4 e^(-0.03 t), not below 0.06; the same participations as the static fraction, to one in a hundred.
    dynamic = {"schedule": "exponential", "fraction": 0.4, "decay": 0.03, "floor": 0.06, "sampler": "uniform"}
    drawn = sum(Plan(**dynamic, rounds=rounds).draw({}).count(number, 50) for number in range(rounds))
    static = {"schedule": "static", "fraction": drawn / rounds / 50, "sampler": "uniform"}
    return {
        "DHQ, a hundredth, dynamic sampling": {**budgets, **dynamic},
        "DHQ, a hundredth, static, as many": {**budgets, **static},
    }


SMALL = Plan(
    rounds=200,
    clients=50,
    alpha=0.3,
    fraction=0.2,
    local_epochs=1,
    batch_size=32,
    learning_rate=0.05,
)
PAPER = replace(SMALL, architecture="resnet18", rounds=400)
TABLES = {
    "small": Table(images=10_000, test=2_000, plan=SMALL, rows=rows(SMALL.rounds, "2480B"), seeds=(0, 1, 2)),
    "paper": Table(images=None, test=10_000, plan=PAPER, rows=rows(PAPER.rounds, "447kB"), seeds=(0, 1, 2)),
}


def cells(table: Table) -> Iterator[tuple[str, Plan]]:
    """Yield every row with every seed."""
    for seed in table.seeds:
        for name, changes in table.rows.items():
            yield name, replace(table.plan, **changes, seed=seed)


def measure(
    name: str,
    plan: Plan,
    train: ImageSet,
    test: ImageSet,
    work: Path,
    *,
    runtime: Runtime,
    progress: Progress,
) -> dict[str, Any]:
    """Play one federation, and return its line."""
    report = federate(train, test, plan, work, runtime=runtime, source={}, progress=progress)
    return {
        "row": name,
        "seed": plan.seed,
        "plan": plan.json(),
        "hardware": report["device"],
        "accuracy": statistics.fmean(one["accuracy"] for one in report["rounds"][-LAST:]),
        "bytes": report["bytes"],
        "participations": report["participations"],
        "refused": sum(len(one["refused"]) for one in report["rounds"]),
        "curve": [[one["down"] + one["up"], round(one["accuracy"], 4)] for one in report["rounds"]],
    }


def write_table(name: str, table: Table, lines: Sequence[dict[str, Any]]) -> None:
    """Write the lines as a table and a picture."""
    plan = table.plan
    by_row = {row: [line for line in lines if line["row"] == row] for row in table.rows}
    whole = by_row[WHOLE]
    out = [
        f"# Federations: accuracy against bytes ({name})",
        "",
        f"CIFAR-10, {table.images or 50_000:,} training images, {plan.clients} clients, classes by a Dirichlet "
        f"distribution ({plan.alpha:g}), {plan.architecture}, {plan.rounds} rounds of {plan.fraction:.0%} of the "
        f"clients (cyclic, if nothing else is said), {plan.local_epochs} local epoch, batches of {plan.batch_size}, "
        f"learning rate {plan.learning_rate:g}; FedAvg. Accuracy: mean of the last {LAST} rounds on {table.test:,} "
        "test images. Bytes are those of Flower's messages with all their parts, both ways.",
        "",
        "| what is sent | seeds | accuracy, % | MB up | MB down | MB in all | of whole models |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row, found in by_row.items():
        if not found:
            out.append(f"| {row} | 0 | not measured | | | | |")
            continue
        reached = [100 * line["accuracy"] for line in found]
        up, down = (statistics.fmean(line["bytes"][way] for line in found) / 1e6 for way in ("up", "down"))
        spread = f" ± {statistics.stdev(reached):.1f}" if len(found) > 1 else ""
        asked = statistics.fmean(line["participations"] for line in found)
        base = [
            (line["bytes"]["up"] + line["bytes"]["down"]) / line["participations"] * asked / 1e6
            for line in whole
        ]
        share = f"1 / {statistics.fmean(base) / (up + down):.1f}" if base else ""
        out.append(
            f"| {row} | {len(found)} | {statistics.fmean(reached):.1f}{spread} | {up:.2f} | {down:.2f} | "
            f"{up + down:.2f} | {share} |"
        )
    out += ["", f"![Accuracy against bytes](federate-{name}.png)", ""]
    out += ["Measured on " + "; ".join(sorted({line["hardware"] for line in lines})) + ".", ""]
    write_bytes(RESULTS / f"federate-{name}.md", "\n".join(out).encode())
    draw(RESULTS / f"federate-{name}.png", {row: found for row, found in by_row.items() if found})


def draw(path: Path, by_row: dict[str, list[dict[str, Any]]]) -> None:
    """Draw accuracy, smoothed over ten rounds, against bytes moved; the mean of all seeds."""
    figure, axis = plt.subplots(figsize=(8, 4.6))
    for row, found in by_row.items():
        moved, total = [], 0.0
        for number in range(len(found[0]["curve"])):
            total += statistics.fmean(line["curve"][number][0] for line in found) / 1e6
            moved.append(total)
        reached = [
            100 * statistics.fmean(line["curve"][number][1] for line in found) for number in range(len(moved))
        ]
        smooth = [
            statistics.fmean(reached[max(0, number - LAST + 1) : number + 1])
            for number in range(len(reached))
        ]
        style = "--" if "static" in row or "dynamic" in row else "-"
        axis.plot(moved, smooth, style, label=row, linewidth=1.3)
    axis.set_xscale("log")
    axis.set_xlabel("MB moved, both ways")
    axis.set_ylabel("accuracy, % (mean of ten rounds)")
    axis.grid(True, color="#e6e6e6")
    axis.legend(fontsize=7.5, frameon=False, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in TABLES:
        parser.add_argument(f"--{name}", dest="name", action="store_const", const=name)
    parser.add_argument("--data", type=Path, default=os.environ.get("PRIVET_DATA"))
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", help="measure rows that begin so")
    parser.add_argument("--seeds", type=int, nargs="*", help="measure these seeds")
    given = parser.parse_args()
    if given.name is None or given.data is None:
        parser.error("choose a table, and name the data by --data or PRIVET_DATA")
    table = TABLES[given.name]
    runtime = Runtime.find(given.device, "float32")
    source = given.data / "cifar10"
    train = open_images(source, split="train", limit=table.images)
    test = open_images(source, split="test", limit=table.test)
    journal = RESULTS / f"federate-{given.name}.jsonl"
    done = {(line["row"], line["seed"]) for line in read_lines(journal)}
    for name, plan in cells(table):
        wanted = (given.only is None or name.startswith(given.only)) and (
            not given.seeds or plan.seed in given.seeds
        )
        if (name, plan.seed) in done or not wanted:
            continue
        work = given.work / f"federate-{given.name}-{list(table.rows).index(name)}-{plan.seed}"
        line = measure(name, plan, train, test, work, runtime=runtime, progress=silent)
        append_line(journal, line)
        shutil.rmtree(work, ignore_errors=True)
        print(f"{name}, seed {plan.seed}: {line['accuracy']:.1%}, {line['bytes']}", flush=True)
        write_table(given.name, table, read_lines(journal))
    write_table(given.name, table, read_lines(journal))


if __name__ == "__main__":
    main()
