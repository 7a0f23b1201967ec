"""Who learns from a licensed release: each construction, audited as `privet audit licence` does.

    python benchmarks/license.py --small    CIFAR-10, 5,000 images, small networks: about two hours of a core for each

lock-again and keyed-em-again are releases with other keys, on which further recoveries and more pairs are tried, with
one seed; recoveries that denoise only if --prior names a prior, and the dear ones on the lock alone. Of uge, which so
far protected nothing, nothing is tried beyond plain training, imitation and the freedom of the licensee.

Releases, licences and audits are kept in --work and go on where they were stopped. What an audit found goes to
results/license-NAME.json, with the hardware, and all of them together to results/license-small.md and .png. The
data are Parquet in the hub's layout, found by --data or in the folder that PRIVET_DATA names.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt

from privet.audit import LicencePlan, Seat, audit_licence
from privet.audit.licence_plan import PLAIN
from privet.audit.licence_verdict import COST, GAP, who
from privet.files import read_json, write_bytes, write_json
from privet.images import open_images, write_images
from privet.learning import Runtime
from privet.licensing import Licence, Vendor, protect, read_licence, release
from privet.recovery import needs_prior
from privet.report import write_licence_report
from privet.report.plots import STYLE
from protect import Lines, hardware, machines

HERE = Path(__file__).parent
RESULTS = HERE / "results"
IMAGES, TEST = 5000, 2000
WORDS = "a benchmark's"
RECOVERIES = ("projection", "bitdepth-2", "blur-1", "coin", "ueraser-lite", "adversarial-8", "purify")
DEAR = ("dvae-16", "avatar", "jcdp")
AGAIN = {"seeds": (0,), "tries": 1, "pairs": (500, 4000), "share": 0.0}
# Method, its settings, and what is planned otherwise; releases have the construction's name, and a key of their own.
CONSTRUCTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lock": ("lock", {}, {}),
    "lock-again": ("lock", {}, {**AGAIN, "recoveries": (*RECOVERIES, *DEAR)}),
    "uge": ("uge", {}, {"recoveries": (), "share": 0.0}),
    "keyed-em": ("keyed-em", {}, {}),
    "keyed-em-again": ("keyed-em", {}, {**AGAIN, "recoveries": RECOVERIES}),
    "keyed-em-4": ("keyed-em", {"group": 4}, {}),
}
RECIPE = {"architecture": "vgg11-w16", "epochs": 20}
OTHERS = ("resnet10-w16",)


class Bench:
    """Makes releases, and audits them."""

    def __init__(self, data: Path, work: Path, device: str, prior: str | None) -> None:
        self.work, self.runtime, self.prior = work, Runtime.find(device), prior
        self.clean, self.test = work / "license-clean", work / "license-test"
        self.images = open_images(data / "train.parquet", limit=IMAGES)
        test = open_images(data / "test.parquet", limit=TEST)
        for images, folder in ((self.images, self.clean), (test, self.test)):
            write_images(images, images, folder)
        keys = work / "license-vendor"
        there = (keys / "vendor.key").exists()
        self.vendor = Vendor.open(keys, WORDS) if there else Vendor.create(keys, WORDS)

    def licence(self, name: str) -> Licence:
        """Return the vendor's own licence for a release that is made now, if it is not there."""
        out, path = self.work / f"license-{name}", self.vendor.folder / f"{name}.licence"
        if not path.exists():
            method, settings, _ = CONSTRUCTIONS[name]
            protect(
                self.images,
                self.vendor,
                name,
                out,
                method=method,
                preset="cpu" if self.runtime.device.type == "cpu" else "paper",
                settings=settings,
                runtime=self.runtime,
                progress=Lines(),
            )
            release(out, self.vendor, name, WORDS, clean=self.clean, recipe=RECIPE)
        return read_licence(path, WORDS)

    def audit(self, name: str, *, seeds: int, workers: int) -> dict[str, Any]:
        """Return what the audit of a release says."""
        licence = self.licence(name)
        own = {**CONSTRUCTIONS[name][2], "prior": self.prior}
        if self.prior is None and "recoveries" in own:
            own["recoveries"] = tuple(one for one in own["recoveries"] if not needs_prior(one))
        settings = {"architectures": (str(RECIPE["architecture"]), *OTHERS), "seeds": tuple(range(seeds))}
        plan = LicencePlan(**{**settings, **own}, learner=licence.learner())
        out = self.work / f"license-{name}-audit"
        found = audit_licence(
            self.work / f"license-{name}",
            licence,
            clean=self.clean,
            test=self.test,
            out=out,
            plan=plan,
            runtime=self.runtime,
            workers=workers,
            progress=Lines(),
            finished=_say,
        )
        report = write_licence_report(found, out)
        return {key: report[key] for key in ("verdict", "bounds", "rows", "facts", "run")}


def _say(seat: Seat, result: dict[str, Any], done: int, total: int) -> None:
    print(
        f"[{done}/{total}] {seat.who} {seat.architecture} seed {seat.seed} {seat.freedom}: {result['last']:.1%} "
        f"(best {result['best']:.1%})",
        flush=True,
    )


def markdown(reports: dict[str, dict[str, Any]]) -> str:
    """Return one table of all constructions, and their verdicts."""
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for name, report in reports.items():
        for row in report["rows"]:
            last, peak = 100 * row["last"]["mean"], 100 * max(row["peak"]["values"])
            spread = "" if row["last"]["sd"] is None else f" ± {100 * row['last']['sd']:.1f}"
            place = (row["who"], row["architecture"], row["freedom"])
            cells.setdefault(place, {})[name] = f"{last:.1f}{spread} ({peak:.1f})"
    text = ["| who | network | " + " | ".join(reports) + " |", "| --- | --- |" + " ---: |" * len(reports)]
    for (party, architecture, freedom), found in cells.items():
        words = f"{who(party)}{freedom and f', {freedom}'}"
        entries = " | ".join(found.get(name, "not measured") for name in reports)
        text.append(f"| {words} | {architecture} | {entries} |")
    text += [
        "",
        "Accuracy on clean test images in % after the last epoch, mean ± standard deviation over seeds",
    ]
    text += ["(and the highest of all epochs and seeds). One key and one seed of the noise.", ""]
    text += [f"- `{name}`: {report['verdict']['headline']}" for name, report in reports.items()]
    text += ["", machines(list(reports.values()))]
    return "\n".join(text) + "\n"


def front(reports: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw what the licensee of each construction loses, against plain training and the best of everybody else."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8.0, 4.4))
        main = str(RECIPE["architecture"])
        for place, (name, report) in enumerate(reports.items()):
            verdict, colour = report["verdict"], f"C{place}"
            clean = verdict["clean"]
            plain = max(
                value
                for row in report["rows"]
                if (row["who"], row["architecture"]) == (PLAIN, main)
                for value in row["peak"]["values"]
            )
            lost = [100 * (clean - accuracy) for accuracy in (plain, verdict["hacker"])]
            y = [100 * (clean - verdict["licensee"])] * 2
            axis.plot(lost, y, color=colour, linewidth=0.8)
            axis.scatter(lost[:1], y[:1], color=colour, marker="o", label=f"{name}: plain training")
            axis.scatter(lost[1:], y[1:], color=colour, marker="x", label=f"{name}: {verdict['strongest']}")
        axis.axhline(100 * COST, color="#333333", linewidth=0.9)
        axis.axvline(100 * GAP, color="#333333", linewidth=0.9, linestyle=(0, (1, 1.5)))
        axis.set_xlabel("points that anybody else loses at their best epoch")
        axis.set_ylabel("points that the licensee loses")
        axis.invert_yaxis()
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.tight_layout()
        figure.savefig(path, dpi=130)
        plt.close(figure)


def main() -> None:
    """Read the command line and run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", required=True, help="the table for CPUs")
    parser.add_argument("--only", nargs="*", default=list(CONSTRUCTIONS), choices=list(CONSTRUCTIONS))
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for what is made")
    parser.add_argument("--seeds", type=int, default=3, help="learners of each kind")
    parser.add_argument("--prior", help="a prior of other images, for recoveries that denoise")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, help="learners at a time (default: the cores, or 1 on a GPU)")
    chosen = parser.parse_args()
    data = chosen.data or Path(os.environ.get("PRIVET_DATA", "")) / "cifar10"
    if not (data / "train.parquet").exists():
        sys.exit(f"There is no {data / 'train.parquet'}; name its folder with --data, or set PRIVET_DATA.")
    bench = Bench(data, chosen.work, chosen.device, chosen.prior)
    gpu = bench.runtime.device.type == "cuda"
    for name in chosen.only:
        report = bench.audit(
            name, seeds=chosen.seeds, workers=chosen.workers or (1 if gpu else os.cpu_count() or 1)
        )
        found = {
            **report,
            "hardware": hardware(bench.runtime.device, 1 if not gpu else torch.get_num_threads()),
        }
        write_json(RESULTS / f"license-{name}.json", found)
    files = {name: RESULTS / f"license-{name}.json" for name in CONSTRUCTIONS}
    reports = {name: read_json(path) for name, path in files.items() if path.exists()}
    write_bytes(RESULTS / "license-small.md", markdown(reports).encode())
    front(reports, RESULTS / "license-small.png")


if __name__ == "__main__":
    main()
