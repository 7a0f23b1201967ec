"""Scaled signs with error feedback: one bit a value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from privet.errors import CodecError
from privet.federation.base import Codec, Decoded
from privet.federation.fp16 import values_only
from privet.federation.schema import Schema, Values
from privet.federation.wire import Section, Sections


@dataclass(frozen=True)
class ScaledSign(Codec):
    """EF-signSGD (Karimireddy et al., arXiv 1901.09847): each tensor's signs times its mean magnitude."""

    name = "sign"
    number = 6
    feedback = True

    def _compress(self, values: Values, schema: Schema, seed: int) -> tuple[Sections, Decoded]:
        data = []
        for part in schema.parts(values):
            scale = np.float32(np.abs(part).mean(dtype=np.float64))
            data.append(scale.astype("<f4").tobytes() + np.packbits(part < 0).tobytes())
        sections = {Section.VALUES: b"".join(data)}
        return sections, self._decompress(sections, schema)

    @classmethod
    def _decompress(cls, sections: Sections, schema: Schema) -> Decoded:
        reader = values_only(sections, schema)
        parts = [np.zeros(0, np.float32)]
        for tensor in schema.compressed:
            scale = reader.scale()
            negative = np.unpackbits(np.frombuffer(reader.take(-(-tensor.size // 8), tensor.name), np.uint8))
            if negative[tensor.size :].any():
                raise CodecError(f"Expected zeros behind the last sign of {tensor.name}.")
            parts.append(np.where(negative[: tensor.size], -scale, scale).astype(np.float32))
        reader.end()
        return Decoded(np.concatenate(parts))
