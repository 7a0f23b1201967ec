from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import blobs

from privet.errors import BudgetError, OutputError, UsageError
from privet.files import sha256
from privet.images import Budget, ImageSet, open_images, write_images
from privet.images import write as module
from privet.images.write import still_there

Make = Callable[..., Path]


def shifted(images: ImageSet, by: int = 3, seed: int = 0) -> ImageSet:
    """The images with every pixel moved up or down, grey ones in all channels alike."""
    random = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, images.pixels.shape, generator=random) * 2 - 1
    sign[images.grey] = sign[images.grey, :1].expand(-1, 3, -1, -1)
    return images.with_pixels((images.pixels.short() + by * sign).clamp(0, 255).byte())


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("format", ["png", "webp", "parquet"])
def test_what_is_written_is_read_again(tmp_path: Path, make_folder: Make, format: str, grey: bool) -> None:
    images = open_images(make_folder(blobs(7, grey=grey)))
    changed = shifted(images)
    written = write_images(
        images, changed, tmp_path / "out", budget=Budget(norm="linf", amount=3), format=format
    )
    assert (written.ok, written.skipped) == (7, ())
    again = open_images(tmp_path / "out")
    pixels = dict(zip(again.names, again.pixels, strict=True))
    for name, expected in zip(images.names, changed.pixels, strict=True):
        assert torch.equal(pixels[name], expected)
    assert again.class_names == images.class_names


def test_the_manifest_tells_what_happened_to_each_file(tmp_path: Path, make_folder: Make) -> None:
    folder = make_folder(blobs(4, size=(16, 16)))
    (folder / "0/broken.png").write_bytes(b"broken")
    images = open_images(folder)
    write_images(images, shifted(images), tmp_path / "out", budget=Budget(norm="linf", amount=3))
    lines = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["ok", "ok", "skipped", "ok", "ok"]
    assert lines[2]["file"] == "0/broken.png"
    assert "not an image" in lines[2]["reason"]
    first = lines[0]
    before, after = folder / first["source"], tmp_path / "out" / first["file"]
    assert first["sha256_before"] == sha256(before.read_bytes())
    assert first["sha256_after"] == sha256(after.read_bytes())
    difference = np.asarray(Image.open(after)).astype(int) - np.asarray(Image.open(before))
    assert first["linf"] == np.abs(difference).max() == 3
    assert first["psnr"] == pytest.approx(10 * np.log10(255**2 / (difference**2).mean()))
    assert 0 < first["ssim"] < 1
    assert (first["name"], first["class"], first["label"], first["reason"]) == ("0/0000", "0", 0, None)


def test_files_keep_their_size_kind_and_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set/cat/deep"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    large = random.integers(0, 256, (50, 300, 4)).astype(np.uint8)
    Image.fromarray(large).save(folder / "alpha.png")
    Image.fromarray(large[..., 0]).save(folder / "grey.png")
    Image.fromarray(large[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    images = open_images(tmp_path / "set", size=16)
    written = write_images(images, shifted(images, 8), tmp_path / "out", budget=Budget(norm="linf", amount=8))
    assert written.ok == 3
    for name, mode in (("alpha", "RGBA"), ("grey", "L"), ("deep", "I;16")):
        after = Image.open(tmp_path / f"out/cat/deep/{name}.png")
        assert (after.size, after.mode) == ((300, 50), mode)
        change = np.asarray(after).astype(int) - np.asarray(Image.open(folder / f"{name}.png"))
        unit = 257 if mode == "I;16" else 1
        assert 0 < np.abs(change).max() <= 8 * unit
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/cat/deep/alpha.png"))[..., 3], large[..., 3])


def test_names_that_would_clash_keep_their_suffix(tmp_path: Path) -> None:
    folder = tmp_path / "set/a"
    folder.mkdir(parents=True)
    for name in ("x.png", "x.bmp"):
        Image.new("RGB", (8, 8), (len(name), 0, 90)).save(folder / name)
    images = open_images(tmp_path / "set")
    write_images(images, shifted(images), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/a").iterdir()) == ["x.bmp.png", "x.png.png"]
    assert sorted(open_images(tmp_path / "out").names) == sorted(images.names)


def test_names_that_case_alone_tells_apart_are_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "set/a"
    folder.mkdir(parents=True)
    for shade, name in enumerate(("X.JPG", "x.jpg", "y\\z.jpg")):
        Image.new("RGB", (8, 8), (shade, 0, 90)).save(folder / name)
    images = open_images(tmp_path / "set")
    write_images(images, shifted(images), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/a").iterdir()) == [
        "X.JPG.png",
        "x.jpg-2.png",
        "y_z.png",
    ]
    assert sorted(open_images(tmp_path / "out").names) == sorted(images.names)


def test_a_name_too_long_for_a_file_is_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "set/a"
    folder.mkdir(parents=True)
    for shade, name in enumerate(("x" * 251 + ".png", "y" * 252, "z.png")):
        Image.new("RGB", (8, 8), (shade, 0, 90)).save(folder / name, "PNG")
    images = open_images(tmp_path / "set")
    written = write_images(images, shifted(images), tmp_path / "out")
    assert [(record["name"][0:3], record["reason"]) for record in written.skipped] == [
        ("a/y", "it would get a name of more than 255 bytes; shorten the old one")
    ]
    assert write_images(images, shifted(images), tmp_path / "table", format="parquet").ok == 3


def test_a_set_of_tensors_can_be_written(tmp_path: Path) -> None:
    images = blobs(3)
    written = write_images(images, shifted(images), tmp_path / "out", budget=Budget(norm="linf", amount=3))
    assert written.ok == 3
    assert written.records[0]["sha256_before"] is None


def test_over_budget_is_not_written(tmp_path: Path) -> None:
    images = blobs(1)
    with pytest.raises(
        BudgetError, match=r"0/0000 would differ from its original by 3/255; the budget is 2/255"
    ):
        write_images(images, shifted(images), tmp_path / "out", budget=Budget(norm="linf", amount=2))
    assert not list((tmp_path / "out").rglob("*.png"))


def test_bytes_that_come_back_changed_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(picture: Any, **_: Any) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(picture.rgb).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    monkeypatch.setattr(module, "encode", lossy)
    images = blobs(1)
    with pytest.raises(BudgetError, match="did not come back from its png bytes as it was written"):
        write_images(images, shifted(images), tmp_path / "out")


def test_a_file_that_changes_meanwhile_is_skipped(tmp_path: Path, make_folder: Make) -> None:
    folder = make_folder(blobs(3))
    images = open_images(folder)
    Image.new("RGB", (8, 8)).save(folder / "1/0001.png")
    (folder / "2/0002.png").unlink()
    written = write_images(images, shifted(images), tmp_path / "out")
    assert written.ok == 1
    assert {record["file"]: record["reason"] for record in written.skipped} == {
        "1/0001.png": "the file changed while it was being worked on",
        "2/0002.png": "there is no such file",
    }


def test_jpeg_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    images = blobs(1)
    with pytest.raises(UsageError, match="JPEG output is refused"):
        write_images(images, images, tmp_path, format="jpg")
    with pytest.raises(UsageError, match="Unknown metadata 'drop'; expected keep or strip"):
        write_images(images, images, tmp_path, metadata="drop")
    with pytest.raises(UsageError, match="Metadata that are stripped keep no location"):
        write_images(images, images, tmp_path, metadata="strip", gps=True)


def test_an_unwritable_place_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    images = blobs(1)
    with pytest.raises(OutputError, match="Cannot write"):
        write_images(images, shifted(images), tmp_path / "file/out")


@pytest.mark.parametrize("format", ["png", "parquet"])
def test_interrupted_writing_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, make_folder: Make, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD", 4)
    images = open_images(make_folder(blobs(11)))
    changed = shifted(images)
    write_images(images, changed, tmp_path / "whole", format=format)
    seen = []

    def stop(stage: str, done: int, total: int) -> None:
        seen.append(done)
        if len(seen) in (3, 8, 9):
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            write_images(images, changed, tmp_path / "parts", format=format, workers=1, progress=stop)
    write_images(images, changed, tmp_path / "parts", format=format)
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        (folder / ".privet/written.jsonl").unlink()
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_the_same_bytes_whatever_the_number_of_workers(tmp_path: Path, make_folder: Make) -> None:
    images = open_images(make_folder(blobs(9)))
    for workers in (1, 5):
        write_images(images, shifted(images), tmp_path / str(workers), workers=workers)
        (tmp_path / str(workers) / ".privet/written.jsonl").unlink()
    assert tree(tmp_path / "1") == tree(tmp_path / "5")


def test_large_images_fill_a_parquet_file_sooner(
    tmp_path: Path, make_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_PIXELS", 3 * 64)
    images = open_images(make_folder(blobs(7)))
    write_images(images, shifted(images), tmp_path / "out", format="parquet")
    sizes = [
        datasets.Dataset.from_parquet(str(path)).num_rows for path in sorted(tmp_path.glob("out/*.parquet"))
    ]
    assert sizes == [3, 3, 1]
    assert sorted(open_images(tmp_path / "out").names) == sorted(images.names)
    monkeypatch.setattr(module, "SHARD_PIXELS", 1)
    write_images(images, shifted(images), tmp_path / "single", format="parquet")
    assert len(list(tmp_path.glob("single/*.parquet"))) == 7


def test_a_damaged_parquet_file_is_written_again(
    tmp_path: Path, make_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD", 4)
    folder = make_folder(blobs(9))
    (folder / "0/0000.png").write_bytes(b"broken")
    images = open_images(folder)
    records = write_images(images, shifted(images), tmp_path / "out", format="parquet").records
    before = tree(tmp_path / "out")
    assert still_there(tmp_path / "out", records)
    shard = tmp_path / "out/train-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert not still_there(tmp_path / "out", records)
    again = write_images(images, shifted(images), tmp_path / "out", format="parquet").records
    after = tree(tmp_path / "out")
    assert again == records
    assert {name: after[name] for name in before if ".privet" not in name} == {
        name: before[name] for name in before if ".privet" not in name
    }


def test_parquet_is_the_hub_s_layout(
    tmp_path: Path, make_folder: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    images = open_images(make_folder(blobs(5)))
    datasets.enable_progress_bars()
    write_images(images, shifted(images), tmp_path / "out", format="parquet")
    assert capfd.readouterr().err == ""
    table = datasets.Dataset.from_parquet(str(tmp_path / "out/train-00000.parquet"))
    assert isinstance(table, datasets.Dataset)
    assert isinstance(table.features["image"], datasets.Image)
    assert table.features["label"].names == ["0", "1", "2"]
    assert table[0]["image"].size == (8, 8)


def test_a_set_without_pixels_changed_has_no_psnr(tmp_path: Path) -> None:
    images = blobs(1)
    (record,) = write_images(images, replace(images), tmp_path / "out").records
    assert (record["linf"], record["psnr"]) == (0, None)
