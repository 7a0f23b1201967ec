"""Scaled signs with error feedback: one bit a value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from privet.errors import CodecError
from privet.federation.base import Codec, Decoded, tensor_by_tensor
from privet.federation.schema import Schema, Tensor, Values
from privet.federation.wire import Reader, Section, Sections


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
        return tensor_by_tensor(sections, schema, _read)


def _read(reader: Reader, tensor: Tensor) -> Values:
    scale = reader.scale()
    negative = np.unpackbits(np.frombuffer(reader.take(-(-tensor.size // 8), tensor.name), np.uint8))
    if negative[tensor.size :].any():
        raise CodecError(f"Expected zeros behind the last sign of {tensor.name}.")
    return np.where(negative[: tensor.size], -scale, scale).astype(np.float32)
