"""Records of updates on disk: a folder with update.safetensors and update.json. Nothing is unpickled."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from privet.errors import InputError
from privet.files import read_json, sha256, write_bytes, write_json
from privet.learning.update import GROUPS, Treatment, Update

TENSORS, RECORD = "update.safetensors", "update.json"
FORMAT = "privet-update-1"


def save_update(folder: Path, update: Update) -> None:
    """Write a record as update.safetensors and update.json into `folder`.

    The JSON comes last and names the tensors' hash, so a record that was not written to its end is
    told from a whole one.

    Raises:
        InputError: its notes are no JSON values.
        OutputError: the folder cannot be written.
    """
    facts, data = contents(update)
    write_bytes(folder / TENSORS, data)
    write_json(folder / RECORD, facts)


def contents(update: Update) -> tuple[dict[str, Any], bytes]:
    """Return a record as JSON values, which name the tensors' hash, and the tensors as safetensors.

    Raises:
        InputError: its notes are no JSON values.
    """
    try:
        json.dumps(update.notes, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"Expected the notes of an update to be JSON values: {error}.") from error
    names = [entry.name for entry in fields(update) if entry.name not in GROUPS]
    facts = {name: getattr(update, name) for name in names} | {"treatment": asdict(update.treatment)}
    tensors = {
        # A copy, as safetensors refuses tensors that share memory.
        f"{group}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for group in GROUPS
        for name, tensor in getattr(update, group).items()
    }
    data = safetensors.torch.save(tensors)
    return {"format": FORMAT, "tensors": sha256(data), **facts}, data


def load_update(folder: Path) -> Update:
    """Return the record in a folder, after checking all of it.

    Raises:
        InputError: there is none, it is not whole, or its parts contradict one another.
    """
    facts = read_json(folder / RECORD)
    if facts.pop("format", None) != FORMAT:
        raise InputError(f"{folder / RECORD} is not the record of an update: expected format {FORMAT!r}.")
    digest = facts.pop("tensors", None)
    try:
        data = (folder / TENSORS).read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {folder / TENSORS}: {error.strerror or error}.") from error
    if digest != sha256(data):
        raise InputError(
            f"{folder / TENSORS} is not the file that {RECORD} describes: one of the two is damaged, or "
            "writing them was interrupted. Write the record again."
        )
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    for name, tensor in _tensors(data, folder / TENSORS).items():
        group, _, rest = name.partition("/")
        if group not in groups:
            raise InputError(f"{folder / TENSORS} holds {name!r}; expected {', '.join(GROUPS)} only.")
        groups[group][rest] = tensor
    try:
        known: dict[str, Any] = {**groups, **_facts(facts)}
        return Update(**known)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def _tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}.") from error
    return tensors


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's JSON values as the constructor takes them; it checks what they say."""
    kinds = {
        "architecture": str,
        "classes": int,
        "size": list,
        "batch_size": int,
        "kind": str,
        "images": int,
        "local_steps": int,
        "learning_rate": float | None,
        "mode": str,
        "channels": int,
        "grey": bool,
        "labels": list | None,
        "treatment": dict,
        "notes": dict,
    }
    facts = _typed(record, kinds, "")
    for required in ("architecture", "classes", "size", "batch_size"):
        if required not in facts:
            raise InputError(f"the record lacks {required!r}.")
    for name in ("size", "labels"):
        entries = facts.get(name)
        if entries is not None:
            if not all(type(entry) is int for entry in entries):
                raise InputError(f"expected whole numbers in {name!r}.")
            facts[name] = tuple(entries)
    if "treatment" in facts:
        kinds = {
            "clip": float | None,
            "noise": str | None,
            "noise_scale": float,
            "sparse": bool,
            "steps": dict,
            "stochastic": bool,
            "sign": bool,
        }
        treatment = _typed(facts["treatment"], kinds, "treatment.")
        steps = treatment.get("steps", {})
        treatment["steps"] = _typed(steps, dict.fromkeys(steps, float), "treatment.steps.")
        facts["treatment"] = Treatment(**treatment)
    return facts


def _typed(record: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    values = {}
    for name, value in record.items():
        if name not in kinds:
            raise InputError(f"unknown entry {prefix + name!r}; known are {', '.join(kinds)}.")
        kind = kinds[name]
        if type(value) is int and isinstance(0.0, kind):  # JSON writes 1.0 as 1
            value = _float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            words = kind.__name__ if isinstance(kind, type) else kind
            raise InputError(f"expected {prefix + name!r} to be {words}, got {value!s:.50}.")
        values[name] = value
    return values


def _float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
