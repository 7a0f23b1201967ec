"""What codecs share that send the largest values and leave the rest for later."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np

from privet.errors import CodecError, UsageError
from privet.federation.base import Codec, Decoded
from privet.federation.budget import Budget
from privet.federation.rice import read_rice, write_rice
from privet.federation.schema import Schema, Values
from privet.federation.selection import Index, select
from privet.federation.wire import Reader, Sections, frame_bytes, varint

USUAL = Budget(fraction=0.01)
NOTHING = Decoded(np.zeros(0, np.float32), np.zeros(0, np.int64))
TRIALS = 12  # of a count that fills a budget of bytes


class SparseCodec(Codec):
    """A codec that sends the values at some positions; it implements `_write` and `_read`."""

    feedback = True
    chooses = True

    def _fitting(
        self, values: Values, schema: Schema, budget: Budget | None, others: Sections, seed: int
    ) -> tuple[Sections, Decoded]:
        budget = budget or USUAL
        if budget.bytes is None:
            assert budget.fraction is not None
            return self._keep(values, schema, max(1, math.ceil(budget.fraction * schema.size - 1e-9)))
        best: tuple[Sections, Decoded] = {}, NOTHING
        fits, fails = 0, schema.size + 1
        count = max(1, min(schema.size, (budget.bytes - frame_bytes(others)) * 8 // 10))
        trial = 0
        while fails - fits > 1 and (trial < TRIALS or not fits):
            sections, decoded = self._keep(values, schema, count)
            size = frame_bytes(others | sections)
            if size <= budget.bytes:
                fits, best = count, (sections, decoded)
                if size >= 0.995 * budget.bytes or (decoded.index is not None and len(decoded.index) < count):
                    break
            else:
                fails = count
            trial += 1
            if trial < TRIALS:
                count = min(max(int(count * budget.bytes * 0.998 / size), fits + 1), fails - 1)
            else:  # nothing fits yet, and the estimate comes down too slowly
                count = fails // 2
        if not fits and values.any():
            raise UsageError(
                f"{self.name} needs {size:,} bytes for this update, got a budget of {budget.bytes:,}, into which not "
                "one of its values fits."
            )
        return best

    def _compress(self, values: Values, schema: Schema, seed: int) -> tuple[Sections, Decoded]:
        return self._fitting(values, schema, None, {}, seed)

    def _keep(self, values: Values, schema: Schema, count: int) -> tuple[Sections, Decoded]:
        index = self._select(values, schema, count)
        if not len(index):
            return {}, NOTHING
        sections, told = self._write(values[index], index, schema)
        return sections, Decoded(told, index)

    def _select(self, values: Values, schema: Schema, count: int) -> Index:
        return select(values, schema, count)

    @abstractmethod
    def _write(self, kept: Values, index: Index, schema: Schema) -> tuple[Sections, Values]:
        """Return the sections of values at these positions, and what the values are decoded to."""

    @classmethod
    def _decompress(cls, sections: Sections, schema: Schema) -> Decoded:
        return cls._read(sections, schema) if sections else NOTHING

    @classmethod
    @abstractmethod
    def _read(cls, sections: Sections, schema: Schema) -> Decoded:
        """Return what `_write` wrote; errors as `_decompress`."""


def write_gaps(index: Index, schema: Schema) -> bytes:
    """Return positions as each tensor's count and its gaps by Rice's code."""
    ends = np.searchsorted(index, schema.offsets)
    counts = np.diff(ends)
    first = np.repeat(np.array(schema.offsets[:-1]), counts)
    gaps = np.diff(index, prepend=-1) - 1
    starts = ends[:-1][counts > 0]
    gaps[starts] = index[starts] - first[starts]
    return b"".join(varint(count) for count in counts.tolist()) + write_rice(gaps, counts.tolist())


def read_gaps(reader: Reader, schema: Schema) -> Index:
    """Return the positions.

    Raises:
        CodecError: one of them lies outside its tensor.
    """
    counts = [reader.varint(f"positions of {tensor.name}", most=tensor.size) for tensor in schema.compressed]
    gaps = np.split(read_rice(reader, counts, schema.size, "positions"), np.cumsum(counts)[:-1])
    parts = []
    for tensor, start, group in zip(schema.compressed, schema.offsets, gaps, strict=False):
        index = start + np.cumsum(group + 1) - 1
        if len(index) and index[-1] >= start + tensor.size:
            raise CodecError(f"Expected positions inside {tensor.name}, got one past its end.")
        parts.append(index)
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
