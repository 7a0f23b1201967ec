"""What gradients give away, and how fast ours finds out.

    python benchmarks/invert.py --small    LeNets at 32 px, and ResNet-18: hours on one idle core
    python benchmarks/invert.py --speed    attacks side by side against one after the other: minutes

Every victim has images and a network of its own (weights uniform in ±0.5). DLG and IG get as much time as GRNN
took for the same victims. The table resumes: every image of an attacked victim is one line of
results/invert-small.jsonl, with the hardware, and a line is never measured twice. Time is processor time on a CPU, so
that other work does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from privet.files import append_line, read_lines, write_bytes, write_json
from privet.images import ImageSet, open_images
from privet.leakage import DLG, GRNN, IG, Inversion
from privet.leakage.attack import attack
from privet.leakage.client import network_of
from privet.leakage.defences import create_defence
from privet.leakage.labels import infer_labels
from privet.leakage.measure import Success, baselines, psnr
from privet.leakage.regularise import squared_variation, total_variation
from privet.leakage.victims import Victim, simulate
from privet.learning import Runtime, Update
from privet.learning.confidence import clopper_pearson
from privet.learning.update import short
from privet.models import create_model
from protect import RESULTS, hardware, machines

TARGETS = ("lenet-strided-sigmoid", "lenet-sigmoid")
DEFENCES = ("topk-90", "topk-99", "int8", "int4", "int3", "gaussian-0.01", "gaussian-0.1")
SUCCESS = Success()
QUICK = GRNN(steps=500, polish=200)  # no worse than the released attack
CALIBRATION = 60  # steps that are timed to find how many fit: more than L-BFGS keeps


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    Attributes:
        data: folder of test images below the data.
        batch: images of each victim.
        target: network.
        attack: "grnn", "grnn-long", "grnn-faithful", "dlg", "idlg" or "ig".
        defence: "none", or what `create_defence` knows.
        victims: at most, or None for as many as are asked for.
        together: side by side at most, or None likewise.
    """

    data: str = "cifar10"
    batch: int = 1
    target: str = TARGETS[0]
    attack: str = "grnn"
    defence: str = "none"
    victims: int | None = field(default=None, compare=False)
    together: int | None = field(default=None, compare=False)

    @property
    def key(self) -> dict[str, Any]:
        """What tells its lines from those of others."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.compare}

    def owns(self, line: dict[str, Any], *, aware: bool | None = None) -> bool:
        """Say whether a line belongs to it, and to attacks that were aware or not."""
        mine = all(line[name] == value for name, value in self.key.items())
        return mine and aware in (None, line["aware"])


def rows() -> list[Row]:
    """Return the rows of the table in the order of their interest."""
    return [
        *(Row(target=target, attack=name) for target in TARGETS for name in ("grnn", "idlg", "ig", "dlg")),
        *(Row(defence=defence) for defence in DEFENCES),
        Row(attack="grnn-long"),
        *(Row(target=target, attack="grnn-faithful") for target in TARGETS),
        *(Row(data="mnist-10k", batch=8, attack=name) for name in ("grnn", "ig")),
        Row(data="mnist-10k", batch=8, attack="grnn-long", victims=5),
        *(Row(batch=4, attack=name) for name in ("grnn", "ig")),
        *(Row(target="resnet18-sigmoid", attack=name, victims=4, together=2) for name in ("grnn", "ig")),
        *(Row(target="lenet-strided", attack=name) for name in ("grnn", "ig")),
    ]


def victims_of(images: ImageSet, row: Row, numbers: Sequence[int]) -> list[Victim]:
    """Return victims by their numbers, each with its images and weights."""
    defence = None if row.defence == "none" else create_defence(row.defence)
    found = []
    for number in numbers:
        model = create_model(row.target, classes=images.classes, size=images.size, seed=number).train()
        own = images.subset(list(range(number * row.batch, (number + 1) * row.batch)))
        found += simulate(
            model,
            own,
            architecture=row.target,
            victims=1,
            batch_size=row.batch,
            defence=defence,
            seed=number,
        )
    return found


def seconds(device: torch.device) -> float:
    """Return the time that this process has used."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def fitting(name: str, target: list[Victim], allowed: float, runtime: Runtime) -> Inversion:
    """Return a rival with as many steps as fit into so many seconds for these victims."""
    rival: Inversion = {
        "dlg": DLG(steps=CALIBRATION),
        "idlg": DLG(steps=CALIBRATION, labels="infer"),
        "ig": IG(steps=CALIBRATION),
    }[name]
    updates = [victim.update for victim in target]
    replace(rival, steps=2).invert(updates, runtime=runtime)  # warm up
    started = seconds(runtime.device)
    rival.invert(updates, runtime=runtime)
    each = (seconds(runtime.device) - started) / CALIBRATION
    return replace(rival, steps=max(CALIBRATION, int(allowed / each)))


def run_table(data: Path, device: str, count: int, together: int, minutes: float, only: str | None) -> None:
    """Fill the table as far as the time allows, and write it."""
    runtime, path = Runtime.find(device, "float32"), RESULTS / "invert-small.jsonl"
    until = time.monotonic() + 60 * minutes
    for row in rows():
        if only is not None and only not in "/".join(map(str, row.key.values())):
            continue
        victims, beside = min(count, row.victims or count), min(together, row.together or together)
        images = open_images(data / row.data / "test.parquet", limit=victims * row.batch, size=32)
        for first in range(0, victims, beside):
            lines = read_lines(path)
            done = {line["victim"] for line in lines if row.owns(line)}
            numbers = [n for n in range(first, min(first + beside, victims)) if n not in done]
            if not numbers:
                continue
            if time.monotonic() > until:
                break
            found = victims_of(images, row, numbers)
            inversion = inversion_of(row, lines, found, runtime)
            measure(path, row, numbers, found, inversion, runtime)
    write_bytes(RESULTS / "invert-small.md", markdown(read_lines(path), data, count).encode())


def inversion_of(
    row: Row, lines: Sequence[dict[str, Any]], found: list[Victim], runtime: Runtime
) -> Inversion:
    """Return a row's attack, a rival's with the time that GRNN took."""
    if row.attack == "grnn-long":
        return GRNN().lasting(10)
    if row.attack.startswith("grnn"):
        return GRNN.preset("faithful" if row.attack == "grnn-faithful" else "default")
    ours = replace(row, attack="grnn")
    took = [line["seconds"] for line in lines if ours.owns(line)]
    if not took:
        sys.exit(f"{row.attack} gets the time of grnn on {row.target}, which is not measured yet.")
    return fitting(row.attack, found, statistics.mean(took) * len(found), runtime)


def measure(
    path: Path, row: Row, numbers: Sequence[int], found: list[Victim], inversion: Inversion, runtime: Runtime
) -> None:
    """Attack some victims, and store and print a line for each of their images and each kind of attack."""
    started = seconds(runtime.device)
    runs = attack(found, inversion, runtime=runtime, success=SUCCESS)
    each = (seconds(runtime.device) - started) / len(found) / len(runs)
    for run in runs:
        for number, result, judged in zip(numbers, run.reconstructions, run.found, strict=True):
            for image, one in enumerate(judged):
                line: dict[str, Any] = {
                    **row.key,
                    "aware": run.aware,
                    "victim": number,
                    "image": image,
                    **vars(one),
                    "end": result.end,
                    "steps": result.steps,
                    "distance": min(result.distance, 1e30),
                    "seconds": round(each, 2),
                    "together": len(found),
                    "hardware": hardware(runtime.device, torch.get_num_threads()),
                }
                append_line(path, line)
            ratios = ", ".join(f"{one.psnr:.1f}" for one in judged)
            print(
                f"{row.data} x {row.batch} {row.target:>22} {row.attack:>13} {row.defence:>13} "
                f"{'aware' if run.aware else 'naive'} victim {number}: {ratios} dB, {judged[0].outcome}, "
                f"{result.steps} steps in {each:.1f} s",
                flush=True,
            )


def markdown(lines: Sequence[dict[str, Any]], data: Path, count: int) -> str:
    """Return the table."""
    text = [
        "| data | batch | target | attack | defence | knows it | victims | median PSNR, dB | lowest | highest |"
    ]
    text[0] += " images recovered | of victims | 95 % bounds | labels | s each |"
    text.append("| --- | ---: |" + " --- |" * 4 + " ---: |" * 9)
    for row in rows():
        for aware in (True, False) if row.defence != "none" else (None,):
            chosen = [line for line in lines if row.owns(line, aware=aware)]
            name = f"| {row.data} | {row.batch} | {row.target} | {row.attack} | {row.defence} "
            name += {None: "| ", True: "| yes ", False: "| no "}[aware]
            if not chosen:
                text.append(f"{name}| 0 | not measured" + " |" * 8)
                continue
            ratios = [line["psnr"] for line in chosen]
            victims = {line["victim"] for line in chosen}
            lost = {line["victim"] for line in chosen if line["outcome"] == "recovered"}
            low, high = clopper_pearson(len(lost), len(victims))
            text.append(
                f"{name}| {len(victims)} | {statistics.median(ratios):.1f} | {min(ratios):.1f} | {max(ratios):.1f} "
                f"| {sum(line['outcome'] == 'recovered' for line in chosen)} of {len(chosen)} | {len(lost)} "
                f"| {low:.0%} to {high:.0%} | {sum(line['label'] for line in chosen)} "
                f"| {statistics.mean(line['seconds'] for line in chosen):.1f} |"
            )
    private = open_images(data / "cifar10" / "test.parquet", limit=count).pixels.float() / 255
    public = open_images(data / "cifar10" / "train.parquet", limit=5000).pixels.float() / 255
    drawn = ", ".join(
        f"{name} {statistics.median(psnr(other, private).tolist()):.1f} dB"
        for name, other in baselines(private, public).items()
    )
    text += [
        "",
        f"Recovered: at least {SUCCESS.psnr:g} dB, or SSIM of at least {SUCCESS.ssim:g}; set before the runs.",
        "Bounds are those of the share of victims of whom an image was recovered.",
        "",
        f"Baselines, median over the first {count} test images of cifar10: {drawn} (public: 5,000 training images).",
        "",
        machines(lines),
    ]
    return "\n".join(text) + "\n"


class Generator(nn.Module):
    """GRNN's image branch for 32 px as one would write it for a single attack."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [4 * width, 2 * width, width, 3]
        layers: list[nn.Module] = [nn.ConvTranspose2d(128, 2 * widths[0], 4), nn.GLU(1)]
        for inputs, outputs in pairwise(widths):
            conv = nn.Conv2d(inputs, 2 * outputs, 3, padding=1, bias=False)
            layers += [nn.Upsample(scale_factor=2), conv, nn.BatchNorm2d(2 * outputs), nn.GLU(1)]
        self.layers = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z[:, :, None, None])  # type: ignore[no-any-return]


def plain_loop(updates: Sequence[Update], name: str, steps: int, device: torch.device) -> list[Tensor]:
    """Do one attack after the other, with nothing but modules, autograd and an optimiser, and return the images."""
    found = []
    for update in updates:
        model = network_of(update)
        model.load_state_dict({key: update.weights[short(key)] for key in model.state_dict()})
        label = infer_labels(update, model).to(device)
        parameters = list(model.to(device).parameters())
        target = [update.values[short(key)].to(device) for key, _ in model.named_parameters()]
        if name == "ig":
            x = (0.5 + 0.25 * torch.randn(1, 3, *update.size)).to(device).requires_grad_()
            optimizer: torch.optim.Optimizer = torch.optim.Adam([x], 0.025)
        else:
            generator = Generator(32 if name == "grnn-faithful" else 16).to(device)
            z = torch.randn(1, 128).to(device)
            optimizer = torch.optim.RMSprop(generator.parameters(), 1e-4, momentum=0.99)
        for _ in range(steps):
            optimizer.zero_grad()
            image = x if name == "ig" else generator(z)
            loss = nn.functional.cross_entropy(model(image), label)
            slopes = torch.autograd.grad(loss, parameters, create_graph=True)
            if name == "ig":
                product = sum((one * other).sum() for one, other in zip(slopes, target, strict=True))
                lengths = [sum(one.square().sum() for one in group).sqrt() for group in (slopes, target)]
                total = 1 - product / lengths[0] / lengths[1] + 1e-2 * total_variation(image[None]).sum()
            else:
                square = sum((one - other).square().sum() for one, other in zip(slopes, target, strict=True))
                total = square + (square + 1e-12).sqrt() + 1e-3 * squared_variation(image[None]).sum()
            total.backward()
            if name == "ig":
                x.grad.sign_()
            optimizer.step()
        found.append(image.detach())
    return found


def run_speed(data: Path, device: str, count: int) -> None:
    """Time attacks side by side against one after the other, in turns, and write the result."""
    runtime = Runtime.find(device, "float32")
    images = open_images(data / "cifar10" / "test.parquet", limit=count)
    attacks: dict[str, Inversion] = {
        "ig": IG(steps=20),
        "grnn": GRNN(steps=20, polish=0),
        "grnn-faithful": GRNN.preset("faithful", steps=20),
    }
    result: dict[str, Any] = {"victims": count, "hardware": hardware(runtime.device, torch.get_num_threads())}
    for target in TARGETS:
        updates = [victim.update for victim in victims_of(images, Row(target=target), range(count))]
        for name, inversion in attacks.items():
            replace(inversion, steps=2).invert(updates, runtime=runtime, together=count)  # warm up
            plain_loop(updates[:1], name, 2, runtime.device)
            times = []
            for attack_all in (
                partial(inversion.invert, updates, runtime=runtime, together=count),
                partial(plain_loop, updates, name, 20, runtime.device),
            ):
                started = seconds(runtime.device)
                attack_all()
                times.append(seconds(runtime.device) - started)
            entry = {
                "side_by_side_s": round(times[0], 2),
                "one_after_the_other_s": round(times[1], 2),
                "times": round(times[1] / times[0], 2),
            }
            result[f"{target}, {name}, 20 steps"] = entry
            print(target, name, entry, flush=True)
    result["as good as released"] = run_quality(images, runtime)
    write_json(RESULTS / "invert-speed.json", result)


def run_quality(images: ImageSet, runtime: Runtime) -> dict[str, Any]:
    """Time whole attacks: the released one as a plain loop, and ours with as many steps as come to the same quality."""
    victims = victims_of(images, Row(), range(len(images)))
    updates = [victim.update for victim in victims]
    truth = torch.cat([victim.images for victim in victims if victim.images is not None])
    entry: dict[str, Any] = {
        "target": Row().target,
        "victims": len(victims),
        "steps": [QUICK.steps, QUICK.polish],
    }
    attacks: dict[str, Callable[[], list[Tensor]]] = {
        "side_by_side": lambda: [one.images for one in QUICK.invert(updates, runtime=runtime)],
        "one_after_the_other": lambda: plain_loop(
            updates, "grnn-faithful", GRNN.preset("faithful").steps, runtime.device
        ),
    }
    for name, do in attacks.items():
        started = seconds(runtime.device)
        found = do()
        entry[f"{name}_s"] = round(seconds(runtime.device) - started, 2)
        entry[f"{name}_median_psnr"] = round(
            statistics.median(psnr(torch.cat(found).cpu(), truth).tolist()), 1
        )
    entry["times"] = round(entry["one_after_the_other_s"] / entry["side_by_side_s"], 2)
    print("as good as released", entry, flush=True)
    return entry


def main() -> None:
    """Read the command line and run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--small", action="store_true", help="the table")
    kind.add_argument("--speed", action="store_true", help="side by side against one after the other")
    parser.add_argument("--data", type=Path, help="folder with cifar10 and mnist-10k")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--victims", type=int, help="how many (default: 20, for --speed 16)")
    parser.add_argument("--together", type=int, default=10, help="victims that are attacked side by side")
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing after so many")
    parser.add_argument("--only", help="rows with this in data/batch/target/attack/defence")
    chosen = parser.parse_args()
    data = chosen.data or Path(os.environ.get("PRIVET_DATA", ""))
    if not (data / "cifar10" / "test.parquet").exists():
        sys.exit(
            f"There is no {data / 'cifar10'}; name the folder of data sets with --data, or set PRIVET_DATA."
        )
    if chosen.speed:
        run_speed(data, chosen.device, chosen.victims or 16)
    else:
        run_table(data, chosen.device, chosen.victims or 20, chosen.together, chosen.minutes, chosen.only)


if __name__ == "__main__":
    main()
