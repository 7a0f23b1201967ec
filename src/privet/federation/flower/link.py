"""What the two ends of a federation say to each other in Flower's messages.

Everything of ours in a message is one array of an own kind that holds messages of a codec, and one ConfigRecord.
An array costs Flower hundreds of bytes whatever its size, so a model compressed to a hundredth must not
travel as one array a tensor.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any, Self

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.lib import format as npy
from numpy.typing import NDArray

from privet.errors import CodecError
from privet.federation.schema import FLOATS, Schema, Update

Arrays = dict[str, NDArray[Any]]

KEY = "privet"
STYPE = "privet/1"
LAW = "privet."  # before the names of what a node says of its values among its metrics
PROTOCOL = 1
# What Flower 1.41 adds to a request, to a reply and to each of their objects: identifiers, hashes, times; and in the
# SuperLink's answer to a reply, which names the objects that are to be sent. Its own meter agrees (test_deployment.py).
REQUEST_BYTES, REPLY_BYTES, OBJECT_BYTES, NAMED_BYTES = 250, 415, 70, 66
NUMPY = "numpy.ndarray"  # Flower's name of numpy's format
MOST_DIMENSIONS = 32  # of an array, in any version of numpy
MOST_HEADER = 1024  # characters in front of a numpy array; numpy writes 128 for any usual one
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the server says with a model.

    Attributes:
        greeting: the server asks for the node's name and does not want it to train.
        round: of the federation.
        version: of the model that the message brings the node to.
        start: the version that its first difference applies to; equal to `version` for a whole model.
        accepted: the node's last round whose reply the server took, or -1.
        classes: names of the classes in the order of their labels, with a greeting and a whole model; a node keeps
            them, so that other requests need not say them.
    """

    greeting: bool = False
    round: int = 0
    version: int = 0
    start: int = 0
    accepted: int = -1
    classes: list[str] = field(default_factory=list)
    protocol: int = PROTOCOL

    def record(self) -> ConfigRecord:
        return ConfigRecord(
            {name: value for name, value in asdict(self).items() if name != "classes" or value}
        )

    @classmethod
    def of(cls, record: ConfigRecord) -> Self:
        """Read a record.

        Raises:
            CodecError: it is no request of this protocol.
        """
        try:
            request = cls(**record)  # type: ignore[arg-type]
        except TypeError as error:
            raise CodecError(f"Expected privet's record in the request: {error}.") from error
        if request.protocol != PROTOCOL:
            raise CodecError(
                f"The server speaks protocol {request.protocol}, this node {PROTOCOL}; install the same privet."
            )
        return request


def pack(blobs: Sequence[bytes]) -> ArrayRecord:
    """Return messages of a codec as one array."""
    data = b"".join(_LENGTH.pack(len(blob)) + blob for blob in blobs)
    return ArrayRecord({KEY: Array("uint8", (len(data),), STYPE, data)})


def packed(record: ArrayRecord) -> bool:
    """Say whether a record holds messages of a codec, and not the arrays of a model."""
    return list(record) == [KEY] and record[KEY].stype == STYPE


def unpack(record: ArrayRecord) -> list[bytes]:
    """Return the messages of a packed record.

    Raises:
        CodecError: it is damaged.
    """
    data, at, blobs = record[KEY].data, 0, []
    while at < len(data):
        if len(data) - at < _LENGTH.size:
            raise CodecError("Expected the length of a message, but the bytes end.")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > len(data) - at:
            raise CodecError(f"Expected a message of {length:,} bytes, but only {len(data) - at:,} are left.")
        blobs.append(data[at : at + length])
        at += length
    return blobs


def only_arrays(content: RecordDict) -> tuple[str, ArrayRecord]:
    """Return the one record of arrays, and its key.

    Raises:
        CodecError: there is none, or several.
    """
    records = list(content.array_records.items())
    if len(records) != 1:
        raise CodecError(f"Expected one ArrayRecord, got {len(records)}.")
    return records[0]


def arrays_of(record: ArrayRecord, like: Mapping[str, NDArray[Any]] | None = None) -> Arrays:
    """Return a model's arrays. The bytes are taken to be hostile: no more memory is taken than came.

    Args:
        record: of the model.
        like: arrays whose names, shapes and dtypes they must have, or None if any will do.

    Raises:
        CodecError: they are not numpy's, damaged, or others.
    """
    if like is not None and record.keys() != like.keys():
        raise CodecError(f"Expected arrays {', '.join(like)}, got {', '.join(record)}.")
    return {name: _array(name, array, None if like is None else like[name]) for name, array in record.items()}


def _array(name: str, array: Array, like: NDArray[Any] | None) -> NDArray[Any]:
    if array.stype != NUMPY:
        raise CodecError(f"Expected numpy arrays, got {name} as {array.stype!r}.")
    file = BytesIO(array.data)
    try:  # not np.load, which takes archives, too, and takes memory before it looks for the values
        read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, by_columns, dtype = read(file, max_header_size=MOST_HEADER)
    except Exception as error:  # a header is text that Python parses, which fails in many ways
        raise CodecError(
            f"Expected numpy arrays, got {name} with a header of another kind: {error}."
        ) from error
    if like is not None:
        _same_kind(name, shape, dtype, like)
    if dtype.kind not in "biufc" or min(shape, default=0) < 0 or len(shape) > MOST_DIMENSIONS:
        raise CodecError(f"Expected numpy arrays of numbers, got {name} as {dtype}{list(shape)}.")
    at, size = file.tell(), math.prod(shape) * dtype.itemsize
    if len(array.data) - at != size:
        raise CodecError(
            f"Expected numpy arrays, got {name} with {len(array.data) - at:,} bytes for {size:,}."
        )
    return np.ndarray(shape, dtype, array.data, at, order="F" if by_columns else "C").copy()


def _same_kind(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], like: NDArray[Any]) -> None:
    if shape != like.shape or dtype != like.dtype:
        raise CodecError(f"Expected {name} as {like.dtype}{list(like.shape)}, got {dtype}{list(shape)}.")


def record_of(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Return arrays as Flower's record, in their order."""
    return ArrayRecord({name: Array(np.asarray(array, order="C")) for name, array in arrays.items()})


def digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return what tells models apart: a hash of names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, array in arrays.items():
        found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:32]


def schema_of(arrays: Mapping[str, NDArray[Any]]) -> Schema:
    """Return the schema of the differences between models with these arrays."""
    kinds = {
        name: np.dtype(np.float32) if array.dtype.name in FLOATS else array.dtype
        for name, array in arrays.items()
    }
    # Of each only shape and dtype count: one zero, spread, takes no memory.
    return Schema.of(
        {name: np.broadcast_to(kind.type(0), arrays[name].shape) for name, kind in kinds.items()}
    )


def difference(new: Mapping[str, NDArray[Any]], old: Mapping[str, NDArray[Any]]) -> Update:
    """Return what leads from `old` to `new`: float32, or integers that wrap; for bools where they differ.

    Raises:
        CodecError: names, shapes or dtypes are not the same.
    """
    if new.keys() != old.keys():
        raise CodecError(f"Expected arrays {', '.join(old)}, got {', '.join(new)}.")
    update = {}
    for name, before in old.items():
        after = new[name]
        _same_kind(name, after.shape, after.dtype, before)
        if before.dtype.name in FLOATS:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by codecs
                update[name] = np.asarray(np.subtract(after, before, dtype=np.float32, casting="unsafe"))
        else:
            update[name] = np.asarray(after ^ before if before.dtype == np.bool_ else after - before)
    return update


def moved(old: Mapping[str, NDArray[Any]], update: Update) -> Arrays:
    """Return `old` plus a difference, in the dtypes and the order of `old`; both ends compute the same bits."""
    new = {}
    for name, before in old.items():
        if before.dtype.name in FLOATS:
            with np.errstate(over="ignore", invalid="ignore"):  # and by the server
                new[name] = np.asarray(np.add(before, update[name], dtype=before.dtype, casting="unsafe"))
        else:
            new[name] = np.asarray(
                before ^ update[name] if before.dtype == np.bool_ else before + update[name]
            )
    return new


def restored(arrays: Arrays, model: Arrays) -> Arrays:
    """Return arrays in the dtypes and the order of a model's: averages turn Flower's integers into floats.

    Raises:
        CodecError: names or shapes are others.
    """
    if arrays.keys() != model.keys() or any(arrays[name].shape != model[name].shape for name in model):
        raise CodecError("Expected a strategy that returns arrays with the model's names and shapes.")
    whole = {name for name, array in model.items() if array.dtype.name not in FLOATS}
    return {
        name: (np.rint(arrays[name]) if name in whole else arrays[name]).astype(array.dtype)
        for name, array in model.items()
    }


def request_bytes(message: Message) -> int:
    """Return how many bytes Flower moves for a request: its objects, and what addresses them."""
    return REQUEST_BYTES + _wire_bytes(message)


def reply_bytes(message: Message) -> int:
    """Return how many bytes Flower moves for a reply."""
    return REPLY_BYTES + _wire_bytes(message)


def _wire_bytes(message: Message) -> int:
    if not message.has_content():
        return len(message.error.reason or "")
    sizes = list(_objects(message.content))
    return OBJECT_BYTES * (1 + len(sizes)) + sum(sizes)


def receipt_bytes(reply: Message) -> int:
    """Return how many bytes the SuperLink answers a node's reply with."""
    return NAMED_BYTES * len(list(_objects(reply.content))) if reply.has_content() else 0


def content_bytes(message: Message) -> int:
    """Return the bytes of a message's content, all records with their headers and names."""
    return sum(_objects(message.content))


def _objects(part: Any) -> Iterator[int]:
    """Yield the size of an object and of all that it refers to; arrays are cut into objects of their own."""
    yield len(part.deflate())
    for child in (part.children or {}).values():
        yield from _objects(child)
