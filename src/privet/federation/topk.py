"""The largest values as float16: what sparsification does without levels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from privet.errors import CodecError
from privet.federation.base import Decoded
from privet.federation.dense import read_exponent, write_exponent
from privet.federation.quantise import LARGEST, exponent_of
from privet.federation.schema import Schema, Values
from privet.federation.selection import Index, largest
from privet.federation.sparse import SparseCodec, read_gaps, write_gaps
from privet.federation.wire import Reader, Section, Sections


class GlobalTop(SparseCodec):
    """Keeps the largest of all values, wherever they are; positions by Rice's code."""

    def _select(self, values: Values, schema: Schema, count: int) -> Index:
        return largest(np.abs(values), count)

    @staticmethod
    def _positions(sections: Sections, schema: Schema) -> Index:
        if set(sections) != {Section.RICE, Section.VALUES}:
            raise CodecError("Expected positions and values.")
        reader = Reader(sections[Section.RICE])
        index = read_gaps(reader, schema)
        reader.end()
        if not len(index):
            raise CodecError("Expected positions and values.")
        return index


@dataclass(frozen=True)
class TopK(GlobalTop):
    """The largest values in float16 with a common power of two (Aji and Heafield, arXiv 1704.05021, with feedback)."""

    name = "topk"
    number = 7

    def _write(self, kept: Values, index: Index, schema: Schema) -> tuple[Sections, Values]:
        exponent = exponent_of(float(np.abs(kept).max()))
        halves = np.clip(np.ldexp(kept.astype(np.float64), -exponent).astype("<f2"), -LARGEST, LARGEST)
        data = write_exponent(exponent) + halves.tobytes()
        told = np.ldexp(halves.astype(np.float32), exponent)
        return {Section.RICE: write_gaps(index, schema), Section.VALUES: data}, told

    @classmethod
    def _read(cls, sections: Sections, schema: Schema) -> Decoded:
        index = cls._positions(sections, schema)
        reader = Reader(sections[Section.VALUES])
        exponent = read_exponent(reader)
        halves = np.frombuffer(reader.take(2 * len(index), "values"), "<f2").astype(np.float32)
        reader.end()
        if not np.abs(halves).max() < 2:  # nor a NaN
            raise CodecError("Expected values between -2 and 2, times a power of two.")
        return Decoded(np.ldexp(halves, exponent), index)
