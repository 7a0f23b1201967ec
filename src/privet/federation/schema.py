"""What both ends of a federation know of a model: names, shapes and dtypes in order, and what is sent densely."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from privet.errors import InputError

Update = dict[str, NDArray[Any]]
Values = NDArray[np.float32]

FLOATS = ("float16", "float32", "float64")
INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
SMALLEST = 256  # elements; below, a tensor's positions and levels cost more than they save
STATISTICS = (
    "running_mean",
    "running_var",
)  # of batch norm: no weights, and an error in them is not made good


@dataclass(frozen=True)
class Tensor:
    """One array of an update.

    Attributes:
        name: its key.
        shape: its dimensions; () is a single number.
        dtype: numpy's name of its numbers.
        dense: whether it goes as it is, beside what the codec compresses.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    dense: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape as rows (outputs) and columns (inputs times kernel), as networks store weights."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return rows, self.size // rows if rows else 0


@dataclass(frozen=True)
class Schema:
    """The arrays of a model, sorted by name. It is agreed on once and never sent; each message carries its hash."""

    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, update: Mapping[str, NDArray[Any]], *, dense: Collection[str] = ()) -> Self:
        """Return the schema of these arrays.

        Integers, batch norm's running statistics, tensors of fewer than 256 elements and those named in
        `dense` are sent densely.

        Raises:
            InputError: an array whose dtype has no place in a message.
        """
        tensors = []
        for name, array in sorted(update.items()):
            kind = np.asarray(array).dtype.name
            if kind not in FLOATS + INTEGERS:
                raise InputError(f"Expected {name} as one of {', '.join(FLOATS + INTEGERS)}, got {kind}.")
            plain = (
                kind in INTEGERS or np.size(array) < SMALLEST or name.endswith(STATISTICS) or name in dense
            )
            tensors.append(Tensor(name, np.shape(array), kind, plain))
        return cls(tuple(tensors))

    @cached_property
    def hash(self) -> bytes:
        """Eight bytes that differ for different models."""
        rows = [[tensor.name, tensor.dtype, tensor.shape, tensor.dense] for tensor in self.tensors]
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).digest()

    @cached_property
    def compressed(self) -> tuple[Tensor, ...]:
        """The tensors that a codec compresses."""
        return tuple(tensor for tensor in self.tensors if not tensor.dense)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each compressed tensor begins among all values, and where the last one ends."""
        ends = [0]
        for tensor in self.compressed:
            ends.append(ends[-1] + tensor.size)
        return tuple(ends)

    @property
    def size(self) -> int:
        """Number of values that a codec compresses."""
        return self.offsets[-1]

    @cached_property
    def most_bytes(self) -> int:
        """No message of this schema is longer."""
        return sum((3 if tensor.dtype in FLOATS else 10) * tensor.size + 64 for tensor in self.tensors) + 4096

    def flatten(self, update: Mapping[str, NDArray[Any]]) -> tuple[Values, Update]:
        """Return the compressed tensors as one float32 vector, and the dense ones.

        Raises:
            InputError: names, shapes or dtypes are others, or a value is not finite.
        """
        if update.keys() != {tensor.name for tensor in self.tensors}:
            raise InputError(
                f"Expected an update of {', '.join(tensor.name for tensor in self.tensors) or 'nothing'}, got "
                f"{', '.join(sorted(update)) or 'nothing'}."
            )
        values = np.empty(self.size, np.float32)
        parts = iter(self.parts(values))
        plain: Update = {}
        for tensor in self.tensors:
            array = np.asarray(update[tensor.name])
            if array.shape != tensor.shape or array.dtype.name != tensor.dtype:
                raise InputError(
                    f"Expected {tensor.name} as {tensor.dtype}{list(tensor.shape)}, got {array.dtype.name}"
                    f"{list(array.shape)}."
                )
            if tensor.dense:
                plain[tensor.name] = array
            else:
                with np.errstate(over="ignore"):  # a float64 beyond float32 is refused below
                    next(parts)[...] = array.ravel()
        if not finite(values):
            names = [
                t.name
                for t, part in zip(self.compressed, self.parts(values), strict=True)
                if not finite(part)
            ]
            raise InputError(
                f"Expected finite float32 values, but {', '.join(names)} has others; nothing was encoded."
            )
        return values, plain

    def unflatten(self, values: Values, plain: Update) -> Update:
        """Return the update whose compressed values and dense tensors these are; floats are float32."""
        parts = iter(self.parts(values))
        return {
            tensor.name: plain[tensor.name] if tensor.dense else next(parts).reshape(tensor.shape)
            for tensor in self.tensors
        }

    def parts(self, values: Values) -> list[Values]:
        """Return each compressed tensor's values, as views."""
        return [values[start:end] for start, end in zip(self.offsets, self.offsets[1:], strict=False)]


def finite(values: NDArray[np.floating]) -> bool:
    """Say whether all values are finite."""
    flat = values.ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(
            np.dot(flat, flat)
        ):  # the sum of squares: one pass over memory, and nearly always enough
            return True
    return bool(np.isfinite(values).all())
