"""Range asymmetric numeral systems (Duda, arXiv 1311.2540) for symbols whose frequencies depend on a context.

Symbols are cut into lanes, contiguous parts that are coded side by side, so that numpy can do all lanes' next symbol at
once. States have 32 bits, words 16, and frequencies add up to 2¹⁴.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privet.errors import CodecError
from privet.federation.fast import fast, jit
from privet.federation.wire import Bytes, Reader, varint

Frequencies = NDArray[np.uint32]  # (contexts, symbols)
Contexts = NDArray[np.int8]

SCALE = 14
LOWEST = 1 << 16  # state; a state is in [2^16, 2^32) between symbols
MOST_SYMBOLS = 128
MOST_LANES = 32
SYMBOLS_A_LANE = 2048

# Weights are sent as a byte each: 0 for never, else 2^((byte - 1) / 16), from this table of integers.
_OCTAVE = [round(2 ** (15 + part / 16)) for part in range(16)]
WEIGHTS = np.array([0, *(_OCTAVE[(byte - 1) % 16] << ((byte - 1) // 16) for byte in range(1, 256))], np.int64)


def lanes_for(count: int) -> int:
    """Return the number of lanes of so many symbols, a power of two."""
    return min(MOST_LANES, 1 << max(0, (count // SYMBOLS_A_LANE).bit_length() - 1)) if count else 0


def choose_weights(counts: NDArray[np.int64]) -> Bytes:
    """Return a byte for each count, so that `frequencies` of them come close to the counts' shares."""
    counts = np.asarray(counts)
    most = counts.max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        octaves = np.log2(counts / np.maximum(most, 1))
    return np.where(counts > 0, np.clip(np.rint(np.maximum(octaves, -16) * 16) + 255, 1, 255), 0).astype(
        np.uint8
    )


def frequencies(weights: Bytes) -> Frequencies:
    """Return the frequencies that these bytes stand for, (contexts, symbols); a context of zeros has none."""
    scaled = WEIGHTS[weights]
    total = scaled.sum(axis=1, keepdims=True)
    shares = np.where(scaled > 0, np.maximum(1, (scaled << SCALE) // np.maximum(total, 1)), 0)
    rows = np.flatnonzero(total)
    shares[rows, scaled[rows].argmax(axis=1)] += (1 << SCALE) - shares[rows].sum(axis=1)
    return shares.astype(np.uint32)


def cost(counts: NDArray[np.int64], table: Frequencies) -> float:
    """Return the bits that symbols with these counts take, (contexts, symbols)."""
    seen = counts > 0
    return float((counts[seen] * (SCALE - np.log2(table[seen]))).sum())


def write_rans(symbols: Bytes, contexts: Bytes, table: Frequencies) -> bytes:
    """Return the symbols; `contexts` gives the row of `table` for each."""
    lanes = lanes_for(len(symbols))
    if not lanes:
        return b""
    starts = (np.cumsum(table, axis=1) - table).astype(np.uint32)
    frequency, start = table[contexts, symbols], starts[contexts, symbols]
    if fast():
        states = np.full(lanes, LOWEST, np.uint64)
        words = np.empty(len(symbols), np.uint16)
        used = _encode(frequency, start, states, words)
        stream = words[:used][::-1]
    else:
        states, stream = _encode_lanes(frequency, start, lanes)
    return varint(len(stream)) + states.astype("<u4").tobytes() + stream.astype("<u2").tobytes()


def read_rans(reader: Reader, fixed: Contexts, successor: Bytes, table: Frequencies) -> Bytes:
    """Return as many symbols as `fixed` is long.

    Args:
        reader: where they lie.
        fixed: the context of each symbol, or -1 for the one that the symbol before gives it (a lane's first: 0).
        successor: the context that each symbol gives the next one.
        table: frequencies, (contexts, symbols).

    Raises:
        CodecError: the stream does not end where and as it must.
    """
    count = len(fixed)
    lanes = lanes_for(count)
    if not lanes:
        return np.zeros(0, np.uint8)
    length = reader.varint("words of symbols", most=count)
    states = np.frombuffer(reader.take(4 * lanes, "states of symbols"), "<u4").astype(np.uint64)
    words = np.frombuffer(reader.take(2 * length, "symbols"), "<u2").astype(np.uint16)
    if (states < LOWEST).any():
        raise CodecError("Expected states of symbols of at least 2^16.")
    present = table.sum(axis=1) > 0
    starts = (np.cumsum(table, axis=1) - table).astype(np.uint32)
    lookup = np.zeros((len(table), 1 << SCALE), np.uint8)
    for context in np.flatnonzero(present):
        lookup[context] = np.repeat(np.arange(table.shape[1]), table[context])
    symbols = np.zeros(count, np.uint8)
    decode = _decode if fast() else _decode_lanes
    used = decode(symbols, fixed, successor, present, lookup, table, starts, states, words)
    if used != length or (states != LOWEST).any():
        raise CodecError("The stream of symbols does not end as it must.")
    return symbols


def _encode_lanes(
    frequency: Frequencies, start: Frequencies, lanes: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint16]]:
    count = len(frequency)
    part = -(-count // lanes)
    states = np.full(lanes, LOWEST, np.uint64)
    stream: list[NDArray[np.uint64]] = []
    wide, first = frequency.astype(np.uint64), start.astype(np.uint64)
    for step in range(part - 1, -1, -1):
        active = -(-(count - step) // part)
        at = slice(step, step + (active - 1) * part + 1, part)
        x, f = states[:active], wide[at]
        full = x >= f << np.uint64(32 - SCALE)
        stream.append((x[full] & np.uint64(0xFFFF))[::-1])
        x = np.where(full, x >> np.uint64(16), x).astype(np.uint64)
        quotient: NDArray[np.uint64] = np.floor_divide(x, f)
        states[:active] = (quotient << np.uint64(SCALE)) + x - quotient * f + first[at]
    return states, np.concatenate(stream)[::-1].astype(np.uint16)


def _decode_lanes(
    symbols: Bytes,
    fixed: Contexts,
    successor: Bytes,
    present: NDArray[np.bool_],
    lookup: Bytes,
    table: Frequencies,
    starts: Frequencies,
    states: NDArray[np.uint64],
    words: NDArray[np.uint16],
) -> int:
    count, lanes = len(symbols), len(states)
    part = -(-count // lanes)
    used = 0
    context = np.zeros(lanes, np.int64)
    for step in range(part):
        active = -(-(count - step) // part)
        at = slice(step, step + (active - 1) * part + 1, part)
        c = np.where(fixed[at] < 0, context[:active], fixed[at])
        if not present[c].all():
            return -1
        x = states[:active]
        slot = (x & np.uint64((1 << SCALE) - 1)).astype(np.int64)
        symbol = lookup[c, slot]
        symbols[at] = symbol
        x = (
            table[c, symbol].astype(np.uint64) * (x >> np.uint64(SCALE))
            + slot.astype(np.uint64)
            - starts[c, symbol].astype(np.uint64)
        )
        low = np.flatnonzero(x < LOWEST)
        if used + len(low) > len(words):
            return -1
        x[low] = (x[low] << np.uint64(16)) | words[used : used + len(low)]
        used += len(low)
        states[:active] = x
        context[:active] = successor[symbol]
    return used


@jit
def _encode(
    frequency: Frequencies, start: Frequencies, states: NDArray[np.uint64], words: NDArray[np.uint16]
) -> int:
    count, lanes = len(frequency), len(states)
    part = -(-count // lanes)
    used = 0
    for step in range(part - 1, -1, -1):
        active = -(-(count - step) // part)
        for lane in range(active - 1, -1, -1):
            at = lane * part + step
            x, f = np.uint32(states[lane]), frequency[at]
            if np.uint64(x) >= np.uint64(f) << np.uint64(32 - SCALE):
                words[used] = np.uint16(x & np.uint32(0xFFFF))
                used += 1
                x >>= np.uint32(16)
            quotient = x // f
            states[lane] = (
                (np.uint64(quotient) << np.uint64(SCALE)) + np.uint64(x - quotient * f) + np.uint64(start[at])
            )
    return used


@jit
def _decode(
    symbols: Bytes,
    fixed: Contexts,
    successor: Bytes,
    present: NDArray[np.bool_],
    lookup: Bytes,
    table: Frequencies,
    starts: Frequencies,
    states: NDArray[np.uint64],
    words: NDArray[np.uint16],
) -> int:
    count, lanes = len(symbols), len(states)
    part = -(-count // lanes)
    used = 0
    for step in range(part):
        active = -(-(count - step) // part)
        for lane in range(active):
            at = lane * part + step
            context = int(fixed[at])
            if context < 0:
                context = int(successor[symbols[at - 1]]) if step > 0 else 0
            if not present[context]:
                return -1
            x = states[lane]
            slot = np.int64(x & np.uint64((1 << SCALE) - 1))
            symbol = lookup[context, slot]
            symbols[at] = symbol
            x = np.uint64(table[context, symbol]) * (x >> np.uint64(SCALE)) + np.uint64(
                slot - np.int64(starts[context, symbol])
            )
            if x < np.uint64(LOWEST):
                if used >= len(words):
                    return -1
                x = (x << np.uint64(16)) | np.uint64(words[used])
                used += 1
            states[lane] = x
    return used
