"""Deep hierarchical quantisation: the codec that this room is about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privet.errors import CodecError
from privet.federation.base import Decoded
from privet.federation.context import read_context, write_context
from privet.federation.dense import read_exponent, write_exponent
from privet.federation.quantise import LARGEST, MOST_LEVELS, MeanSplit, Quantiser, fit
from privet.federation.rans import choose_weights, cost, frequencies, lanes_for, read_rans, write_rans
from privet.federation.schema import Schema, Values
from privet.federation.selection import Index
from privet.federation.sparse import SparseCodec, read_gaps, write_gaps
from privet.federation.wire import Bytes, Reader, Section, Sections

OWN = 512  # kept values from which a tensor has levels of its own; the others share theirs
RULES = 3  # of what a symbol's context is: nothing, its predecessor's sign, that and its level's half


@dataclass(frozen=True)
class DHQ(SparseCodec):
    """Send the largest values, each as one of a few levels; whatever repeats itself costs little.

    After arXiv 2212.14760, of which only the abstract was at hand: it sends a selected part of the parameters,
    quantised in a hierarchy. Everything that it does not say is a reconstruction: selection by the
    magnitude of update plus residual, levels by recursive splits at the mean (`MeanSplit`), and the bytes.

    Sign and level form one symbol, coded by rANS with frequencies that depend on the symbol before it in
    the same row; positions go by Rice's code or by row and column, whichever is shorter.

    Attributes:
        quantiser: cuts magnitudes into levels.
        context: whether positions may be coded by row and column; no is faster.
    """

    quantiser: Quantiser = field(default_factory=MeanSplit)
    context: bool = True

    name = "dhq"
    number = 1

    def _write(self, kept: Values, index: Index, schema: Schema) -> tuple[Sections, Values]:
        levels = np.empty(len(kept), np.uint8)
        told = np.empty(len(kept), np.float32)
        books = []
        for group in groups(index, schema):
            levels[group], values, exponent = fit(self.quantiser, np.abs(kept[group]))
            told[group] = np.ldexp(values, exponent)[levels[group]]
            books.append(bytes([len(values)]) + write_exponent(exponent) + values.astype("<f2").tobytes())
        negative = kept < 0
        np.negative(told, out=told, where=negative)
        symbols = 2 * levels + negative
        rule, weights, contexts, table = _model(symbols, _fresh(index, schema))
        return {
            Section.LEVELS: b"".join(books) + bytes([rule]) + weights.tobytes(),
            Section.SYMBOLS: write_rans(symbols, contexts, table),
            **self._positions(index, schema),
        }, told

    def _positions(self, index: Index, schema: Schema) -> Sections:
        plain = write_gaps(index, schema)
        if self.context:
            clever = write_context(index, schema)
            if len(clever) < len(plain):
                return {Section.CONTEXT: clever}
        return {Section.RICE: plain}

    @classmethod
    def _read(cls, sections: Sections, schema: Schema) -> Decoded:
        index = read_positions(sections, schema)
        others = set(sections) - {Section.RICE, Section.CONTEXT}
        if others != {Section.LEVELS, Section.SYMBOLS} or not len(index):
            raise CodecError("Expected positions, levels and symbols.")
        sharing = list(groups(index, schema))
        books, rule, table = _read_levels(sections[Section.LEVELS], len(sharing))
        reader = Reader(sections[Section.SYMBOLS])
        fixed = np.where(_fresh(index, schema), 0, -1).astype(np.int8)
        symbols = read_rans(reader, fixed, _successor(rule, table.shape[1]), table)
        reader.end()
        told = np.empty(len(index), np.float32)
        for group, values in zip(sharing, books, strict=True):
            levels = symbols[group] >> 1
            if int(levels.max()) >= len(values):
                raise CodecError("Expected no level beyond the tensor's last.")
            told[group] = values[levels]
        np.negative(told, out=told, where=(symbols & 1).astype(np.bool_))
        return Decoded(told, index)


def read_positions(sections: Sections, schema: Schema) -> Index:
    """Return the positions from whichever section holds them."""
    if (Section.RICE in sections) == (Section.CONTEXT in sections):
        raise CodecError("Expected positions in one section.")
    read, kind = (read_gaps, Section.RICE) if Section.RICE in sections else (read_context, Section.CONTEXT)
    reader = Reader(sections[kind])
    index = read(reader, schema)
    reader.end()
    return index


def _read_levels(data: bytes, count: int) -> tuple[list[Values], int, NDArray[np.uint32]]:
    reader = Reader(data)
    books, most = [], 0
    for _ in range(count):
        length = reader.byte("number of levels", most=MOST_LEVELS)
        exponent = read_exponent(reader)
        values = np.frombuffer(reader.take(2 * length, "levels"), "<f2").astype(np.float32)
        if not length or not (
            values[0] > 0 and 1 <= values[-1] <= LARGEST and (values[1:] > values[:-1]).all()
        ):
            raise CodecError("Expected levels above 0 and ascending, the last from 1 up to 2.")
        books.append(np.ldexp(values, exponent))
        most = max(most, length)
    rule = reader.byte("rule of contexts", most=RULES - 1)
    contexts = int(_successor(rule, 2 * most).max()) + 1
    weights = np.frombuffer(reader.take(contexts * 2 * most, "weights of symbols"), np.uint8)
    reader.end()
    return books, rule, frequencies(weights.reshape(contexts, 2 * most))


def groups(index: Index, schema: Schema) -> Iterator[Index]:
    """Yield which of the kept values share levels: those of the tensors with few, then each other tensor's."""
    ends = np.searchsorted(index, schema.offsets)
    counts = np.diff(ends)
    few = np.repeat(counts < OWN, counts)
    if few.any():
        yield np.flatnonzero(few)
    for tensor in np.flatnonzero(counts >= OWN):
        yield np.arange(ends[tensor], ends[tensor + 1])


def _fresh(index: Index, schema: Schema) -> NDArray[np.bool_]:
    """Say which of the positions are the first of their row."""
    ends = np.searchsorted(index, schema.offsets)
    rows = np.empty(len(index), np.int64)
    for tensor, offset, start, end in zip(schema.compressed, schema.offsets, ends, ends[1:], strict=False):
        rows[start:end] = (index[start:end] - offset) // tensor.matrix[1]
    fresh: NDArray[np.bool_] = np.diff(rows, prepend=-1) != 0
    fresh[ends[:-1][ends[:-1] < len(index)]] = True
    return fresh


def _successor(rule: int, symbols: int) -> Bytes:
    """Return the context that each symbol gives the next one of its row."""
    symbol = np.arange(symbols)
    sign, upper = symbol & 1, 2 * (symbol >> 1) >= symbols // 2
    contexts = (np.zeros(symbols), 1 + sign, 1 + sign + 2 * upper)
    return contexts[rule].astype(np.uint8)


def _model(symbols: Bytes, fresh: NDArray[np.bool_]) -> tuple[int, Bytes, Bytes, NDArray[np.uint32]]:
    """Return the rule, weights, contexts and frequencies that make these symbols shortest."""
    count = 2 * (int(symbols.max()) // 2 + 1)
    part = -(-len(symbols) // lanes_for(len(symbols)))
    first = fresh.copy()
    first[::part] = True  # of a lane
    best: tuple[float, int, Bytes, Bytes, NDArray[np.uint32]] | None = None
    for rule in range(RULES):
        successor = _successor(rule, count)
        contexts = np.where(first, 0, successor[np.roll(symbols, 1)]).astype(np.uint8)
        rows = int(successor.max()) + 1
        seen = np.bincount(contexts.astype(np.int64) * count + symbols, minlength=rows * count).reshape(
            rows, count
        )
        weights = choose_weights(seen)
        table = frequencies(weights)
        bits = cost(seen, table) + 8 * weights.size
        if best is None or bits < best[0]:
            best = bits, rule, weights, contexts, table
    assert best is not None
    return best[1:]
