"""What gradients give away, and how fast ours finds out.

    python benchmarks/invert.py --small    CIFAR-10 at 32 px, LeNets, one image: about an hour on one idle core
    python benchmarks/invert.py --speed    attacks side by side against one after the other: minutes

Every victim has an image and a network of its own (weights uniform in ±0.5). DLG and IG get as much time as GRNN
took for the same victims. The table resumes: every attacked victim is one line of results/invert-small.jsonl, with the
hardware, and a line is never measured twice. Time is processor time on a CPU, so that other work does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
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
CALIBRATION = 60  # steps that are timed to find how many fit: more than L-BFGS keeps

Row = tuple[str, str, str]
"""Target, attack ("grnn", "grnn-faithful", "dlg", "idlg", "ig") and defence ("none")."""


def rows() -> list[Row]:
    """Return the rows of the table in the order of their interest."""
    plain = [(target, name, "none") for target in TARGETS for name in ("grnn", "idlg", "ig", "dlg")]
    treated = [(TARGETS[0], "grnn", defence) for defence in DEFENCES]
    return [*plain, *treated, *((target, "grnn-faithful", "none") for target in TARGETS)]


def victims_of(images: ImageSet, target: str, numbers: Sequence[int], defence: str) -> list[Victim]:
    """Return victims by their numbers, each with its image and weights."""
    chosen = None if defence == "none" else create_defence(defence)
    found = []
    for number in numbers:
        model = create_model(target, classes=images.classes, size=images.size, seed=number).train()
        one = images.subset([number])
        found += simulate(model, one, architecture=target, victims=1, defence=chosen, seed=number)
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
    images = open_images(data / "test.parquet", limit=count)
    until = time.monotonic() + 60 * minutes
    for target, name, defence in (row for row in rows() if only is None or only in "/".join(row)):
        for first in range(0, count, together):
            lines = read_lines(path)
            done = {(one["target"], one["attack"], one["defence"], one["victim"]) for one in lines}
            numbers = [
                n
                for n in range(first, min(first + together, count))
                if (target, name, defence, n) not in done
            ]
            if not numbers:
                continue
            if time.monotonic() > until:
                break
            found = victims_of(images, target, numbers, defence)
            if name in ("grnn", "grnn-faithful"):
                inversion: Inversion = GRNN.preset("faithful" if name == "grnn-faithful" else "default")
            else:
                took = [
                    one["seconds"]
                    for one in lines
                    if (one["target"], one["attack"], one["defence"]) == (target, "grnn", "none")
                ]
                if not took:
                    sys.exit(f"{name} gets the time of grnn on {target}, which is not measured yet.")
                inversion = fitting(name, found, statistics.mean(took) * len(found), runtime)
            measure(path, (target, name, defence), numbers, found, inversion, runtime)
    write_bytes(RESULTS / "invert-small.md", markdown(read_lines(path), images, data).encode())


def measure(
    path: Path, row: Row, numbers: Sequence[int], found: list[Victim], inversion: Inversion, runtime: Runtime
) -> None:
    """Attack some victims, and store and print a line for each and for each kind of attack."""
    target, name, defence = row
    started = seconds(runtime.device)
    runs = attack(found, inversion, runtime=runtime, success=SUCCESS)
    each = (seconds(runtime.device) - started) / len(found) / len(runs)
    for run in runs:
        for number, result, judged in zip(numbers, run.reconstructions, run.found, strict=True):
            line: dict[str, Any] = {
                "target": target,
                "attack": name,
                "defence": defence,
                "aware": run.aware,
                "victim": number,
                **vars(judged[0]),
                "end": result.end,
                "steps": result.steps,
                "distance": min(result.distance, 1e30),
                "seconds": round(each, 2),
                "together": len(found),
                "hardware": hardware(runtime.device, torch.get_num_threads()),
            }
            append_line(path, line)
            print(
                f"{target:>22} {name:>13} {defence:>13} {'aware' if run.aware else 'naive'} victim {number}: "
                f"{line['psnr']:.1f} dB, {line['outcome']}, {line['steps']} steps in {each:.1f} s",
                flush=True,
            )


def markdown(lines: Sequence[dict[str, Any]], images: ImageSet, data: Path) -> str:
    """Return the table."""
    text = [
        "| target | attack | defence | knows it | victims | median PSNR, dB | lowest | highest | recovered |"
    ]
    text[0] += " 95 % bounds | labels | s each |"
    text.append("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for target, name, defence in rows():
        for aware in (True, False) if defence != "none" else (True,):
            chosen = [
                one
                for one in lines
                if (one["target"], one["attack"], one["defence"], one["aware"])
                == (target, name, defence, aware)
            ]
            if not chosen:
                text.append(f"| {target} | {name} | {defence} | | 0 | not measured | | | | | | |")
                continue
            ratios = [one["psnr"] for one in chosen]
            hits = sum(one["outcome"] == "recovered" for one in chosen)
            low, high = clopper_pearson(hits, len(chosen))
            text.append(
                f"| {target} | {name} | {defence} | {'' if defence == 'none' else 'yes' if aware else 'no'} "
                f"| {len(chosen)} | {statistics.median(ratios):.1f} | {min(ratios):.1f} | {max(ratios):.1f} "
                f"| {hits} | {low:.0%} to {high:.0%} | {sum(one['label'] for one in chosen)} "
                f"| {statistics.mean(one['seconds'] for one in chosen):.1f} |"
            )
    private = images.pixels.float() / 255
    public = open_images(data / "train.parquet", limit=5000).pixels.float() / 255
    drawn = ", ".join(
        f"{name} {statistics.median(psnr(other, private).tolist()):.1f} dB"
        for name, other in baselines(private, public).items()
    )
    text += [
        "",
        f"Recovered: at least {SUCCESS.psnr:g} dB, or SSIM of at least {SUCCESS.ssim:g}; set before the runs.",
    ]
    text += ["", f"Baselines, median over these images: {drawn} (public: 5,000 training images)."]
    text += ["", machines(lines)]
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


def plain_loop(updates: Sequence[Update], name: str, steps: int) -> None:
    """Do one attack after the other, with nothing but modules, autograd and an optimiser."""
    for update in updates:
        model = network_of(update)
        model.load_state_dict({key: update.weights[short(key)] for key in model.state_dict()})
        parameters = list(model.parameters())
        target = [update.values[short(key)] for key, _ in model.named_parameters()]
        label = infer_labels(update, model)
        if name == "ig":
            x = (0.5 + 0.25 * torch.randn(1, 3, *update.size)).requires_grad_()
            optimizer: torch.optim.Optimizer = torch.optim.Adam([x], 0.025)
        else:
            generator, z = Generator(32 if name == "grnn-faithful" else 16), torch.randn(1, 128)
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


def run_speed(data: Path, device: str, count: int) -> None:
    """Time attacks side by side against one after the other, in turns, and write the result."""
    runtime = Runtime.find(device, "float32")
    if runtime.device.type != "cpu":
        torch.set_default_device(runtime.device)
    images = open_images(data / "test.parquet", limit=count)
    attacks: dict[str, Inversion] = {
        "ig": IG(steps=20),
        "grnn": GRNN(steps=20, polish=0),
        "grnn-faithful": GRNN.preset("faithful", steps=20),
    }
    result: dict[str, Any] = {"victims": count, "hardware": hardware(runtime.device, torch.get_num_threads())}
    for target in TARGETS:
        updates = [victim.update for victim in victims_of(images, target, range(count), "none")]
        for name, inversion in attacks.items():
            replace(inversion, steps=2).invert(updates, runtime=runtime, together=count)  # warm up
            plain_loop(updates[:1], name, 2)
            times = []
            for attack_all in (
                partial(inversion.invert, updates, runtime=runtime, together=count),
                partial(plain_loop, updates, name, 20),
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
    write_json(RESULTS / "invert-speed.json", result)


def main() -> None:
    """Read the command line and run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--small", action="store_true", help="the table")
    kind.add_argument("--speed", action="store_true", help="side by side against one after the other")
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--victims", type=int, help="how many (default: 20, for --speed 16)")
    parser.add_argument("--together", type=int, default=10, help="victims that are attacked side by side")
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing after so many")
    parser.add_argument("--only", help="rows with this in target/attack/defence")
    chosen = parser.parse_args()
    data = chosen.data or Path(os.environ.get("PRIVET_DATA", "")) / "cifar10"
    if not (data / "test.parquet").exists():
        sys.exit(f"There is no {data / 'test.parquet'}; name its folder with --data, or set PRIVET_DATA.")
    if chosen.speed:
        run_speed(data, chosen.device, chosen.victims or 16)
    else:
        run_table(data, chosen.device, chosen.victims or 20, chosen.together, chosen.minutes, chosen.only)


if __name__ == "__main__":
    main()
