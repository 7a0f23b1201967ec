"""TernGrad: every value -1, 0 or 1 times the largest, at random, so that the mean is right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from privet.errors import CodecError, UsageError
from privet.federation.base import Codec, Decoded, tensor_by_tensor
from privet.federation.schema import Schema, Tensor, Values
from privet.federation.wire import Reader, Section, Sections

_POWERS = 3 ** np.arange(5)
_DIGITS = (np.arange(243)[:, None] // _POWERS % 3 - 1).astype(np.int8)  # of each byte below 243


@dataclass(frozen=True)
class TernGrad(Codec):
    """Ternary gradients (Wen et al., arXiv 1705.07878): layer-wise scale, clipped, five values a byte.

    Attributes:
        clip: in standard deviations of the layer; the paper's is 2.5.
    """

    clip: float = 2.5

    name = "terngrad"
    number = 5

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise UsageError(f"Expected a clip above 0 standard deviations, got {self.clip}.")

    def _compress(self, values: Values, schema: Schema, seed: int) -> tuple[Sections, Decoded]:
        draws = np.random.default_rng(seed)
        data = []
        for part in schema.parts(values):
            limit = self.clip * float(np.std(part, dtype=np.float64))
            scale = np.float32(min(float(np.abs(part).max()), limit or np.inf))
            chance = np.abs(part) / (scale or np.float32(1))
            signs = np.where(draws.random(len(part), np.float32) < chance, np.sign(part), 0).astype(np.int64)
            digits = np.pad(signs + 1, (0, -len(part) % 5), constant_values=1).reshape(-1, 5)
            data.append(scale.astype("<f4").tobytes() + (digits @ _POWERS).astype(np.uint8).tobytes())
        sections = {Section.VALUES: b"".join(data)}
        return sections, self._decompress(sections, schema)

    @classmethod
    def _decompress(cls, sections: Sections, schema: Schema) -> Decoded:
        return tensor_by_tensor(sections, schema, _read)


def _read(reader: Reader, tensor: Tensor) -> Values:
    scale = reader.scale()
    packed = np.frombuffer(reader.take(-(-tensor.size // 5), tensor.name), np.uint8)
    if int(packed.max()) >= 243:
        raise CodecError(f"Expected five of three values a byte in {tensor.name}.")
    digits = _DIGITS[packed].ravel()
    if digits[tensor.size :].any():
        raise CodecError(f"Expected zeros behind the last value of {tensor.name}.")
    values: Values = digits[: tensor.size] * scale
    return values
