"""What tests share: small image sets that teach something, and a CPU to run on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from privet.images import ImageSet
from privet.learning import Runtime
from privet.seeds import generator

torch.set_num_threads(1)  # tests run in parallel


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Networks that a test makes have the same weights whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(device=torch.device("cpu"), precision="float32")


def stop_after(calls: int) -> Callable[[str, int, int], None]:
    """Return a listener that interrupts a job at this many reports of progress."""
    left = calls

    def stop(stage: str, done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise KeyboardInterrupt

    return stop


def blobs(
    count: int, *, size: tuple[int, int] = (8, 8), classes: int = 3, grey: bool = False, seed: int = 0
) -> ImageSet:
    """Return images whose class is the place of a bright patch, under heavy noise."""
    random = generator(seed, "blobs")
    labels = torch.arange(count) % classes
    pixels = torch.randint(40, 160, (count, 1 if grey else 3, *size), generator=random, dtype=torch.uint8)
    step = max(1, size[1] // classes)
    for index, label in enumerate(labels.tolist()):
        pixels[index, :, : size[0] // 2, label * step : (label + 1) * step] += 90
    names = [f"{label}/{index:04d}" for index, label in enumerate(labels.tolist())]
    return ImageSet.from_arrays(pixels, labels, names=names)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes an image set as a folder of class folders."""

    def make(images: ImageSet, name: str = "clean") -> Path:
        for index, image in enumerate(images.pixels):
            path = tmp_path / name / f"{images.names[index]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            array = image.permute(1, 2, 0).numpy()
            Image.fromarray(array[:, :, 0] if images.grey[index] else np.ascontiguousarray(array)).save(path)
        return tmp_path / name

    return make


@pytest.fixture
def data() -> Path:
    """Return the folder of real image sets."""
    folder = os.environ.get("PRIVET_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PRIVET_DATA does not name a folder of real image sets")
    return Path(folder)
