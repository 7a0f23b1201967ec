"""How well embedders recognise people whom they never saw, in photographs and in what inversions make of gradients.

    python benchmarks/identify.py --data FOLDER    ORL faces at 32 px: about half an hour on one idle core

A network learns to tell 20 people apart, and is tried on the 20 others; then the other way round. Every photograph
is compared once with the other nine of its person and with the nine other people's that are left: 400 comparisons
in all, among 20 people each. The first photograph of each is also what a client learned from, whose gradient GRNN
attacks, knowing the defence and naively: 40 reconstructions for each. Beside the network: plain pixels, which learn
nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from invert import Row, victims_of
from privet.files import write_json
from privet.images import ImageSet, open_images
from privet.leakage import GRNN
from privet.leakage.attack import attack
from privet.leakage.embedder import Embedder
from privet.leakage.identify import Gallery, Identified, identify
from privet.leakage.measure import psnr
from privet.learning import Learner, Runtime, learn
from privet.models import SavedModel, save_model
from privet.seeds import generator
from protect import RESULTS, hardware

DEFENCES = ("none", "topk-99", "int3", "gaussian-0.01", "gaussian-0.1")
LEARNER = Learner(architecture="resnet8", epochs=60, batch_size=32, distort=True)


def part(images: ImageSet, people: Sequence[int]) -> ImageSet:
    """Return the photographs of these people, who alone are its classes."""
    chosen = images.subset([i for i, label in enumerate(images.labels.tolist()) if label in people])
    labels = torch.tensor([people.index(label) for label in chosen.labels.tolist()])
    return replace(chosen, labels=labels, class_names=tuple(images.class_names[label] for label in people))


def changed(x: Tensor, how: str) -> Tensor:
    """Return images as they are, under noise of 0.1 (about 20 dB), or blurred over 5 x 5 pixels."""
    if how == "noise":
        return (x + 0.1 * torch.randn(x.shape, generator=generator(0, "noise"))).clamp(0, 1)
    return F.avg_pool2d(x, 5, 1, 2, count_include_pad=False) if how == "blur" else x


def turns(people: ImageSet) -> list[tuple[ImageSet, ImageSet]]:
    """Return the first photograph of each person and all others, then the second, and so on."""
    turn = torch.zeros(len(people), dtype=torch.int64)
    for label in range(people.classes):
        mine = people.labels == label
        turn[mine] = torch.arange(int(mine.sum()))
    return [
        (people.subset((turn == number).nonzero()[:, 0]), people.subset((turn != number).nonzero()[:, 0]))
        for number in range(int(turn.max()) + 1)
    ]


def compare(probes: ImageSet, x: Tensor, photographs: ImageSet, embedder: Embedder) -> Identified:
    """Compare what became of photographs with a gallery of others."""
    names = [probes.class_names[label] for label in probes.labels.tolist()]
    return identify(x, names, Gallery(photographs=photographs, embedder=embedder))


def reconstructed(probes: ImageSet, runtime: Runtime, medians: dict[str, list[float]]) -> dict[str, Tensor]:
    """Return what GRNN makes of one gradient of each photograph, by what was done to it, and note the median PSNR."""
    found = {}
    for defence in DEFENCES:
        victims = victims_of(probes, Row(defence=defence), range(len(probes)))
        for run in attack(victims, GRNN(), runtime=runtime):
            name = "grnn" if defence == "none" else f"grnn, {defence}, {'aware' if run.aware else 'naive'}"
            found[name] = torch.cat([one.images.expand(-1, 3, -1, -1) for one in run.reconstructions])
            ratios = psnr(found[name], probes.pixels.float() / 255)
            medians.setdefault(name, []).append(round(statistics.median(ratios.tolist()), 1))
            print(f"{name}: median {medians[name][-1]} dB", flush=True)
    return found


def together(found: Sequence[Identified]) -> Identified:
    """Return several comparisons as one."""
    return Identified(
        scores=torch.cat([one.scores for one in found]), own=torch.cat([one.own for one in found])
    )


def main() -> None:
    """Measure, and write results/identify.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of orl-faces")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    runtime = Runtime.find("cpu", "float32")
    images = open_images(chosen.data / "all.parquet", size=chosen.size)
    order = torch.randperm(images.classes, generator=generator(chosen.seed, "people")).tolist()
    half = len(order) // 2
    found: dict[tuple[str, str], list[Identified]] = {}
    seconds = []
    medians: dict[str, list[float]] = {}
    for seen, unseen in ((order[:half], order[half:]), (order[half:], order[:half])):
        known, others = part(images, seen), part(images, unseen)
        started = time.process_time()
        learned = learn(known, known, LEARNER, runtime=runtime, seed=chosen.seed)
        seconds.append(time.process_time() - started)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "embedder.safetensors"
            about = SavedModel(
                architecture=LEARNER.architecture, class_names=known.class_names, size=known.size
            )
            save_model(path, learned.model, about)
            every = turns(others)
            first, rest = every[0]
            ours = reconstructed(first, runtime, medians)
            for embedder in (Embedder.pixels(), Embedder.load(path, runtime)):
                name = embedder.about["embedder"]
                for probes, photographs in every:
                    for how in ("clean", "noise", "blur"):
                        x = changed(probes.pixels.float() / 255, how)
                        each = found.setdefault((name, how), [])
                        each.append(compare(probes, x, photographs, embedder))
                for how, x in ours.items():
                    found.setdefault((name, how), []).append(compare(first, x, rest, embedder))
    result = {f"{name}, {how}": together(each).summary() for (name, how), each in found.items()}
    for name, row in result.items():
        print(name, row)
    write_json(
        RESULTS / "identify.json",
        {
            "learner": {"architecture": LEARNER.architecture, "epochs": LEARNER.epochs, "distort": True},
            "people_learned": half,
            "training_seconds": [round(one) for one in seconds],
            **result,
            "median_psnr": medians,
            "hardware": hardware(runtime.device, torch.get_num_threads()),
        },
    )


if __name__ == "__main__":
    main()
