"""Who learns from a licensed release: the licensee, others, and others who try to undo the noise.

    python benchmarks/license.py --small    CIFAR-10, 5,000 images, small networks: about two hours on one core

Every learner is one line of results/license-small.jsonl, with the hardware, and a line is never measured twice;
protected files are kept in --work. The licensee looks through the stem at the protected files and at the test images;
as the stem gives the same bytes for protected and clean files, which is checked, that is what the stem costs, too.
What each of the others knows is said beside their names in WAYS. The data are Parquet in the hub's layout, found by
--data or in the folder that PRIVET_DATA names.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.files import append_line, read_lines, write_bytes
from privet.images import ImageSet, align, open_images, pair
from privet.learning import Job, Learner, Runtime, learn
from privet.learning.train import training_step
from privet.models import KeyedStem, create_model
from privet.protection import KeyedEM, publish
from privet.recovery import create_recovery
from privet.seeds import generator
from protect import Lines, hardware, machines, outcome

HERE = Path(__file__).parent
RESULTS = HERE / "results"
KEY, WRONG = bytes(range(32)), bytes(range(1, 33))  # of a benchmark: nobody's secret
IMAGES, TEST = 5000, 2000
COST, GAP = 2.0, 30.0  # percentage points: what a licensee may lose, and what everybody else must

Sets = tuple[ImageSet, ImageSet]
Way = Callable[["Bench"], Sets]


@dataclass(frozen=True, order=True, kw_only=True)
class Cell:
    """One learner."""

    who: str
    architecture: str
    seed: int


# All comparisons with the surrogate's own network, which is the worst for others; the main ones with another too.
MAIN, OTHERS = "vgg11-w16", ("resnet10-w16",)
EPOCHS = 12


class Bench:
    """Makes the files and what everybody sees of them."""

    def __init__(self, data: Path, work: Path) -> None:
        self.runtime = Runtime.find("cpu")
        self.clean = open_images(data / "train.parquet", limit=IMAGES)
        self.test = align(open_images(data / "test.parquet", limit=TEST), self.clean.class_names)
        self.method = KeyedEM.preset("cpu", key=KEY)
        out = work / "license-small"
        publish(self.clean, self.method, out, runtime=self.runtime, progress=Lines())
        self.clean, self.protected = pair(self.clean, open_images(out, size=self.clean.size))
        assert len(self.protected) == IMAGES
        stem = self.method.stem
        assert torch.equal(stem.apply_to(self.protected.pixels), stem.apply_to(self.clean.pixels))

    def stem(self, key: bytes) -> KeyedStem:
        """Return a stem of the release's design from another key."""
        method = self.method
        return KeyedStem.from_key(key, group=method.group, tile=method.tile, grey=method.grey)

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Train one learner; return its line for the results."""
        started = time.perf_counter()
        train, test = WAYS[cell.who](self)
        learner = learner_for(cell)
        learned = learn(train, test, learner, runtime=self.runtime, seed=cell.seed, progress=Lines())
        return {
            "cell": asdict(cell),
            **outcome(learned),
            "epochs": learner.epochs,
            "protection": None if cell.who in UNTOUCHED else self.method.settings(),
            "images": len(train),
            "test": len(test),
            "seconds": round(time.perf_counter() - started, 1),
            "hardware": hardware(self.runtime.device, torch.get_num_threads()),
        }


def learner_for(cell: Cell) -> Learner:
    """Return how a cell's learner trains."""
    return Learner(architecture=cell.architecture, epochs=EPOCHS)


def clean(bench: Bench) -> Sets:
    """The files before protection: what is to be kept, or taken away."""
    return bench.clean, bench.test


def plain(bench: Bench) -> Sets:
    """Somebody who trains on the protected files as on any others."""
    return bench.protected, bench.test


def through(stem: Callable[[Tensor], Tensor], bench: Bench) -> Sets:
    """Somebody who passes the files and the test images through the same change."""
    images, test = bench.protected, bench.test
    return images.with_pixels(stem(images.pixels)), test.with_pixels(stem(test.pixels))


def licensee(bench: Bench) -> Sets:
    """Who has the stem."""
    return through(bench.method.stem.apply_to, bench)


def wrong_stem(bench: Bench) -> Sets:
    """Somebody who knows the design and draws a key of their own."""
    return through(bench.stem(WRONG).apply_to, bench)


def recovery(name: str) -> Way:
    """Return somebody who tries a recovery of privet's."""

    def way(bench: Bench) -> Sets:
        chosen = create_recovery(name)
        return chosen.recover(bench.protected, Job(runtime=bench.runtime)), chosen.present(bench.test)

    return way


def tiles(pixels: Tensor, tile: int, *, top: int = 0, left: int = 0) -> Tensor:
    """Return the tiles of images from an offset on, (images, places, values), float."""
    height, width = (pixels.shape[2] - top) // tile * tile, (pixels.shape[3] - left) // tile * tile
    part = pixels[:, :, top : top + height, left : left + width].float()
    return F.unfold(part, tile, stride=tile).transpose(1, 2)


def covariance(samples: Tensor) -> Tensor:
    """Return the covariance of rows."""
    flat = samples.reshape(-1, samples.shape[-1]).double()
    flat = flat - flat.mean(0)
    return flat.T @ flat / len(flat)


def remove(basis: Tensor, bench: Bench) -> Sets:
    """Project an orthonormal basis, (values, directions), out of every tile."""
    tile = bench.method.tile

    def project(pixels: Tensor) -> Tensor:
        found = []
        for part in pixels.split(512):
            values = part.float()
            flat = F.unfold(values, tile, stride=tile).transpose(1, 2)
            size = (part.shape[2], part.shape[3])
            taken = ((flat - 127.5) @ basis) @ basis.T
            found.append(values - F.fold(taken.transpose(1, 2), size, tile, stride=tile))
        return torch.cat(found).round_().clamp_(0, 255).to(torch.uint8)

    return through(project, bench)


def by_covariance(bench: Bench) -> Sets:
    """Somebody who knows the design and looks for it in the protected files alone.

    Natural images have the same statistics wherever tiles begin, the noise only where the stem's do. So the
    directions in which tiles at the stem's places vary most, relative to tiles at all other places, are the noise's.
    """
    tile, pixels = bench.method.tile, bench.protected.pixels
    places = [(top, left) for top in range(tile) for left in range(tile) if (top, left) != (0, 0)]
    natural = torch.stack(
        [covariance(tiles(pixels[:2000], tile, top=top, left=left)) for top, left in places[::4]]
    ).mean(0)
    factor = torch.linalg.cholesky(natural + 0.1 * torch.eye(len(natural), dtype=torch.float64))
    half = torch.linalg.solve_triangular(factor, covariance(tiles(pixels, tile)), upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
    vectors = torch.linalg.eigh(whitened)[1][:, -directions(bench) :]
    # Along a direction of the noise, tiles vary more by the noise's energy: cov = natural + Q D Q'.
    return remove(torch.linalg.qr((factor @ vectors).float())[0], bench)


def by_pairs(count: int) -> Way:
    """Return somebody who has so many images both clean and protected: their differences span what is taken away."""

    def way(bench: Bench) -> Sets:
        pick = torch.arange(count)
        change = bench.protected.pixels[pick].float() - bench.clean.pixels[pick].float()
        spanned = covariance(tiles(change, bench.method.tile))
        return remove(torch.linalg.eigh(spanned)[1][:, -directions(bench) :].float(), bench)

    return way


def by_training(bench: Bench) -> Sets:
    """Somebody who puts a linear layer over tiles before a network, trains both, and then trains anew behind it."""
    tile, runtime, images = bench.method.tile, bench.runtime, bench.protected
    layer = nn.Conv2d(3 * tile**2, 3 * tile**2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3 * tile**2)[:, :, None, None])
    front = nn.Sequential(nn.PixelUnshuffle(tile), layer, nn.PixelShuffle(tile))
    network = create_model(MAIN, classes=images.classes, size=images.size, seed=1)
    model = runtime.place(nn.Sequential(front, network))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(6):
        for index in torch.randperm(len(images), generator=generator(1, "order", epoch)).split(128):
            x, y = images.pixels[index].float() / 255, images.labels[index]
            training_step(model, optimizer, x, y, rate=0.05, runtime=runtime)

    @torch.no_grad()
    def change(pixels: Tensor) -> Tensor:
        parts = [front(part.float() / 255) * 255 for part in pixels.split(512)]
        return torch.cat(parts).round_().clamp_(0, 255).to(torch.uint8)

    return through(change, bench)


def directions(bench: Bench) -> int:
    """Return how many dimensions of a tile the stem takes: the design is known."""
    return bench.method.stem.groups((bench.method.tile, bench.method.tile))


WAYS: dict[str, Way] = {
    "clean files": clean,
    "licensee": licensee,
    "by covariance": by_covariance,
    "nothing": plain,
    "jpeg-10": recovery("jpeg-10"),
    "another stem": wrong_stem,
    "grayscale": recovery("grayscale"),
    "by 50 pairs": by_pairs(50),
    "by training": by_training,
    "projection": recovery("projection"),
    "blur-1": recovery("blur-1"),
}


CLEAN, LICENSEE = "clean files", "licensee"
UNTOUCHED = (CLEAN, LICENSEE)  # what they see does not depend on the noise


def cells(seeds: Sequence[int]) -> list[Cell]:
    """Return every cell, what matters most first."""
    found = []
    for seed in seeds:
        found += [Cell(who=who, architecture=MAIN, seed=seed) for who in WAYS]
        found += [
            Cell(who=who, architecture=other, seed=seed)
            for other in OTHERS
            for who in ("nothing", "clean files", "licensee")
        ]
    return found


def verdict(lines: Sequence[dict[str, Any]]) -> str:
    """Say whether the files are conditionally learnable, by the bounds that were set beforehand."""
    last, peak = grouped(lines, "last"), grouped(lines, "best")
    missing = [f"{cell.who} ({cell.architecture})" for cell in cells([0]) if key(cell) not in last]
    failed = []
    for who, architecture in last:
        if (CLEAN, architecture) not in last:
            continue
        reference = last[CLEAN, architecture]
        if who == LICENSEE and reference - last[who, architecture] > COST:
            failed.append(
                f"the licensee's {architecture} loses {reference - last[who, architecture]:.1f} points"
            )
        if who not in UNTOUCHED and peak[who, architecture] > reference - GAP:
            failed.append(
                f"{who} reaches {peak[who, architecture]:.1f} of {reference:.1f} % ({architecture})"
            )
    left = f" Not measured yet: {', '.join(missing)}." if missing else ""
    if failed:
        return "NOT conditionally learnable: " + "; ".join(failed) + "." + left
    return left.strip() or f"Conditionally learnable: {COST:g} points lost at most, and {GAP:g} at least."


def key(cell: Cell) -> tuple[str, str]:
    """Return what the seeds of a row share."""
    return cell.who, cell.architecture


def grouped(lines: Sequence[dict[str, Any]], name: str) -> dict[tuple[str, str], float]:
    """Return a figure by who and architecture, in percent, the mean over seeds."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        found.setdefault(key(Cell(**line["cell"])), []).append(100 * line[name])
    return {place: statistics.fmean(values) for place, values in found.items()}


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """Return the table and the verdict."""
    text = ["| who | network | last epoch | best epoch | seeds |", "| --- | --- | ---: | ---: | ---: |"]
    seeds = Counter(key(Cell(**line["cell"])) for line in lines)
    best = grouped(lines, "best")
    for (who, architecture), last in grouped(lines, "last").items():
        place = (who, architecture)
        text.append(f"| {who} | {architecture} | {last:.1f} | {best[place]:.1f} | {seeds[place]} |")
    text += [
        "",
        "Accuracy on clean test images in %, mean over the seeds of learners; one seed and key of the noise.",
    ]
    text += ["", verdict(lines), "", machines(lines)]
    return "\n".join(text) + "\n"


def main() -> None:
    """Read the command line and run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", required=True, help="the table for CPUs")
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for protected files")
    parser.add_argument("--seeds", type=int, default=1, help="learners of each kind")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no learner after so many")
    chosen = parser.parse_args()
    data = chosen.data or Path(os.environ.get("PRIVET_DATA", "")) / "cifar10"
    if not (data / "train.parquet").exists():
        sys.exit(f"There is no {data / 'train.parquet'}; name its folder with --data, or set PRIVET_DATA.")
    torch.set_num_threads(1)
    path, until = RESULTS / "license-small.jsonl", time.monotonic() + 60 * chosen.minutes
    done = {Cell(**line["cell"]) for line in read_lines(path)}
    todo = [cell for cell in cells(range(chosen.seeds)) if cell not in done]
    bench = Bench(data, chosen.work) if todo else None
    for cell in todo:
        if bench is None or time.monotonic() > until:
            break
        line = bench(cell)
        append_line(path, line)
        print(f"{cell.who:>14} {cell.architecture:>13} seed {cell.seed}: {line['last']:.1%} "
              f"(best {line['best']:.1%}) in {line['seconds']:.0f} s", flush=True)  # fmt: skip
    write_bytes(RESULTS / "license-small.md", markdown(read_lines(path)).encode())


if __name__ == "__main__":
    main()
