"""An image set that is changed chunk by chunk: what is reported, kept, and gone on from."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import blobs, stop_after
from torch import Tensor

from privet.errors import OutputError
from privet.files import read_json, reserve
from privet.learning import Job, Runtime, change_in_chunks
from privet.learning.chunks import Change

IMAGES = blobs(10)


def halve(job: Job, together: int | None = None, seen: list[list[int]] | None = None) -> Tensor:
    def prepare() -> Change:
        def change(index: Tensor, randomness: torch.Generator) -> Tensor:
            if seen is not None:
                seen.append(index.tolist())
            return IMAGES.pixels[index] // 2

        return change

    return change_in_chunks(IMAGES, job, prepare, purpose="halv", together=lambda: together)


def test_progress_moves_and_is_kept_with_every_few_images(runtime: Runtime, tmp_path: Path) -> None:
    told: list[tuple[str, int, int, int]] = []

    def listen(stage: str, done: int, total: int) -> None:
        told.append((stage, done, total, read_kept(tmp_path)))

    job = Job(runtime=runtime, workspace=tmp_path, checkpoint_seconds=0, progress=listen)
    assert torch.equal(halve(job, together=4), IMAGES.pixels // 2)
    assert told == [("halving", 4, 10, 0), ("halving", 8, 10, 4), ("halving", 10, 10, 8)]
    assert read_kept(tmp_path) == 10


def read_kept(workspace: Path) -> int:
    record = workspace / "changed.json"
    return int(read_json(record)["images"]) if record.exists() else 0


@pytest.mark.parametrize(
    ("together", "left"), [(4, [[8, 9]]), (3, [[6, 7, 8], [9]]), (1, [[8], [9]]), (None, [list(range(10))])]
)
def test_a_killed_run_goes_on_whatever_the_split(
    runtime: Runtime, tmp_path: Path, together: int | None, left: list[list[int]]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        halve(
            Job(runtime=runtime, workspace=tmp_path, checkpoint_seconds=0, progress=stop_after(3)), together=4
        )
    assert read_kept(tmp_path) == 8
    seen: list[list[int]] = []
    assert torch.equal(
        halve(Job(runtime=runtime, workspace=tmp_path), together, seen=seen), IMAGES.pixels // 2
    )
    assert seen == left
    assert torch.equal(halve(Job(runtime=runtime, workspace=tmp_path), 7, seen=seen), IMAGES.pixels // 2)
    assert seen == left  # nothing was left to do


def test_pixels_that_were_deleted_are_not_believed_to_be_there(runtime: Runtime, tmp_path: Path) -> None:
    halve(Job(runtime=runtime, workspace=tmp_path))
    (tmp_path / "changed.npy").unlink()
    with pytest.raises(KeyboardInterrupt):
        halve(
            Job(runtime=runtime, workspace=tmp_path, checkpoint_seconds=99, progress=stop_after(1)),
            together=4,
        )
    assert torch.equal(halve(Job(runtime=runtime, workspace=tmp_path)), IMAGES.pixels // 2)


def test_no_image_is_no_work(runtime: Runtime, tmp_path: Path) -> None:
    none = blobs(0)
    for workspace in (None, tmp_path, tmp_path):
        job = Job(runtime=runtime, workspace=workspace)
        assert len(change_in_chunks(none, job, pytest.fail, purpose="halv")) == 0


needs_room = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot keep room")


@needs_room
@pytest.mark.skipif(sys.platform != "linux", reason="counts blocks as Linux does")
def test_the_disk_keeps_room_for_pixels_before_they_are_written(runtime: Runtime, tmp_path: Path) -> None:
    """A hole that is written through memory, with the disk full by then, would end the process."""
    images = blobs(200, size=(64, 64))

    def prepare() -> Change:
        def change(index: Tensor, randomness: torch.Generator) -> Tensor:
            status = (tmp_path / "changed.npy").stat()
            assert 512 * status.st_blocks >= status.st_size > images.pixels.numel()
            return images.pixels[index]

        return change

    job = Job(runtime=runtime, workspace=tmp_path)
    assert torch.equal(change_in_chunks(images, job, prepare, purpose="copy"), images.pixels)


@needs_room
def test_a_disk_without_room_is_one_error(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, start: int, size: int) -> None:
        os.ftruncate(file, size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with (
            (tmp_path / "large").open("wb") as file,
            pytest.raises(
                OutputError,
                match=r"Cannot write .*large: No space left on device. It takes 2,500.0 MB, and [\d,.]+ MB are free",
            ),
        ):
            reserve(file, 2_500_000_000, tmp_path / "large")
        assert (tmp_path / "large").stat().st_size == 0
        with pytest.raises(OutputError, match=r"changed.npy: No space left on device"):
            halve(Job(runtime=runtime, workspace=tmp_path))
    assert torch.equal(halve(Job(runtime=runtime, workspace=tmp_path)), IMAGES.pixels // 2)


def test_a_system_that_cannot_keep_room_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with (tmp_path / "file").open("wb") as file:
        reserve(file, 1000, tmp_path / "file")
        file.write(b"1")
    assert (tmp_path / "file").read_bytes() == b"1" + bytes(999)
