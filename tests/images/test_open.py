from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.conftest import blobs

from privet.errors import InputError
from privet.files import claim, finish, reserve
from privet.images import ImageSet, align, open_images, pair
from privet.images import source as module
from privet.images.open import _unique_names

Make = Callable[..., Path]


def png(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def by_name(images: ImageSet) -> dict[str, tuple[str, int]]:
    """Each image's class and first pixel."""
    return {
        name: (images.class_names[label], int(pixels[0, 0, 0]))
        for name, label, pixels in zip(images.names, images.labels.tolist(), images.pixels, strict=True)
    }


def test_class_folders(tmp_path: Path) -> None:
    put(tmp_path / "dog/a.png", png(1))
    put(tmp_path / "dog/deep/er/b.png", png(2))
    put(tmp_path / "cat/a.png", png(3))
    put(tmp_path / "empty/readme.md/none.txt", b"")
    images = open_images(tmp_path)
    assert by_name(images) == {"dog/a": ("dog", 1), "dog/deep/er/b": ("dog", 2), "cat/a": ("cat", 3)}
    assert images.class_names == ("cat", "dog", "empty")
    assert images.size == (8, 8)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("columns", [("path", "label"), ("file_name", "class")])
def test_tables(tmp_path: Path, kind: str, columns: tuple[str, str]) -> None:
    rows = [
        ("ä/ö 1.png", "two words"),
        ("b.png", "other"),
        ("absent.png", "other"),
        ("b.png", "other"),
        ("", "other"),
    ]
    for value, (file, _) in enumerate(rows[:2]):
        put(tmp_path / file, png(value))
    table = tmp_path / f"images.{kind}"
    if kind == "csv":
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
    else:
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
        table.write_text("\n".join([*lines, "not json", "[1]"]), encoding="utf-8")
    images = open_images(table)
    assert by_name(images) == {"ä/ö 1": ("two words", 0), "b": ("other", 1)}
    reasons = {skip.reason for skip in images.skipped}
    assert {"there is no such file", "listed twice", "a row without path or label"} <= reasons
    assert len(images.skipped) == (3 if kind == "csv" else 5)


def test_a_folder_with_metadata_is_read_by_it(tmp_path: Path) -> None:
    put(tmp_path / "x.png", png(7))
    (tmp_path / "metadata.csv").write_text("file_name,label\nx.png,3\n")
    assert by_name(open_images(tmp_path)) == {"x": ("3", 7)}


def test_number_labels_are_ordered_as_numbers(tmp_path: Path) -> None:
    for label in (2, 10, 1):
        put(tmp_path / f"{label}.png", png(label))
    (tmp_path / "labels.csv").write_text("path,label\n2.png,2\n10.png,10\n1.png,1\n")
    assert open_images(tmp_path).class_names == ("1", "2", "10")


def test_paths_outside_the_table_s_folder_are_named_from_their_common_folder(tmp_path: Path) -> None:
    put(tmp_path / "one/a.png", png(1))
    put(tmp_path / "two/a.png", png(2))
    table = put(tmp_path / "tables/t.csv", f"path,label\n../one/a.png,x\n{tmp_path}/two/a.png,y\n".encode())
    assert by_name(open_images(table)) == {"one/a": ("x", 1), "two/a": ("y", 2)}


def rows_of(images: ImageSet, *, paths: bool) -> dict[str, list[object]]:
    encoded = [png(int(pixels[0, 0, 0])) for pixels in images.pixels]
    return {
        "img": [
            {"bytes": data, "path": f"{name}.png" if paths else None}
            for data, name in zip(encoded, images.names, strict=True)
        ],
        "label": images.labels.tolist(),
    }


@pytest.mark.parametrize("paths", [True, False])
def test_parquet(tmp_path: Path, paths: bool) -> None:
    images = blobs(5)
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])}
    )
    datasets.Dataset.from_dict(rows_of(images, paths=paths), features=features).to_parquet(
        tmp_path / "train.parquet"
    )
    for source in (tmp_path, tmp_path / "train.parquet"):
        opened = open_images(source)
        assert opened.class_names == ("x", "y", "z")
        assert sorted(opened.names) == (
            sorted(images.names) if paths else ["x/0", "x/3", "y/1", "y/4", "z/2"]
        )
        expected = dict(zip(images.names, images.labels.tolist(), strict=True))
        if paths:
            assert {
                name: label for name, label in zip(opened.names, opened.labels.tolist(), strict=True)
            } == expected


def test_parquet_rows_without_image_or_label_are_skipped(tmp_path: Path) -> None:
    rows = {
        "image": [
            {"bytes": png(1), "path": None},
            {"bytes": None, "path": None},
            {"bytes": png(2), "path": None},
        ],
        "label": [0, 0, None],
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
    images = open_images(tmp_path / "x.parquet")
    assert len(images) == 1
    assert sorted(skip.reason for skip in images.skipped) == ["a row without image", "a row without label"]


def test_parquet_labels(tmp_path: Path) -> None:
    def table(labels: list[Any]) -> Path:
        rows = {"image": [{"bytes": png(value), "path": None} for value in (1, 2)], "label": labels}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    assert open_images(table([3, 1])).class_names == ("0", "1", "2", "3")
    assert open_images(table([10**12, 7])).class_names == ("7", "1000000000000")
    with pytest.raises(InputError, match="no single label for an image in its column 'label', but"):
        open_images(table([[0, 1], [1]]))


def test_a_split_of_a_folder_of_parquet_files(tmp_path: Path) -> None:
    for split, value in (("train", 1), ("test", 2)):
        rows = {"image": [{"bytes": png(value), "path": None}], "label": [0]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    assert int(open_images(tmp_path).pixels[0, 0, 0, 0]) == 1
    assert int(open_images(tmp_path, split="test").pixels[0, 0, 0, 0]) == 2
    with pytest.raises(InputError, match="no Parquet file of the split 'validation'; it has test-00000"):
        open_images(tmp_path, split="validation")


def test_a_hub_id_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        asked.append((name, split))
        if name == "nobody/nothing":
            raise ConnectionError("no network")
        features = datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
        )
        return datasets.Dataset.from_dict(rows_of(blobs(4), paths=False), features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(module, "_answers", lambda endpoint: True)
    images = open_images("someone/pictures", split="test")
    assert asked == [("someone/pictures", "test")]
    assert (len(images), images.class_names) == (4, ("a", "b", "c"))
    with pytest.raises(
        InputError, match=r"'nobody/nothing' \(split 'train'\) could not be loaded: no network"
    ):
        open_images("nobody/nothing")


def test_without_a_network_a_hub_id_is_looked_up_in_the_cache_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import get_session

    def unplugged(url: str, *, timeout: float) -> None:
        raise OSError("no network")

    monkeypatch.setattr(get_session(), "head", unplugged)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s to try again"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(InputError, match=r"could not be loaded from the cache \(https.* does not answer\)"):
        open_images("nobody/nothing")
    assert before == datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("name", ["./photoz", "/photoz", "a/b/photoz", "photoz.parquet", "my/photoz.csv"])
def test_what_is_no_hub_id_is_not_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="There is no file or folder"):
        open_images(name)


def test_the_order_depends_on_contents_alone(tmp_path: Path, make_folder: Make) -> None:
    images = blobs(12)
    folder = make_folder(images)
    first = open_images(folder)
    rows = [
        (f"{name}.png", images.class_names[label])
        for name, label in zip(images.names, images.labels.tolist(), strict=True)
    ]
    for order in (rows, rows[::-1]):
        lines = ["path,label", *(f"{file},{label}" for file, label in order)]
        (folder / "images.csv").write_text("\n".join(lines))
        other = open_images(folder / "images.csv")
        assert other.names == first.names
        assert torch.equal(other.pixels, first.pixels)
        assert other.digest == first.digest
    for workers in (1, 7):
        assert open_images(folder, workers=workers).digest == first.digest


def test_mixed_sizes_are_seen_at_one_size(tmp_path: Path) -> None:
    put(tmp_path / "a/wide.png", png(9, (40, 300)))
    put(tmp_path / "a/tall.png", png(200, (300, 40)))
    images = open_images(tmp_path)
    assert images.size == (224, 224)
    assert {int(pixels.unique()) for pixels in images.pixels} == {9, 200}
    assert open_images(tmp_path, size=32).size == (32, 32)


def test_larger_than_memory_goes_to_a_file(
    tmp_path: Path, make_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(blobs(6))
    expected = open_images(folder)

    class Full:
        available = 0

    monkeypatch.setattr("psutil.virtual_memory", Full)
    room: list[int] = []

    def watch(file: BinaryIO, size: int, path: Path) -> None:
        reserve(file, size, path)
        status = os.fstat(file.fileno())
        room.append(status.st_size)
        assert (
            512 * status.st_blocks >= status.st_size
        )  # or a disk that is full by then would end the process

    monkeypatch.setattr("privet.images.open.reserve", watch)
    mapped, other = (open_images(folder, workspace=tmp_path / "space") for _ in range(2))
    assert room == 2 * [6 * 8 * 8 * 3]
    assert not list((tmp_path / "space").iterdir())  # nobody else finds it, and nothing stays behind
    other.pixels.zero_()
    assert torch.equal(mapped.pixels, expected.pixels)
    assert mapped.digest == expected.digest


def test_bad_files_beside_good_ones(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    good = [put(folder / "a/good.png", png(1)), put(folder / "b/ünïcödé 漢字.png", png(2))]
    put(folder / "a/truncated.png", png(3)[:-30])
    put(folder / "a/empty.jpg", b"")
    put(folder / "a/words.png", b"words, no pixels")
    put(folder / "a/really-a-png.jpg", png(4))
    put(folder / "a/notes.txt", b"notes")
    put(folder / "a/.hidden", b"")
    put(folder / "a/Thumbs.db", b"")
    put(folder / "loose.png", png(5))
    (folder / "a/loop").symlink_to(folder / "a")
    (folder / "a/self.png").symlink_to("self.png")
    (folder / "a/gone.png").symlink_to("nowhere.png")
    (folder / "c").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "a/pipe.png")
    os.makedirs(os.fsencode(str(folder / "b")) + b"/\xff\xfe")
    put(Path(os.fsdecode(os.fsencode(str(folder / "b")) + b"/\xff\xfe/latin.png")), png(6))

    images = open_images(folder)
    latin = os.fsdecode(b"b/\xff\xfe/latin")
    assert sorted(images.names) == sorted(["a/good", "a/really-a-png", "b/ünïcödé 漢字", latin])
    assert all(path.exists() for path in good)
    reasons = {skip.file: skip.reason for skip in images.skipped}
    assert reasons.keys() == {
        *(
            f"a/{name}"
            for name in (
                "truncated.png",
                "empty.jpg",
                "words.png",
                "notes.txt",
                "loop",
                "self.png",
                "gone.png",
                "pipe.png",
            )
        ),
        "loose.png",
        "c",
    }
    assert reasons["a/loop"] == "a symbolic link that loops: it leads back to a folder above it"
    assert reasons["a/self.png"] == "a symbolic link that loops"
    assert reasons["a/gone.png"] == reasons["c"] == "a symbolic link to nothing"
    assert reasons["a/pipe.png"] == "not a regular file"
    assert "damaged" in reasons["a/truncated.png"]
    assert reasons["a/empty.jpg"] == "empty file"
    assert "not inside a class folder" in reasons["loose.png"]


def listed(row: tuple[str, str]) -> str:
    """Return a manifest's line."""
    return json.dumps({"name": row[0], "file": row[1], "status": "ok", "label": 0, "class": "a"})


def test_a_manifest_is_read_as_it_is_and_left_so(tmp_path: Path) -> None:
    put(tmp_path / "a/0.png", png(1))
    put(tmp_path / "a/1.png", png(2))
    path = put(
        tmp_path / "manifest.jsonl", "\n".join(map(listed, [("a/0", "a/0.png"), ("a/1", "a/1.png")])).encode()
    )
    before = path.read_bytes()  # without a line end at its end
    assert open_images(tmp_path).names == ("a/0", "a/1")
    assert path.read_bytes() == before


def test_a_split_of_a_folder_is_a_folder_of_its_own(tmp_path: Path) -> None:
    put(tmp_path / "train/a/0.png", png(1))
    put(tmp_path / "test/b/0.png", png(2))
    put(tmp_path / "val/x.png", png(3))
    (tmp_path / "val/metadata.csv").write_text("path,label\nx.png,c\n")
    assert by_name(open_images(tmp_path, split="test")) == {"b/0": ("b", 2)}
    assert by_name(open_images(tmp_path, split="val")) == {"x": ("c", 3)}
    with pytest.raises(InputError, match="no folder of the split 'eval'; it has test, train, val"):
        open_images(tmp_path, split="eval")


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    for split in ("train", "Test"):
        put(tmp_path / split / "a/0.png", png(len(split)))
    with pytest.raises(InputError, match=r"splits in place of classes: Test, train\. Name one with --split"):
        open_images(tmp_path)
    put(tmp_path / "bus/0.png", png(9))  # then they are vehicles and exams
    assert open_images(tmp_path).class_names == ("Test", "bus", "train")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    put(tmp_path / "train/0.png", png(1))
    put(tmp_path / "test/0.png", png(2))
    assert open_images(tmp_path).class_names == ("test", "train")


@pytest.mark.parametrize("file", ["x.csv", "metadata.csv"])
def test_a_split_of_what_has_none_is_refused(tmp_path: Path, file: str) -> None:
    put(tmp_path / "x.png", png(7))
    table = put(tmp_path / file, b"path,label\nx.png,3\n")
    with pytest.raises(InputError, match="has no splits, but the split 'test' was asked for"):
        open_images(tmp_path if file == "metadata.csv" else table, split="test")


def test_an_unfinished_run_is_no_image_set(tmp_path: Path) -> None:
    put(tmp_path / "a/0.png", png(1))
    claim(tmp_path / "b", {"run": 1})
    put(tmp_path / "b/a/0.png", png(1))
    with pytest.raises(InputError, match="b holds an unfinished run: images may be missing"):
        open_images(tmp_path / "b")
    finish(tmp_path / "b", {"run": 1}, {})
    assert len(open_images(tmp_path / "b")) == 1


def test_what_lies_beside_an_image_does_not_change_its_name(tmp_path: Path) -> None:
    for file in ("a/x.jpg", "a/y.png", "a/y.bmp"):
        put(tmp_path / file, png(len(file)))
    for file in ("a/x.txt", "a/x.xmp", "a/x.jpg.XMP"):
        put(tmp_path / file, b"about it")
    images = open_images(tmp_path)
    assert sorted(images.names) == ["a/x", "a/y.bmp", "a/y.png"]
    assert [skip.file for skip in images.skipped] == ["a/x.txt"]  # sidecars are known to be none


def test_labels_that_are_one_number_have_one_order(tmp_path: Path) -> None:
    labels = [f"{'0' * zeros}7" for zeros in range(6)]
    for index, label in enumerate(labels):
        put(tmp_path / f"{label}.png", png(index))
    rows = [f"{label}.png,{label}" for label in labels]
    put(tmp_path / "t.csv", "\n".join(["path,label", *rows]).encode())
    assert open_images(tmp_path / "t.csv").class_names == tuple(sorted(labels))


def test_what_is_skipped_does_not_decide_at_which_size_others_are_seen(tmp_path: Path) -> None:
    put(tmp_path / "a/0.png", png(1))
    frames = [Image.new("L", (50, 40), shade) for shade in (0, 200)]
    frames[0].save(tmp_path / "a/1.gif", save_all=True, append_images=frames[1:])
    images = open_images(tmp_path)
    assert images.size == (8, 8)
    assert [skip.file for skip in images.skipped] == ["a/1.gif"]


def test_captions_may_hold_other_line_ends(tmp_path: Path) -> None:
    put(tmp_path / "x.png", png(7))
    rows = {"path": "x.png", "label": "a", "caption": "one\u2028two\u0085three"}
    put(tmp_path / "t.jsonl", json.dumps(rows, ensure_ascii=False).encode())
    put(tmp_path / "t.csv", 'path,label,caption\nx.png,a,"one\u2028two\nthree"\n'.encode())
    for kind in ("jsonl", "csv"):
        images = open_images(tmp_path / f"t.{kind}")
        assert (by_name(images), images.skipped) == ({"x": ("a", 7)}, ())


MESSAGES = {
    "absent": (lambda folder: folder / "absent.csv", "There is no file or folder"),
    "empty folder": (
        lambda folder: folder,
        "has no class folders with images in them. Expected .*CLASS/image.png",
    ),
    "loose images": (
        lambda folder: put(folder / "x.png", png(1)).parent,
        "It has 1 loose images, of which nobody knows",
    ),
    "text": (lambda folder: put(folder / "x.txt", b"x"), "is a file of a kind that holds no image set"),
    "no columns": (
        lambda folder: put(folder / "x.csv", b"name,kind\na,b\n"),
        "has the columns name, kind; expected one of path",
    ),
    "latin": (lambda folder: put(folder / "x.csv", b"path,label\n\xff\xfe,b\n"), "as UTF-8 text"),
    "no rows": (lambda folder: put(folder / "x.csv", b"path,label\n"), "There is no image in"),
    "broken parquet": (lambda folder: put(folder / "x.parquet", b"PAR1nonsense"), "as Parquet"),
    "nothing usable": (
        lambda folder: put(folder / "a/x.png", b"no").parent.parent,
        "None of the 1 files .* a/x.png: not an image",
    ),
    "broken manifest": (
        lambda folder: put(folder / "manifest.jsonl", b'{"a": 1}\n').parent,
        "manifest.jsonl is damaged",
    ),
    **{
        f"hostile manifest {number}": (
            lambda folder, rows=rows: (
                put(folder / "manifest.jsonl", "\n".join(map(listed, rows)).encode()).parent
            ),
            f"manifest.jsonl is damaged: .*{words}",
        )
        for number, (rows, words) in enumerate(
            (
                ([("/etc/x", "a/0.png")], "'/etc/x' is not a path inside the folder"),
                ([("../x", "a/0.png")], "'../x' is not a path inside the folder"),
                ([("a/0", "../a/0.png")], "'../a/0.png' is not a path inside the folder"),
                ([("a/0", "a/0.png"), ("A/0", "a/1.png")], "two images have one name"),
            )
        )
    },
}


@pytest.mark.parametrize("case", MESSAGES)
def test_unusable_sources_say_what_was_expected(tmp_path: Path, case: str) -> None:
    make, message = MESSAGES[case]
    with pytest.raises(InputError, match=message):
        open_images(make(tmp_path))


@given(st.lists(st.from_regex(r"[abA_\\]{1,2}(/[ab])?(\.[abB]){0,2}(-2)?", fullmatch=True), unique=True))
def test_names_are_unique_even_without_case_and_whatever_the_order(files: list[str]) -> None:
    names = _unique_names(files)
    assert len({name.casefold() for name in names}) == len(files)
    assert _unique_names(files[::-1]) == names[::-1]
    assert not any("\\" in name for name in names)


def test_names_keep_the_suffix_only_where_they_would_clash() -> None:
    assert _unique_names(["a/x.jpg", "a/x.png", "a/y.png", "b/x.png"]) == ["a/x.jpg", "a/x.png", "a/y", "b/x"]
    assert _unique_names(["x.png", "x.jpg", "x.png.gif"]) == ["x.png", "x.jpg", "x.png.gif"]
    assert _unique_names(["a/x.png", "A/X.png", "a\\y.png"]) == ["a/x.png-2", "A/X.png", "a_y"]


def test_align_counts_labels_in_another_list() -> None:
    images = ImageSet.from_arrays(
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), class_names=["b", "a"]
    )
    aligned = align(images, ["a", "b", "c"])
    assert (aligned.labels.tolist(), aligned.class_names) == ([1, 0], ("a", "b", "c"))
    with pytest.raises(InputError, match="classes that the others lack: a. Expected only b"):
        align(images, ["b"])


def test_pairs_go_by_name() -> None:
    clean, other = blobs(6), blobs(6).subset([4, 2, 3])
    first, second = pair(clean, other)
    assert first.names == second.names == tuple(clean.names[index] for index in (2, 3, 4))
    with pytest.raises(InputError, match="No image of the two sets has the same name"):
        pair(clean.subset([0]), clean.subset([1]))


def test_real_sets(data: Path) -> None:
    cifar = open_images(data / "cifar10/test.parquet", limit=200)
    assert (len(cifar), cifar.size, cifar.classes) == (200, (32, 32), 10)
    assert not cifar.grey.any()
    faces = open_images(data / "orl-faces/all.parquet", size=32)
    assert (len(faces), faces.classes, bool(faces.grey.all())) == (400, 40, True)
    assert faces.labels.bincount().tolist() == [10] * 40
