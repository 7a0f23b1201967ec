"""Codes of whole numbers: unary, fixed widths, and Rice's code, which joins the two.

Rice's code takes groups of numbers: quotients in unary, remainders in as many bits as suit the group. Where that is
shorter, rANS replaces the unary code, with frequencies for quotients with and without remainders. All quotients form
one stream of bits and all remainders another, so that numpy can write and read either at once. How many numbers a
group has is known to the reader.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from privet.errors import CodecError
from privet.federation.fast import fast, jit
from privet.federation.rans import choose_weights, cost, frequencies, read_rans, write_rans
from privet.federation.wire import Bytes, Reader, varint

Numbers = NDArray[np.int64]

MOST_BITS = 40  # of a remainder
CHUNK = 1 << 16  # numbers that numpy takes apart at once
ESCAPE = 11  # quotients from here on go in unary even where rANS codes the rest
_GOLDEN = (math.sqrt(5) - 1) / 2
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)  # in each byte


def remainder_bits(numbers: Numbers) -> int:
    """Return the number of remainder bits that makes these shortest.

    The best for geometric numbers of this mean (Sattler et al., arXiv 1903.02891, Golomb parameter of algorithm 3), or
    a neighbour of it.
    """
    mean = float(numbers.mean())
    guess = 0
    if mean > 0:
        guess = 1 + math.floor(math.log2(math.log(_GOLDEN) / math.log(mean / (mean + 1))))
    guess = max(0, min(MOST_BITS - 1, guess))
    return min(
        range(max(0, guess - 1), guess + 2),
        key=lambda bits: bits * len(numbers) + int((numbers >> bits).sum()),
    )


def write_rice(numbers: Numbers, sizes: Sequence[int]) -> bytes:
    """Return numbers of 0 or more, which are groups of these sizes, one after the other."""
    if not len(numbers):
        return b""
    ends = np.cumsum(np.array(sizes, np.int64))
    groups = np.split(numbers, ends[:-1])
    bits = np.array([remainder_bits(group) if len(group) else 0 for group in groups], np.int64)
    width = np.repeat(bits, sizes)
    used = bytes(count for count, size in zip(bits.tolist(), sizes, strict=True) if size)
    return used + _write_quotients(numbers >> width, width) + pack(numbers, width)


def read_rice(reader: Reader, sizes: Sequence[int], most: int, what: str) -> Numbers:
    """Return the numbers of groups of these sizes; all together they add up to at most `most`.

    Raises:
        CodecError: they are not there, or larger.
    """
    count = sum(sizes)
    if not count:
        return np.zeros(0, np.int64)
    limit = min(MOST_BITS, most.bit_length())
    bits = [reader.byte(f"remainder bits of {what}", most=limit) if size else 0 for size in sizes]
    width = np.repeat(np.array(bits, np.int64), sizes)
    high = _read_quotients(reader, width, most, what)
    low = unpack_from(reader, width, what)
    if (high > most >> width).any():
        raise CodecError(f"Expected {what} to add up to at most {most:,}.")
    numbers: Numbers = (high << width) | low
    # Each is at most 2 * most + 1 here, but a sum of many could pass 63 bits: floats cannot wrap around.
    if float(numbers.sum(dtype=np.float64)) > most:
        raise CodecError(f"Expected {what} to add up to at most {most:,}.")
    return numbers


def _write_quotients(numbers: Numbers, width: Numbers) -> bytes:
    """Return quotients in unary or by rANS, whichever is shorter."""
    unary = write_unary(numbers)
    symbols = np.minimum(numbers, ESCAPE).astype(np.uint8)
    contexts = (width > 0).astype(np.uint8)
    counts = np.bincount(symbols + contexts * (ESCAPE + 1), minlength=2 * (ESCAPE + 1)).reshape(2, -1)
    weights = choose_weights(counts)
    table = frequencies(weights)
    if cost(counts, table) / 8 + weights.size > len(unary):
        return b"\0" + unary
    escaped = numbers[symbols == ESCAPE] - ESCAPE
    coded = (
        weights.tobytes()
        + write_rans(symbols, contexts, table)
        + (write_unary(escaped) if len(escaped) else b"")
    )
    return b"\1" + coded if len(coded) < len(unary) else b"\0" + unary


def _read_quotients(reader: Reader, width: Numbers, most: int, what: str) -> Numbers:
    if not reader.byte(f"coder of {what}", most=1):
        return read_unary(reader, len(width), most, what)
    weights = np.frombuffer(reader.take(2 * (ESCAPE + 1), what), np.uint8).reshape(2, -1)
    nothing = np.zeros(ESCAPE + 1, np.uint8)
    numbers = read_rans(reader, (width > 0).astype(np.int8), nothing, frequencies(weights)).astype(np.int64)
    escaped = np.flatnonzero(numbers == ESCAPE)
    if len(escaped):
        numbers[escaped] += read_unary(reader, len(escaped), most, what)
    return numbers


def write_unary(numbers: Numbers) -> bytes:
    """Return each number as so many zeros and a one, with the stream's length in front."""
    stops = np.cumsum(numbers + 1) - 1
    bits = np.zeros((int(stops[-1]) + 8) // 8, np.uint8)
    if fast():
        _set_bits(bits, stops)
    else:
        np.bitwise_or.at(bits, stops >> 3, (128 >> (stops & 7)).astype(np.uint8))
    return varint(len(bits)) + bits.tobytes()


def read_unary(reader: Reader, count: int, most: int, what: str) -> Numbers:
    """Return `count` numbers, at least one, which add up to at most `most` rounded up to bytes."""
    length = reader.varint(f"length of {what}", most=(count + most + 7) // 8)
    data = np.frombuffer(reader.take(length, what), np.uint8)
    if not length or data[-1] == 0 or int(_ONES[data].sum()) != count:
        raise CodecError(f"Expected {count:,} numbers of {what}, got another count.")
    if fast():
        stops = np.empty(count, np.int64)
        _get_bits(data, stops)
    else:
        stops = np.flatnonzero(np.unpackbits(data))
    numbers: Numbers = np.diff(stops, prepend=-1) - 1
    return numbers


def pack(numbers: Numbers, width: Numbers) -> bytes:
    """Return the lowest `width` bits of each number, the highest of them first; zeros fill the last byte."""
    if fast():
        out = np.zeros((int(width.sum()) + 7) // 8, np.uint8)
        _pack(numbers, width, out)
        return out.tobytes()
    parts = [np.zeros(0, np.uint8)]
    for start in range(0, len(numbers), CHUNK):
        wide = width[start : start + CHUNK]
        parts.append((np.repeat(numbers[start : start + CHUNK], wide) >> _shifts(wide) & 1).astype(np.uint8))
    return np.packbits(np.concatenate(parts)).tobytes()


def unpack_from(reader: Reader, width: Numbers, what: str) -> Numbers:
    """Return numbers of so many bits each."""
    total = int(width.sum())
    stream = np.frombuffer(reader.take((total + 7) // 8, what), np.uint8)
    if total % 8 and stream[-1] & (255 >> total % 8):
        raise CodecError(f"Expected zeros behind the last bits of {what}.")
    numbers = np.zeros(len(width), np.int64)
    if fast():
        _unpack(stream, width, numbers)
        return numbers
    bits, at = np.unpackbits(stream), 0
    for start in range(0, len(width), CHUNK):
        wide = width[start : start + CHUNK]
        used = int(wide.sum())
        if used:
            weighted = bits[at : at + used].astype(np.int64) << _shifts(wide)
            starts = (np.cumsum(wide) - wide)[wide > 0]
            numbers[start : start + CHUNK][wide > 0] = np.add.reduceat(weighted, starts)
        at += used
    return numbers


def _shifts(width: Numbers) -> Numbers:
    """Return width-1 ... 0 for each number, one after the other."""
    return np.repeat(np.cumsum(width), width) - 1 - np.arange(int(width.sum()))


@jit
def _set_bits(bits: Bytes, stops: Numbers) -> None:
    for stop in stops:
        bits[stop >> 3] |= np.uint8(128 >> (stop & 7))


@jit
def _get_bits(data: Bytes, stops: Numbers) -> None:
    found = 0
    for at in range(len(data)):
        byte = data[at]
        if byte:
            for bit in range(8):
                if byte & (128 >> bit):
                    stops[found] = at * 8 + bit
                    found += 1


@jit
def _pack(numbers: Numbers, width: Numbers, out: Bytes) -> None:
    held, bits, at = np.uint64(0), 0, 0
    for index in range(len(numbers)):
        mask = (np.uint64(1) << np.uint64(width[index])) - np.uint64(1)
        held = (held << np.uint64(width[index])) | (np.uint64(numbers[index]) & mask)
        bits += width[index]
        while bits >= 8:
            bits -= 8
            out[at] = np.uint8(held >> np.uint64(bits) & np.uint64(255))
            at += 1
    if bits:
        out[at] = np.uint8(held << np.uint64(8 - bits) & np.uint64(255))


@jit
def _unpack(stream: Bytes, width: Numbers, out: Numbers) -> None:
    held, bits, at = np.uint64(0), 0, 0
    for index in range(len(out)):
        while bits < width[index]:
            held = (held << np.uint64(8)) | np.uint64(stream[at])
            at += 1
            bits += 8
        bits -= width[index]
        mask = (np.uint64(1) << np.uint64(width[index])) - np.uint64(1)
        out[index] = np.int64(held >> np.uint64(bits) & mask)
