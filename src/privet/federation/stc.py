"""Sparse ternary compression: the largest values as plus or minus their mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from privet.errors import CodecError
from privet.federation.base import Decoded
from privet.federation.schema import Schema, Values
from privet.federation.selection import Index
from privet.federation.sparse import write_gaps
from privet.federation.topk import GlobalTop
from privet.federation.wire import Reader, Section, Sections


@dataclass(frozen=True)
class STC(GlobalTop):
    """STC (Sattler et al., arXiv 1903.02891): one magnitude for all, a bit for each sign, Golomb-coded positions.

    Deviation: the Golomb parameter, a power of two as in the paper, is chosen for each tensor.
    """

    name = "stc"
    number = 8

    def _write(self, kept: Values, index: Index, schema: Schema) -> tuple[Sections, Values]:
        mean = np.float32(np.abs(kept).mean(dtype=np.float64))
        negative = kept < 0
        data = mean.astype("<f4").tobytes() + np.packbits(negative).tobytes()
        return {Section.RICE: write_gaps(index, schema), Section.VALUES: data}, np.where(
            negative, -mean, mean
        )

    @classmethod
    def _read(cls, sections: Sections, schema: Schema) -> Decoded:
        index = cls._positions(sections, schema)
        reader = Reader(sections[Section.VALUES])
        mean = reader.scale()
        negative = np.unpackbits(np.frombuffer(reader.take(-(-len(index) // 8), "signs"), np.uint8))
        reader.end()
        if negative[len(index) :].any():
            raise CodecError("Expected zeros behind the last sign.")
        return Decoded(np.where(negative[: len(index)], -mean, mean).astype(np.float32), index)
