"""A vendor with one small release, and a licensee."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from privet.images import Budget, ImageSet, write_images
from privet.learning import Job, Runtime, publish_changed
from privet.licensing import Licence, StemPlan, Vendor, issue, release
from privet.models import SavedModel, create_model, save_model
from privet.seeds import generator
from tests.conftest import blobs

OURS, THEIRS = "vendor's own words", "licensee's own words"
RECIPE = {"epochs": 1, "batch_size": 6, "flip": False}
PLAN = StemPlan(group=4, tile=8)
EASY = 4  # scrypt's cost in tests


@dataclass(frozen=True)
class World:
    root: Path
    vendor: Vendor
    clean: ImageSet
    protected: ImageSet
    licence: Licence

    @property
    def folder(self) -> Path:
        return self.root / "protected"

    @property
    def file(self) -> Path:
        return self.root / "ada.licence"


def protect(clean: ImageSet, vendor: Vendor, name: str, *, epsilon: int = 8) -> ImageSet:
    """Return images with noise that the release's stem takes away."""
    wanted = 20 * torch.randn(clean.pixels.shape, generator=generator(0, name))
    stem = vendor.stem(name, group=PLAN.group, tile=PLAN.tile)
    return clean.with_pixels(
        (clean.pixels + stem.project(wanted, clean.pixels, epsilon=epsilon)).to(torch.uint8)
    )


def publish(clean: ImageSet, protected: ImageSet, out: Path) -> None:
    budget = Budget(norm="linf", amount=8)
    publish_changed(
        clean,
        lambda: protected,
        out,
        job=Job(runtime=Runtime(device=torch.device("cpu"), precision="float32")),
        record={"method": "keyed noise", "budget": budget.json()},
        budget=budget,
        workers=1,
    )


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    vendor = Vendor.create(root / "vendor", OURS, work=EASY)
    clean = blobs(12)
    write_images(clean, clean, root / "clean", workers=1)
    protected = protect(clean, vendor, "cats-1")
    publish(clean, protected, root / "protected")
    network = create_model("cnn-w4", classes=3, size=(8, 8), seed=5)
    about = SavedModel(architecture="cnn-w4", class_names=clean.class_names, size=(8, 8))
    save_model(root / "initial.safetensors", network, about)
    release(
        root / "protected",
        vendor,
        "cats-1",
        OURS,
        stem=PLAN,
        clean=root / "clean",
        weights=root / "initial.safetensors",
        recipe=RECIPE,
        work=EASY,
    )
    licence = issue(
        vendor,
        "cats-1",
        OURS,
        licensee="Ada",
        passphrase=THEIRS,
        out=root / "ada.licence",
        expires="2030-06-30",
        today=datetime.date(2030, 6, 30),
        work=EASY,
    ).licence
    return World(root, vendor, clean, protected, licence)


@pytest.fixture
def copied(made: World, tmp_path: Path) -> Callable[[], Path]:
    """Return a function that copies the release, to be spoiled."""

    def copy() -> Path:
        shutil.copytree(made.folder, tmp_path / "copy")
        return tmp_path / "copy"

    return copy
