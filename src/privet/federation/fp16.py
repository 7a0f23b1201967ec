"""Every value as float16: the smallest change that anybody makes to what is sent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from privet.errors import CodecError
from privet.federation.base import Codec, Decoded, values_only
from privet.federation.schema import Schema, Values, finite
from privet.federation.wire import Section, Sections


@dataclass(frozen=True)
class FP16(Codec):
    """Every value as float16; beyond its range, the nearest number in it."""

    name = "fp16"
    number = 2

    def _compress(self, values: Values, schema: Schema, seed: int) -> tuple[Sections, Decoded]:
        largest = np.finfo(np.float16).max
        halves = np.clip(values, -largest, largest).astype("<f2")
        return {Section.VALUES: halves.tobytes()}, Decoded(halves.astype(np.float32))

    @classmethod
    def _decompress(cls, sections: Sections, schema: Schema) -> Decoded:
        reader = values_only(sections, schema)
        values = np.frombuffer(reader.take(2 * schema.size, "values"), "<f2").astype(np.float32)
        reader.end()
        if not finite(values):
            raise CodecError("Expected finite values.")
        return Decoded(values)
