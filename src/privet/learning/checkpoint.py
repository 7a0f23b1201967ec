"""The state of an unfinished training as one safetensors file, written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from privet.files import write_bytes


def save_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor] | None = None,
    record: Mapping[str, Any],
) -> None:
    """Write network, optimiser, further tensors and a JSON record of how far the training is."""
    state: dict[str, Tensor] = {f"model/{name}": value for name, value in model.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if value is not None:
                state[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
    for name, value in (tensors or {}).items():
        state[f"extra/{name}"] = value
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_bytes(path, safetensors.torch.save(state, {"record": json.dumps(record)}))


def load_checkpoint(
    path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Restore what `save_checkpoint` wrote; return its further tensors and record, or None if absent."""
    if not path.exists():
        return None
    with safetensors.safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["record"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(_part(state, "model/"))
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in _part(state, "optimizer/").items():
        index, slot = name.split("/", 1)
        slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    return _part(state, "extra/"), record


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
