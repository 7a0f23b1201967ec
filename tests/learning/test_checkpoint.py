"""States of unfinished work, and what becomes of damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.conftest import blobs
from torch import nn

from privet.errors import OutputError
from privet.learning import Job, Runtime, change_in_chunks
from privet.learning.checkpoint import load_checkpoint, load_state, save_checkpoint, save_state


def test_a_state_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    assert load_state(None) is None
    assert load_state(path) is None
    save_state(path, {"x": torch.arange(6).view(2, 3).T}, {"step": 3, "rows": [1, 2]})
    tensors, record = load_state(path) or ({}, {})
    assert torch.equal(tensors["x"], torch.arange(6).view(2, 3).T)
    assert record == {"step": 3, "rows": [1, 2]}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimiser_goes_on_with_tensors_that_lie_as_its_weights(
    tmp_path: Path, kind: Callable[..., torch.optim.Optimizer]
) -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, **more)
    model(torch.rand(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    kept = {name: value.clone() for name, value in optimizer.state[model.weight].items()}
    save_checkpoint(tmp_path / "state", model=model, optimizer=optimizer, record={})
    again = kind(model.parameters(), lr=0.1, **more)
    load_checkpoint(tmp_path / "state", model=model, optimizer=again)
    for name, value in again.state[model.weight].items():
        assert torch.equal(value, kept[name])
        assert value.shape != model.weight.shape or value.stride() == model.weight.stride()


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"x": torch.ones(100)}, {"step": 3})
    whole = path.read_bytes()
    others = safetensors.torch.save({"x": torch.ones(2)})
    unreadable = safetensors.torch.save({"x": torch.ones(2)}, {"record": "{"})
    for damaged in (whole[:-1], whole[:20], b"", b"\xff" * 40, others, unreadable):
        path.write_bytes(damaged)
        with pytest.raises(OutputError, match=r"state.safetensors, which .* is damaged: .* Delete it"):
            load_state(path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("changed.json", lambda _, text=text: text) for text in (b"", b"[]", b"{}", b"\xff", b"[" * 9999)),
        ("changed.json", lambda data: data.replace(b'"images": 200', b'"images": 201')),
        ("changed.json", lambda data: data.replace(b'"images": 200', b'"images": "200"')),
        ("changed.json", lambda data: data.replace(b"{}", b"[]")),
        *(("changed.npy", lambda data, end=end: data[:end]) for end in (0, 50, -1000)),
        ("changed.npy", lambda data: data + b"1"),
        ("changed.npy", lambda data: data.replace(b"|u1", b"|i1")),
        ("changed.npy", lambda data: data.replace(b"(200, 8, 8", b"(200, 4, 16")),
        ("changed.npy", lambda data: data.replace(b"(200, 8, 8", b"(200, 8[ 8")),
    ],
)
def test_damaged_pixels_are_named(
    tmp_path: Path, runtime: Runtime, name: str, damage: Callable[[bytes], bytes]
) -> None:
    images, job = blobs(200), Job(runtime=runtime, workspace=tmp_path)

    def change() -> torch.Tensor:
        return change_in_chunks(
            images, job, lambda: lambda index, _: images.pixels[index] // 2, purpose="halv"
        )

    whole, file = change().clone(), tmp_path / name
    kept = file.read_bytes()
    file.write_bytes(damage(kept))
    assert file.read_bytes() != kept
    with pytest.raises(OutputError, match=rf"{name}, which .* is damaged: .* Delete it"):
        change()
    file.unlink()
    assert torch.equal(change(), whole)
