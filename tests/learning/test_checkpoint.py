"""States of unfinished work, and what becomes of damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from privet.errors import OutputError
from privet.learning.checkpoint import load_state, save_state


def test_a_state_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    assert load_state(None) is None
    assert load_state(path) is None
    save_state(path, {"x": torch.arange(6).view(2, 3).T}, {"step": 3, "rows": [1, 2]})
    tensors, record = load_state(path) or ({}, {})
    assert torch.equal(tensors["x"], torch.arange(6).view(2, 3).T)
    assert record == {"step": 3, "rows": [1, 2]}


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
