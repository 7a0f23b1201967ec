"""Files: whole or as they were, and without what nobody asked for."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from privet.cli import main
from privet.errors import BudgetError, OutputError
from privet.files import append_line, read_lines, write_bytes, write_json
from privet.images import ResizedCrop, distort, open_images, write, write_images
from privet.learning import Runtime
from privet.protection import RandomNoise, publish
from tests.conftest import blobs


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_nan_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_torn_line_is_cut_off_before_more_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "j"
    append_line(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b'{"a": ')
    assert read_lines(path) == [{"a": 1}]
    append_line(path, {"a": 2})
    assert read_lines(path) == [{"a": 1}, {"a": 2}]


def test_a_finished_run_mends_what_was_damaged(runtime: Runtime, tmp_path: Path) -> None:
    publish(blobs(4), RandomNoise(), tmp_path / "out", runtime=runtime)
    file = tmp_path / "out/0/0000.png"
    before = file.read_bytes()
    Image.new("RGB", (8, 8)).save(file)
    publish(blobs(4), RandomNoise(), tmp_path / "out", runtime=runtime)
    assert file.read_bytes() == before and not (tmp_path / "out/.privet").exists()


@pytest.mark.parametrize(
    ("flags", "maker", "place"),
    [
        ([], True, False),
        (["--keep-gps"], True, True),
        (["--metadata", "strip", "--keep-gps"], False, False),
    ],
)
def test_location_is_published_only_if_asked_for(
    tmp_path: Path, flags: list[str], maker: bool, place: bool
) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    for label in "ab":
        (tmp_path / "in" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8), (9, 90, 200)).save(tmp_path / "in" / label / "x.jpg", exif=exif)
    command = ["recover", str(tmp_path / "in"), "--method", "coin", "--seed", "7", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "out"), *flags]) == 0
    with Image.open(tmp_path / "out/a/x.png") as picture:
        found = picture.getexif()
        assert (0x010F in found, bool(found.get_ifd(0x8825))) == (maker, place)
    assert json.loads((tmp_path / "out/run.json").read_text())["seed"] == 7


def test_alpha_that_is_lost_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in/a").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 4)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in/a/x.png")
    plain: Any = vars(write)["encode"]
    monkeypatch.setattr(
        write, "encode", lambda picture, **options: plain(replace(picture, alpha=None), **options)
    )
    images = open_images(tmp_path / "in")
    with pytest.raises(BudgetError, match="did not come back"):
        write_images(images, images, tmp_path / "out")


def test_resized_crops_keep_their_law() -> None:
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)

    def spans(flip: bool, **law: float) -> torch.Tensor:
        crop: Any = ResizedCrop((64, 64), flip, **law)
        seen = crop.draw(4000, (64, 64), torch.Generator().manual_seed(0)).apply(ramp)
        wide: torch.Tensor = seen[:, 0, 0, -1] - seen[:, 0, 0, 0]
        return wide

    assert float(spans(False).min()) > 0 and 0.45 < float((spans(True) < 0).float().mean()) < 0.55
    assert 12 < float(spans(False).min()) < 20  # a twelfth of the area, as flat as 4:3 allows
    assert 24 < float(spans(False, least=0.2).min()) < 30


def test_distortions_compress_to_the_quality_that_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []

    def spy(x: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
        asked.append(quality)
        return x

    monkeypatch.setattr(distort, "jpeg", spy)
    distort.distort(torch.rand(500, 3, 8, 8), torch.Generator().manual_seed(0))
    assert (int(asked[0].min()), int(asked[0].max())) == (10, 100)
