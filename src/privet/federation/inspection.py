"""What is in a message, part by part."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from privet.federation.base import Decoded
from privet.federation.dhq import DHQ, groups
from privet.federation.message import codec_of, read
from privet.federation.schema import Schema
from privet.federation.wire import VERSION, Section, unpack

WORDS = {
    Section.DENSE: "tensors that go as they are",
    Section.LEVELS: "levels and weights of symbols",
    Section.RICE: "positions, by Rice's code",
    Section.CONTEXT: "positions, by row and column",
    Section.SYMBOLS: "signs and levels, by rANS",
    Section.VALUES: "values",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A message's part: what it holds, and its length in bytes."""

    what: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a message tells of a tensor: so many of its values, the largest of this magnitude."""

    name: str
    shape: tuple[int, ...]
    kept: int
    size: int
    largest: float


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a message is made of.

    Attributes:
        codec: name of the codec that made it.
        version: of the format.
        round: of the federation.
        base: version of the model that the update is a difference to.
        schema: hash of the model's schema, in hexadecimal.
        bytes: length of the whole message.
        parts: its parts in order, which add up to `bytes`.
        values: number of values that were compressed; None without a schema, as all that follows.
        tensors: what it tells of each compressed tensor.
        independent: bits that positions and signed levels would take if each were coded alone, ideally and at one
            density for the whole model: what context saves is measured against it. None for codecs without levels.
    """

    codec: str
    version: int
    round: int
    base: int
    schema: str
    bytes: int
    parts: tuple[Part, ...]
    values: int | None = None
    tensors: tuple[Kept, ...] = ()
    independent: float | None = None


def inspect(blob: bytes, schema: Schema | None = None) -> Inspection:
    """Explain a message; with the model's schema also what it tells of each tensor.

    Raises:
        CodecError: it is no message, or not one of this schema.
    """
    header, sections = unpack(blob)
    frame = Part(what="header, table of parts, checksum", bytes=len(blob) - sum(map(len, sections.values())))
    codec = codec_of(header)
    found = Inspection(
        codec=codec.name,
        version=VERSION,
        round=header.round,
        base=header.base,
        schema=header.schema.hex(),
        bytes=len(blob),
        parts=(frame, *(Part(what=WORDS[kind], bytes=len(body)) for kind, body in sections.items())),
    )
    if schema is None:
        return found
    _, decoded, _ = read(blob, schema)
    independent = _independent(decoded, schema) if codec is DHQ else None
    return replace(found, values=schema.size, tensors=_tensors(decoded, schema), independent=independent)


def _independent(decoded: Decoded, schema: Schema) -> float:
    if decoded.index is None or not len(decoded.index):
        return 0.0
    symbols = np.empty(len(decoded.index), np.int64)
    for group in groups(decoded.index, schema):
        levels = np.unique(np.abs(decoded.values[group]), return_inverse=True)[1]
        symbols[group] = 2 * levels + (decoded.values[group] < 0)
    kept = len(decoded.index)
    return _entropy(np.array([kept, schema.size - kept])) + _entropy(np.bincount(symbols))


def _entropy(counts: NDArray[np.int64]) -> float:
    """Return the bits that symbols with these counts take, each coded alone and ideally."""
    used = counts[counts > 0]
    return float((used * np.log2(used.sum() / used)).sum())


def _tensors(decoded: Decoded, schema: Schema) -> tuple[Kept, ...]:
    values = decoded.dense(schema.size)
    return tuple(
        Kept(
            name=tensor.name,
            shape=tensor.shape,
            kept=int(np.count_nonzero(part)),
            size=tensor.size,
            largest=float(np.abs(part).max(initial=0)),
        )
        for tensor, part in zip(schema.compressed, schema.parts(values), strict=True)
    )
