"""QSGD: random rounding to a few levels of the norm, gaps and levels by an Elias code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from privet.errors import CodecError, UsageError
from privet.federation.base import Codec, Decoded, values_only
from privet.federation.rice import Numbers, pack, read_unary, unpack_from, write_unary
from privet.federation.schema import Schema, Values
from privet.federation.wire import Reader, Section, Sections, varint

MOST_LEVELS = 1 << 10  # with these bounds three bytes a value are always enough
LEAST_BUCKET, MOST_BUCKET = 64, 1 << 20


@dataclass(frozen=True)
class QSGD(Codec):
    """Quantised SGD (Alistarh et al., arXiv 1610.02132): unbiased, each bucket in levels of its norm.

    Of values that are not 0 the gap and the level go by Elias's gamma code, the sign as a bit. Deviation: gamma
    instead of the recursive omega code, which takes as much or more for numbers as small as these.

    Attributes:
        levels: s of the paper; a value of the norm's size has level s.
        bucket: values that share a norm.
    """

    levels: int = 4
    bucket: int = 512

    name = "qsgd"
    number = 4

    def __post_init__(self) -> None:
        if not (1 <= self.levels <= MOST_LEVELS and LEAST_BUCKET <= self.bucket <= MOST_BUCKET):
            raise UsageError(
                f"Expected 1 to {MOST_LEVELS} levels and buckets of {LEAST_BUCKET} to {MOST_BUCKET}, got {self.levels} "
                f"and {self.bucket}."
            )

    def _compress(self, values: Values, schema: Schema, seed: int) -> tuple[Sections, Decoded]:
        starts = np.arange(0, len(values), self.bucket)
        squares = np.add.reduceat(np.square(values, dtype=np.float64), starts)
        norms = np.minimum(np.sqrt(squares), np.finfo(np.float32).max).astype("<f4")
        spread = np.repeat(norms, np.diff(starts, append=len(values)))
        share = np.abs(values) / np.where(spread > 0, spread, 1) * self.levels
        drawn = np.random.default_rng(seed).random(len(values), np.float32)
        levels = np.minimum(np.floor(share + drawn), self.levels).astype(np.int64)
        index = np.flatnonzero(levels)
        data = varint(self.levels) + varint(self.bucket) + norms.tobytes() + varint(len(index))
        if len(index):
            negative = (values[index] < 0).astype(np.int64)
            data += write_gamma(np.diff(index, prepend=-1)) + write_gamma(levels[index])
            data += pack(negative, np.ones(len(index), np.int64))
        return {Section.VALUES: data}, self._decompress({Section.VALUES: data}, schema)

    @classmethod
    def _decompress(cls, sections: Sections, schema: Schema) -> Decoded:
        reader = values_only(sections, schema)
        if not schema.size:
            return Decoded(np.zeros(0, np.float32))
        levels = reader.varint("levels", most=MOST_LEVELS)
        bucket = reader.varint("bucket", most=MOST_BUCKET)
        if levels < 1 or bucket < LEAST_BUCKET:
            raise CodecError(f"Expected at least one level and {LEAST_BUCKET} values a bucket.")
        norms = np.frombuffer(reader.take(4 * -(-schema.size // bucket), "norms"), "<f4")
        if not np.isfinite(norms).all() or np.signbit(norms).any():
            raise CodecError("Expected finite norms of 0 or more.")
        count = reader.varint("values", most=schema.size)
        if not count:
            reader.end()
            return Decoded(np.zeros(schema.size, np.float32))
        index = np.cumsum(read_gamma(reader, count, schema.size, "gaps")) - 1
        level = read_gamma(reader, count, levels * count, "levels")
        negative = unpack_from(reader, np.ones(count, np.int64), "signs")
        reader.end()
        if index[-1] >= schema.size or int(level.max()) > levels:
            raise CodecError("Expected positions inside the model and levels in range.")
        values = np.zeros(schema.size, np.float32)
        values[index] = norms[index // bucket] * (level / levels).astype(np.float32)
        np.negative(values, out=values, where=_mask(index, negative, schema.size))
        return Decoded(values)


def _mask(index: Numbers, negative: Numbers, size: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    mask = np.zeros(size, np.bool_)
    mask[index] = negative == 1
    return mask


def write_gamma(numbers: Numbers) -> bytes:
    """Return numbers of 1 or more by Elias's gamma code, lengths and bits as two streams."""
    width = np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - 1
    return write_unary(width) + pack(numbers, width)


def read_gamma(reader: Reader, count: int, most: int, what: str) -> Numbers:
    """Return `count` numbers of 1 or more, each at most `most` rounded up to bits.

    Raises:
        CodecError: they are not there, or longer.
    """
    width = read_unary(reader, count, count * most.bit_length(), what)
    if int(width.max()) >= most.bit_length():
        raise CodecError(f"Expected {what} of at most {most:,}.")
    numbers: Numbers = (1 << width) | unpack_from(reader, width, what)
    return numbers
