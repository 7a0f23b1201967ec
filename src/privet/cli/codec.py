"""privet codec: what a federated message is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cyclopts import App
from rich.markup import escape

from privet.cli.screen import say
from privet.errors import OK, InputError

codec = App(name="codec", help="Look into the messages of federated learning.")


@codec.command
def inspect(blob: Path, /, *, model: Path | None = None) -> int:
    """Say what a message holds, part by part, in bytes and bits.

    Parameters
    ----------
    blob
        A file that holds one message.
    model
        Safetensors with the model's tensors, or with an update of it. Then the message is decoded, and what it
        tells of each tensor is shown.
    """
    from privet.federation import Schema
    from privet.federation import inspect as look

    try:
        data = blob.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {blob}: {error.strerror or error}.") from error
    found = look(data, None if model is None else Schema.of(_tensors(model)))
    say(
        f"{found.codec}, format {found.version}, round {found.round}, base {found.base}, schema {found.schema}"
    )
    for part in found.parts:
        say(
            f"{part.bytes:>12,} B  {part.bytes / found.bytes:6.1%}{_each(part.bytes, found.values)}  {part.what}"
        )
    say(f"{found.bytes:>12,} B  {1:6.1%}{_each(found.bytes, found.values)}  in all")
    if found.independent:
        say(f"{found.bytes * 8 / found.independent:.3f} of what independent positions and levels would take")
    for tensor in found.tensors:
        say(
            f"{tensor.kept:>12,} of {tensor.size:,} ({tensor.kept / max(1, tensor.size):.2%}), largest "
            f"{tensor.largest:.3g}: {escape(tensor.name)} {escape(str(list(tensor.shape)))}"
        )
    return OK


def _each(size: int, values: int | None) -> str:
    return f"  {8 * size / values:9.4f} bits a value" if values else ""


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, Any] = load_file(path)
        return tensors
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"Expected safetensors in {path}: {error}.") from error
    except (TypeError, AttributeError) as error:  # what safetensors makes of bfloat16, and of 8-bit floats
        raise InputError(
            f"Expected safetensors with numbers that numpy has in {path}: {error}. Save the model as float32."
        ) from error
