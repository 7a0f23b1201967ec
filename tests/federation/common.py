"""Updates that look like those of training, and messages that are damaged on purpose."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.errors import CodecError
from privet.federation import Schema, decode
from privet.federation import fast as module
from privet.federation.wire import crc32c

Update = dict[str, NDArray[Any]]

BOTH = (True, False)  # with Numba, without


@contextlib.contextmanager
def numba(used: bool) -> Iterator[None]:
    """Use the compiled loops, or numpy's twins of them."""
    before = module._state["fast"]
    module._state["fast"] = used and module.numba is not None
    try:
        yield
    finally:
        module._state["fast"] = before


def network(*, scale: int = 1, seed: int = 0, tail: float = 0.7) -> Update:
    """Return an update with the tensors of a small network: heavy tails, busy rows and columns, signs that cluster."""
    draws = np.random.default_rng(seed)

    def weight(rows: int, columns: int, *kernel: int) -> NDArray[np.float32]:
        size = np.exp(draws.normal(0, 1, (rows, 1, *[1] * len(kernel)))) * np.exp(
            draws.normal(0, 1, (1, columns, *[1] * len(kernel)))
        )
        values = np.sign(draws.normal(0.8, 1, size.shape)) * np.abs(
            draws.standard_normal((rows, columns, *kernel))
        ) ** (1 / tail)
        return (1e-3 * size * values).astype(np.float32)

    return {
        "conv.weight": weight(8 * scale, 6, 3, 3),
        "conv.bias": weight(1, 8 * scale)[0],
        "norm.running_mean": weight(1, 8 * scale)[0],
        "norm.num_batches_tracked": np.array(12, np.int64),
        "fc.weight": weight(30 * scale, 50 * scale),
        "head.weight": weight(10, 30 * scale),
        "wide.bias": weight(1, 300 * scale)[0],
    }


def same_bits(first: NDArray[Any], second: NDArray[Any]) -> bool:
    """Say whether two arrays are equal to the last bit."""
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


def signed(blob: bytes) -> bytes:
    """Return a damaged message with the checksum that fits it."""
    return blob[:-4] + crc32c(blob[:-4]).to_bytes(4, "little")


def refused_or_sound(blob: bytes, schema: Schema) -> bool:
    """Decode hostile bytes; return whether they were refused, and fail if anything else than an update came out."""
    try:
        update = decode(blob, schema)
    except CodecError:
        return True
    assert [tensor.name for tensor in schema.tensors] == list(update)
    for tensor in schema.tensors:
        array = update[tensor.name]
        assert array.shape == tensor.shape
        assert array.dtype == (np.float32 if tensor.dtype.startswith("float") else np.dtype(tensor.dtype))
        assert np.isfinite(array).all()
    return False
