"""EDEN: a random rotation makes any update look Gaussian, and few bits a value then go a long way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privet.errors import CodecError, UsageError
from privet.federation.base import Codec, Decoded, values_only
from privet.federation.rice import pack, unpack_from
from privet.federation.schema import Schema, Values
from privet.federation.wire import Section, Sections

# Levels of least squared error for a standard normal number, the positive half (Max, 1960).
CENTRES = {
    1: (0.7978846,),
    2: (0.4527800, 1.5104176),
    3: (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
}
BLOCK = 1 << 14  # values rotated together
MOST_SCALE = 2.0**115  # beyond, a rotated block could leave float32


@dataclass(frozen=True)
class EDEN(Codec):
    """EDEN (Vargaftik et al., arXiv 2108.08842) with one to four bits, unbiased over its rotations.

    Blocks of 16,384 values are rotated by random signs and a Hadamard transform, each value goes to the nearest of
    the normal distribution's Lloyd-Max levels, and a scale for each block undoes the bias: |x|² / ⟨x, q⟩.

    Attributes:
        bits: for each value.
    """

    bits: int = 1

    name = "eden"
    number = 9

    def __post_init__(self) -> None:
        if self.bits not in CENTRES:
            raise UsageError(f"Expected 1 to 4 bits a value, got {self.bits}.")

    def _compress(self, values: Values, schema: Schema, seed: int) -> tuple[Sections, Decoded]:
        levels = _levels(self.bits)
        data = [bytes([self.bits]), seed.to_bytes(8, "little")]
        for start, padded in _blocks(len(values)):
            part = np.zeros(padded, np.float32)
            part[: len(values) - start] = values[start : start + padded]
            largest = float(np.abs(part).max()) or 1.0
            rotated = _hadamard((part / np.float32(largest)) * _signs(seed, start, padded)).astype(np.float64)
            size = float(np.sqrt(np.mean(np.square(rotated)))) or 1.0
            code = np.searchsorted((levels[1:] + levels[:-1]) / 2, rotated / size)
            told = float(np.dot(rotated, levels[code]))
            scale = float(np.dot(rotated, rotated)) / told * largest if told > 0 else 0.0
            data += [
                np.float32(min(scale, MOST_SCALE)).astype("<f4").tobytes(),
                pack(code, np.full(padded, self.bits)),
            ]
        sections = {Section.VALUES: b"".join(data)}
        return sections, self._decompress(sections, schema)

    @classmethod
    def _decompress(cls, sections: Sections, schema: Schema) -> Decoded:
        reader = values_only(sections, schema)
        values = np.zeros(schema.size, np.float32)
        if not schema.size:
            return Decoded(values)
        bits = reader.byte("bits a value", most=max(CENTRES))
        if bits not in CENTRES:
            raise CodecError("Expected 1 to 4 bits a value.")
        levels = _levels(bits).astype(np.float32)
        seed = int.from_bytes(reader.take(8, "seed"), "little")
        for start, padded in _blocks(schema.size):
            scale = reader.scale()
            code = unpack_from(reader, np.full(padded, bits), "values")
            with np.errstate(over="ignore", invalid="ignore"):
                part = _hadamard(levels[code] * scale) * _signs(seed, start, padded)
            values[start : start + padded] = part[: schema.size - start]
        reader.end()
        return Decoded(values)


def _levels(bits: int) -> NDArray[np.float64]:
    half = np.array(CENTRES[bits])
    return np.concatenate((-half[::-1], half))


def _blocks(size: int) -> list[tuple[int, int]]:
    """Return where each block starts and how long it is, a power of two; the last may reach past the end."""
    return [(start, min(BLOCK, 1 << (size - start - 1).bit_length())) for start in range(0, size, BLOCK)]


def _signs(seed: int, start: int, count: int) -> Values:
    raw = np.random.Philox(key=seed, counter=start).random_raw(-(-count // 64))
    bits = np.unpackbits(raw.astype("<u8").view(np.uint8))[:count]
    return (1 - 2 * bits.astype(np.float32)).astype(np.float32)


def _hadamard(values: Values) -> Values:
    """Return the orthonormal Walsh-Hadamard transform, its own inverse."""
    result, step = values.astype(np.float32), 1
    while step < len(values):
        pairs = result.reshape(-1, 2, step)
        result = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), axis=1).ravel()
        step *= 2
    return result * np.float32(len(values) ** -0.5)
