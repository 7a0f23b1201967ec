"""SEM against a plain version of it, in one process: how much faster, and whether it is the same.

Run by `python benchmarks/protect.py --speed`. Every time is that of a whole, if short, job that both
versions did; none is extrapolated. The plain version (plain_sem.py) keeps to the published algorithm; ours
is measured in three steps:

    exact    batched views with an explicit adjoint, views folded into one batch and spread over the cores, batch norm
             folded, channels last, float32: the same gradients to within rounding
    bf16     the same in bf16
    cpu      the settings of --preset cpu: noise that goes on from its last visit, fewer and single-view descents while
             the surrogate trains

Where a step is meant to be exact, gradients are compared on the same draws. Where it is not, the protection is: noise
is made in float32 and in bf16, and learners are trained on each.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plain_sem import augment, noise_of, plainly, train_step
from privet.files import write_json
from privet.images import FlipCrop, ImageSet, align, open_images
from privet.images.augment import _FlipCropViews
from privet.learning import Learner, Runtime, input_gradient, learn
from privet.learning.runtime import describe_device
from privet.models import create_model
from privet.protection import SEM, Job

ARCHITECTURE, IMAGES, STEPS, BATCH = "resnet10-w16", 1280, 8, 128
WORTH = {"images": 2560, "test": 2000, "train_steps": 400, "decay_steps": 200, "epochs": 20, "seeds": 2}


def run_speed(data: Path, device: str, results: Path) -> None:
    """Measure, print, and write results/speed.json."""
    images = open_images(data / "train.parquet", limit=IMAGES)
    found: dict[str, Any] = {
        "same": same(images, device),
        "jobs": jobs(images, device),
        "worth": worth(data, device),
    }
    here = Runtime.find(device)
    found["hardware"] = {
        "device": describe_device(here.device, torch.get_num_threads()),
        "torch": torch.__version__,
    }
    plain = found["jobs"]["plain"]["seconds"]
    for name, job in found["jobs"].items():
        job["times as fast"] = round(plain / job["seconds"], 2)
        print(
            f"{name:>6}: {job['seconds']:7.1f} s, {job['times as fast']:5.2f} times as fast as plain",
            flush=True,
        )
    write_json(results / "speed.json", found)


def same(images: ImageSet, device: str) -> dict[str, float]:
    """Compare the gradient of one descent on the same draws, plain against ours."""
    method = SEM(surrogate=ARCHITECTURE)
    random = torch.Generator().manual_seed(0)
    model = create_model(ARCHITECTURE, classes=images.classes, size=images.size, seed=0)
    x, y = images.pixels[:BATCH].float() / 255, images.labels[:BATCH]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with plainly():
        for _ in range(3):  # statistics of batch norm that are not the initial ones
            train_step(
                model, optimizer, x, y, SEM(surrogate=ARCHITECTURE, noise_steps=1, views=1, attack_steps=1)
            )
    views = FlipCrop(4).draw(method.views * BATCH, images.size, random)
    assert isinstance(views, _FlipCropViews)
    extra = (
        (torch.rand(method.views * BATCH, 3, *images.size, generator=random) * 2 - 1) * method.radius / 255
    )
    start = (torch.rand(x.shape, generator=random) * 2 - 1) * method.epsilon / 255
    drawn = list(zip(views.flip.tolist(), views.top.tolist(), views.left.tolist(), strict=True))
    expected = plain_gradient(model, x, y, start, drawn, extra, method.views)
    answers = {}
    for precision in ("float32", "bf16"):
        here = Runtime(device=torch.device("cpu"), precision=precision)
        placed = here.place(model).eval()
        moved = x + start
        seen = (views.apply(moved.clamp(0, 1)) + extra).clamp(0, 1)
        gradient = views.adjoint(input_gradient(placed, seen, y.repeat(method.views), runtime=here))
        gradient = gradient.reshape(method.views, *x.shape).sum(0).masked_fill(moved != moved.clamp(0, 1), 0)
        agree = (gradient.sign() == expected.sign()).float().mean()
        worst = (gradient - expected).abs().max() / expected.abs().max()
        answers[f"{precision}: signs that agree"] = float(agree)
        answers[f"{precision}: largest difference over largest gradient"] = float(worst)
        print(
            f"{precision}: {float(agree):.4%} of the gradient's signs agree, largest difference {float(worst):.1e}"
        )
    return answers


def worth(data: Path, device: str) -> dict[str, Any]:
    """Protect the same images in float32 and in bf16, and train learners on both and on the clean ones."""
    images = open_images(data / "train.parquet", limit=WORTH["images"])
    test = align(open_images(data / "test.parquet", limit=WORTH["test"]), images.class_names)
    method = SEM.preset("cpu", train_steps=WORTH["train_steps"], decay_steps=WORTH["decay_steps"])
    sets = {"clean": images}
    for precision in ("float32", "bf16"):
        sets[precision] = method.protect(images, Job(runtime=Runtime.find(device, precision)))
    changed = [sets[name].pixels.short() - images.pixels.short() for name in ("float32", "bf16")]
    found: dict[str, Any] = {
        "settings": WORTH,
        "correlation of the two noises": float(
            torch.corrcoef(torch.stack([one.flatten().float() for one in changed]))[0, 1]
        ),
    }
    learner = Learner(architecture=ARCHITECTURE, epochs=WORTH["epochs"])
    for name, files in sets.items():
        found[f"{name}: last-epoch accuracy"] = [
            learn(files, test, learner, runtime=Runtime.find(device), seed=seed).accuracy
            for seed in range(WORTH["seeds"])
        ]
        print(f"learners on {name} images: {found[f'{name}: last-epoch accuracy']}", flush=True)
    return found


def plain_gradient(
    model: torch.nn.Module, x: Tensor, y: Tensor, start: Tensor, drawn: list[Any], extra: Tensor, views: int
) -> Tensor:
    """Return the plain version's gradient, summed over the views."""
    model.eval()
    noise = start.clone().requires_grad_()
    with plainly():
        for view in range(views):
            part = slice(view * len(x), (view + 1) * len(x))
            seen = augment((x + noise).clamp(0, 1), drawn[part])
            disturbed = (seen + extra[part]).clamp(0, 1)
            loss = torch.nn.functional.cross_entropy(
                model(seen + (disturbed - seen).detach()), y, reduction="sum"
            )
            loss.backward()  # type: ignore[no-untyped-call]
    assert noise.grad is not None
    return noise.grad


def jobs(images: ImageSet, device: str) -> dict[str, dict[str, Any]]:
    """Time whole short jobs: train the surrogate for some steps, then make every image's noise."""
    published = {"surrogate": ARCHITECTURE, "train_steps": STEPS, "batch_size": BATCH}
    found: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    plain_job(images, SEM(**published), Runtime.find(device).device)  # type: ignore[arg-type]
    found["plain"] = {"seconds": time.perf_counter() - started}
    for name, precision, method in (
        ("exact", "float32", SEM(**published)),  # type: ignore[arg-type]
        ("bf16", "bf16", SEM(**published)),  # type: ignore[arg-type]
        ("cpu", "bf16", SEM.preset("cpu", train_steps=STEPS)),
    ):
        here = Runtime.find(device, precision)
        method.protect(images.subset(range(BATCH)), Job(runtime=here))  # warm up
        started = time.perf_counter()
        method.protect(images, Job(runtime=here))
        found[name] = {"seconds": time.perf_counter() - started}
    for job in found.values():
        job.update(images=len(images), train_steps=STEPS, batch=BATCH, surrogate=ARCHITECTURE)
    return found


def plain_job(images: ImageSet, method: SEM, device: torch.device) -> None:
    """Do what `SEM.protect` does, plainly."""
    model = create_model(method.surrogate, classes=images.classes, size=images.size, seed=0).to(device)
    optimizer = torch.optim.SGD(model.parameters(), method.learning_rate, momentum=0.9, weight_decay=5e-4)
    pixels, labels = images.pixels.contiguous().to(device), images.labels.to(device)
    with plainly():
        for step in range(method.train_steps):
            start = step * method.batch_size % len(images)
            part = slice(start, start + method.batch_size)
            train_step(model, optimizer, pixels[part].float() / 255, labels[part], method)
        for start in range(0, len(images), method.batch_size):
            part = slice(start, start + method.batch_size)
            noise_of(model, pixels[part].float() / 255, labels[part], method)
