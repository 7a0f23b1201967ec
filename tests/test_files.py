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
from privet.files import TEMPORARY, append_line, atomic, read_lines, write_bytes, write_json
from privet.images import ResizedCrop, distort, open_images, write, write_images
from privet.learning import Runtime, protection_record
from privet.protection import METHODS, RandomNoise, publish
from tests.conftest import blobs
from tests.images.test_write import tree


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


def test_what_a_kill_left_of_a_file_goes_when_the_run_is_finished(runtime: Runtime, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(*_: object, **__: object) -> None:
        with atomic(out / "0/0000.png") as temporary:
            assert TEMPORARY.fullmatch(temporary.name)
            torn.append(temporary)
        raise KeyboardInterrupt

    torn: list[Path] = []
    with pytest.raises(KeyboardInterrupt):
        publish(blobs(4), RandomNoise(), out, runtime=runtime, progress=stop)
    torn[0].write_bytes(b"half of an image")
    publish(blobs(4), RandomNoise(), out, runtime=runtime)
    publish(blobs(4), RandomNoise(), tmp_path / "whole", runtime=runtime)
    assert tree(out) == tree(tmp_path / "whole")


def test_what_undoes_a_protection_is_its_owners_alone(runtime: Runtime, tmp_path: Path) -> None:
    """While it works, and when it is done."""
    out, modes = tmp_path / "out", set[int]()
    method = METHODS["em"].preset("cpu", surrogate="cnn-w4", max_rounds=1, train_steps=1, noise_steps=1)

    def look(*_: object) -> None:
        if (out / ".privet").exists():
            modes.add((out / ".privet").stat().st_mode & 0o777)

    publish(blobs(6), method, out, runtime=runtime, progress=look)
    assert modes == {0o700}
    assert (out / "surrogate.safetensors").stat().st_mode & 0o777 == 0o600


def test_a_finished_run_mends_what_was_damaged(runtime: Runtime, tmp_path: Path) -> None:
    publish(blobs(4), RandomNoise(), tmp_path / "out", runtime=runtime)
    file = tmp_path / "out/0/0000.png"
    before = file.read_bytes()
    Image.new("RGB", (8, 8)).save(file)
    publish(blobs(4), RandomNoise(), tmp_path / "out", runtime=runtime)
    assert file.read_bytes() == before and not (tmp_path / "out/.privet").exists()
    manifest = tmp_path / "out/manifest.jsonl"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole.replace(b"{", b"[", 1))
    publish(blobs(4), RandomNoise(), tmp_path / "out", runtime=runtime)
    assert manifest.read_bytes() == whole


def test_other_metadata_are_another_run(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/b").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "in/a/0.png")
    for author in "AB":
        exif = Image.Exif()
        exif[0x013B] = author
        Image.new("RGB", (8, 8)).save(tmp_path / "in/b/0.png", exif=exif)
        images = open_images(tmp_path / "in")
        images = images.subset([images.names.index("a/0"), images.names.index("b/0")])
        if author == "A":
            publish(images, RandomNoise(), tmp_path / "out", runtime=runtime)
        else:
            with pytest.raises(OutputError, match="a finished run with other settings: files was"):
                publish(images, RandomNoise(), tmp_path / "out", runtime=runtime)


@pytest.mark.parametrize("foreign", ["[1]", "not JSON", '{"method": 3}', None])
def test_a_protection_is_known_by_its_record_alone(
    runtime: Runtime, tmp_path: Path, foreign: str | None
) -> None:
    publish(blobs(4), RandomNoise(), tmp_path / "out", runtime=runtime)
    found = protection_record(tmp_path / "out")
    assert found is not None and found["method"] == "random"
    (tmp_path / "out/run.json").unlink()
    if foreign is not None:
        (tmp_path / "out/run.json").write_text(foreign)
    assert protection_record(tmp_path / "out") is None


@pytest.mark.parametrize(
    ("flags", "maker", "place"),
    [
        ([], True, False),
        (["--keep-gps"], True, True),
        (["--metadata", "strip"], False, False),
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
