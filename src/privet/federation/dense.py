"""Tensors that go as they are: floats as 8-bit integers with a common step, integers as varints."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privet.errors import CodecError, InputError
from privet.federation.schema import FLOATS, Schema, Tensor, Update, Values, finite
from privet.federation.wire import Reader, varint

EXPONENTS = (-149, 127)  # of float32
MOST_STEPS = 127


def write_dense(update: Update, schema: Schema) -> bytes:
    """Return the bytes of a schema's dense tensors.

    Raises:
        InputError: a value is not finite.
    """
    parts = []
    for tensor in schema.tensors:
        if tensor.dense and tensor.size:
            array = np.asarray(update[tensor.name]).ravel()
            parts.append(
                _write_floats(array, tensor.name) if tensor.dtype in FLOATS else _write_integers(array)
            )
    return b"".join(parts)


def read_dense(data: bytes, schema: Schema) -> Update:
    """Return a schema's dense tensors, floats as float32.

    Raises:
        CodecError: these bytes are others'.
    """
    reader = Reader(data)
    update: Update = {}
    for tensor in schema.tensors:
        if not tensor.dense:
            continue
        if not tensor.size:
            update[tensor.name] = np.zeros(
                tensor.shape, np.float32 if tensor.dtype in FLOATS else tensor.dtype
            )
        elif tensor.dtype in FLOATS:
            update[tensor.name] = read_bytes(reader, tensor.size, tensor.name).reshape(tensor.shape)
        else:
            update[tensor.name] = _read_integers(reader, tensor)
    reader.end()
    return update


def write_bytes(values: Values) -> bytes:
    """Return a step, float32 cut to its upper 16 bits, and each value as a number of steps from -127 to 127."""
    largest = np.abs(values).max(initial=np.float32(0))
    step = np.float32(largest / np.float32(MOST_STEPS))
    bits = int(step.view(np.uint32))
    upper = min(
        (bits >> 16) + (bits & 0xFFFF > 0), 0x7F7F
    )  # upwards, so that the largest needs no more than 127
    step = np.uint32(upper << 16).view(np.float32)
    steps = np.zeros(len(values), np.int8)
    if step > 0:
        np.clip(np.rint(values / step), -MOST_STEPS, MOST_STEPS, out=steps, casting="unsafe")
    return upper.to_bytes(2, "little") + steps.tobytes()


def read_bytes(reader: Reader, count: int, what: str) -> Values:
    """Return values that `write_bytes` wrote."""
    upper = int.from_bytes(reader.take(2, what), "little")
    steps = np.frombuffer(reader.take(count, what), np.int8)
    if upper > 0x7F7F or (steps == -128).any():
        raise CodecError(f"Expected {what} as -127 to 127 finite steps.")
    with np.errstate(over="ignore"):
        values = steps * np.uint32(upper << 16).view(np.float32)
    if not finite(values):
        raise CodecError(f"Expected {what} as finite numbers.")
    return values


def write_exponent(exponent: int) -> bytes:
    """Return a power of two as a varint."""
    return varint(exponent - EXPONENTS[0])


def read_exponent(reader: Reader) -> int:
    """Return a power of two that float32 has."""
    return reader.varint("exponent", most=EXPONENTS[1] - EXPONENTS[0]) + EXPONENTS[0]


def _write_floats(array: NDArray[np.floating], name: str) -> bytes:
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    if not finite(values):
        raise InputError(f"Expected finite float32 values, but {name} has others; nothing was encoded.")
    return write_bytes(values)


def _write_integers(array: NDArray[np.integer]) -> bytes:
    return b"".join(varint(2 * value if value >= 0 else -2 * value - 1) for value in array.tolist())


def _read_integers(reader: Reader, tensor: Tensor) -> NDArray[np.generic]:
    dtype = np.dtype(tensor.dtype)
    least, most = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    limit = 2 * most if least == 0 else 2 * most + 1
    if reader.left < tensor.size:
        raise CodecError(
            f"Expected {tensor.size:,} numbers of {tensor.name}, but only {reader.left:,} bytes are left."
        )
    coded = [reader.varint(tensor.name, most=limit) for _ in range(tensor.size)]
    values = [-(code >> 1) - 1 if code & 1 else code >> 1 for code in coded]
    if min(values) < least:
        raise CodecError(f"Expected {tensor.name} to hold no numbers below {least}.")
    return np.array(values, dtype).reshape(tensor.shape)
