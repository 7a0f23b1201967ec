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

from privet.errors import OutputError
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
    save_state(path, state, record)


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    origin: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Restore what `save_checkpoint` wrote; return its further tensors and record, or None if absent.

    Args:
        path: the file.
        model: gets the weights.
        optimizer: gets its state.
        origin: what the record's entry "origin" must say, where nothing but the file tells whose it is.

    Raises:
        OutputError: the file is damaged, or of another origin.
    """
    found = load_state(path)
    if found is None:
        return None
    state, record = found
    earlier = record.get("origin", {})
    if other := sorted(key for key, value in (origin or {}).items() if earlier.get(key) != value):
        raise OutputError(
            f"{path} holds how far a training with another {', '.join(other)} came. Repeat that one's arguments, "
            "delete the file, or name another."
        )
    model.load_state_dict(part(state, "model/"))
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in part(state, "optimizer/").items():
        index, slot = name.split("/", 1)
        slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    # Files hold rows one after the other. Weights may lie channels last, and an optimiser steps through all at once
    # only where its own tensors lie as they do.
    for weight, slot in optimizer.state.items():
        for name, value in slot.items():
            if value.shape == weight.shape:
                slot[name] = torch.empty_like(weight).copy_(value)
    return part(state, "extra/"), record


def save_state(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and a JSON record."""
    state = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_bytes(path, safetensors.torch.save(state, {"record": json.dumps(record)}))


def load_state(path: Path | None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return what `save_state` wrote, on the processor, or None if it is absent or there is no path.

    Raises:
        OutputError: the file is damaged.
    """
    if path is None or not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: object) -> OutputError:
    """Return the error of a file of unfinished work that cannot be gone on from."""
    return OutputError(
        f"{path}, which holds how far this came, is damaged: {error}. Delete it to do that part again."
    )


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
