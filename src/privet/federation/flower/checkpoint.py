"""A federation between two rounds, in files: enough to go on to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from privet.errors import InputError
from privet.federation.flower.grids import LocalGrid
from privet.federation.flower.link import Arrays, arrays_of, record_of
from privet.federation.flower.mod import MODEL, SENDER, VERSION
from privet.federation.flower.strategy import CodecStrategy, Node, Round
from privet.federation.law import Law
from privet.files import write_bytes

SERVER = "server.safetensors"


def save(
    folder: Path, strategy: CodecStrategy, grid: LocalGrid | None, arrays: ArrayRecord, more: Any
) -> None:
    """Write the server's state, and that of the clients of the last round; of all clients the first time.

    Whatever kills this, what `load` finds is one round, whole: the server's file names the clients' files, and
    old ones are deleted only after it is written.

    Args:
        folder: where.
        strategy: after a round.
        grid: likewise; None if the nodes live elsewhere, with their state.
        arrays: the model that the round left.
        more: JSON that `load` returns.
    """
    number = strategy.rounds[-1].round
    files = _record(folder)["clients"] if (folder / SERVER).exists() else {}
    for node in grid.contexts if grid else ():
        if grid and (str(node) not in files or _name(strategy, node) in strategy.rounds[-1].chosen):
            files[str(node)] = f"client-{node}-{number}.safetensors"
            write_bytes(folder / files[str(node)], _client(grid.contexts[node].state))
    download = strategy.download
    memory, kinds = _memory(strategy.inner)
    tensors = {
        **{f"model/{name}": array for name, array in arrays_of(arrays).items()},
        **{f"visible/{name}": array for name, array in download.visible.items()},
        **{
            f"difference/{version}": np.frombuffer(blob, np.uint8) for version, blob in download.blobs.items()
        },
        **memory,
    }
    record = {
        "names": list(download.visible),
        "version": download.version,
        "first": download.first,
        "nodes": {node: asdict(known) for node, known in strategy.known.items()},
        "rounds": [asdict(one) for one in strategy.rounds],
        "memory": kinds,
        "clients": files,
        "more": more,
    }
    write_bytes(folder / SERVER, safetensors.numpy.save(tensors, {"record": json.dumps(record)}))
    for path in folder.glob("client-*.safetensors"):
        if path.name not in files.values():
            path.unlink()


def load(folder: Path, strategy: CodecStrategy, grid: LocalGrid | None) -> tuple[ArrayRecord, Any] | None:
    """Restore what `save` wrote; return the model and the further JSON, or None if there is nothing.

    Raises:
        InputError: a file is damaged.
    """
    if not (folder / SERVER).exists():
        return None
    try:
        record = _record(folder)
        tensors = safetensors.numpy.load_file(folder / SERVER)
        names = record["names"]
        model = {name: tensors[f"model/{name}"] for name in names}
        arrays = record_of(model)
        strategy.go_on(
            arrays,
            rounds=[_round(one) for one in record["rounds"]],
            # What nodes elsewhere held is gone with the run that they held it for.
            known={int(node): Node(**known) for node, known in record["nodes"].items()} if grid else {},
        )
        download = strategy.download
        download.weights, download.version, download.first = model, record["version"], record["first"]
        download.visible = {name: tensors[f"visible/{name}"] for name in names}
        download.blobs = {
            int(name.removeprefix("difference/")): blob.tobytes()
            for name, blob in tensors.items()
            if name.startswith("difference/")
        }
        _remember(strategy.inner, tensors, record["memory"])
        for node, file in record["clients"].items() if grid else ():
            _restore(folder / file, grid.contexts[int(node)].state, names)  # type: ignore[union-attr]
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(
            f"The checkpoint in {folder} is damaged ({error}). Delete it and begin anew."
        ) from error
    return arrays, record["more"]


def _name(strategy: CodecStrategy, node: int) -> str | None:
    return strategy.known[node].name if node in strategy.known else None


def _record(folder: Path) -> dict[str, Any]:
    with safetensors.safe_open(folder / SERVER, framework="np") as file:
        record: dict[str, Any] = json.loads(file.metadata()["record"])
    return record


def _round(record: Mapping[str, Any]) -> Round:
    return Round(**{**record, "laws": {name: Law(**law) for name, law in record["laws"].items()}})


def _client(state: RecordDict) -> bytes:
    tensors = {
        f"{key}/{name}": array
        for key, record in state.array_records.items()
        for name, array in arrays_of(record).items()
    }
    version = str(state.config_records[VERSION]["version"]) if VERSION in state.config_records else "-1"
    data: bytes = safetensors.numpy.save(tensors, {"version": version})
    return data


def _restore(path: Path, state: RecordDict, names: list[str]) -> None:
    with safetensors.safe_open(path, framework="np") as file:
        version = int(file.metadata()["version"])
    tensors = safetensors.numpy.load_file(path)
    sender = {
        name.removeprefix(f"{SENDER}/"): array
        for name, array in tensors.items()
        if name.startswith(f"{SENDER}/")
    }
    if sender:
        state[SENDER] = record_of(sender)
    if version >= 0:
        state[MODEL] = record_of({name: tensors[f"{MODEL}/{name}"] for name in names})
        state[VERSION] = ConfigRecord({"version": version})


def _memory(inner: Strategy) -> tuple[Arrays, dict[str, str]]:
    """Return the arrays that a strategy keeps between rounds, such as momentum, and what each is kept in."""
    arrays: Arrays = {}
    kinds: dict[str, str] = {}
    for attribute, value in vars(inner).items():
        pairs: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            pairs = list(value.items())
        elif isinstance(value, list):
            pairs = [(f"{position:06d}", one) for position, one in enumerate(value)]
        if pairs and all(isinstance(one, np.ndarray | np.generic) for _, one in pairs):
            kinds[attribute] = type(value).__name__
            arrays |= {f"inner/{attribute}/{name}": np.asarray(one) for name, one in pairs}
    return arrays, kinds


def _remember(inner: Strategy, tensors: Mapping[str, NDArray[Any]], kinds: Mapping[str, str]) -> None:
    for attribute, kind in kinds.items():
        prefix = f"inner/{attribute}/"
        found = {
            name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)
        }
        setattr(inner, attribute, found if kind == "dict" else [found[name] for name in sorted(found)])
