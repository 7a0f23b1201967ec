"""Which values are worth sending: the largest of all, and a few of each tensor."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from privet.federation.fast import fast, jit
from privet.federation.schema import Schema, Values

Index = NDArray[np.int64]

FLOOR = 8  # each tensor keeps at least an eighth of its share
_BINS = 1 << 15  # of magnitudes, by their float32's exponent and upper seven bits


def select(values: Values, schema: Schema, count: int) -> Index:
    """Return the positions of `count` values, sorted: the largest in magnitude, but of each tensor enough.

    Every tensor keeps at least an eighth of the fraction that is kept of all, so that none is starved.
    Zeros are never kept, and of equal magnitudes those at lower positions are.
    """
    chosen = largest(values, count)
    ends = np.searchsorted(chosen, schema.offsets)
    parts = [chosen[start:end] for start, end in pairwise(ends)]
    free = list(range(len(parts)))
    while True:
        floors = {tensor: count * schema.compressed[tensor].size // (FLOOR * schema.size) for tensor in free}
        short = [tensor for tensor in free if len(parts[tensor]) < floors[tensor]]
        if not short:
            return np.concatenate(parts)
        for tensor in short:
            start, end = schema.offsets[tensor : tensor + 2]
            parts[tensor] = start + largest(values[start:end], floors[tensor])
            free.remove(tensor)
        if not free:  # values that are nearly all zero
            return np.concatenate(parts)
        # The others share what is left, and some of them may now fall short.
        held = np.concatenate([parts[tensor] for tensor in free])
        held = held[largest(values[held], count - sum(map(len, parts)) + len(held))]
        ends = np.searchsorted(held, schema.offsets)
        for tensor in free:
            parts[tensor] = held[ends[tensor] : ends[tensor + 1]]


def largest(values: Values, count: int) -> Index:
    """Return the positions of the `count` largest magnitudes, sorted; zeros are left out, lower positions win ties."""
    if count <= 0 or not len(values):
        return np.zeros(0, np.int64)
    if not fast():
        return _largest(np.abs(values), count)
    bits = values.view(np.uint32)
    counts = _histogram(bits)
    above = np.cumsum(counts[::-1])[::-1]  # magnitudes in a bin or above
    enough = np.flatnonzero(above >= count)
    lowest = int(enough[-1]) if len(enough) else 0
    index = _collect(bits, np.uint32(lowest << 16), np.empty(int(above[lowest]), np.int64))
    return index[_largest(np.abs(values[index]), count)]


def _largest(sizes: Values, count: int) -> Index:
    threshold = (
        np.partition(sizes, len(sizes) - count)[len(sizes) - count] if count < len(sizes) else np.float32(0)
    )
    if threshold == 0:
        return np.flatnonzero(sizes)
    chosen = sizes > threshold
    chosen[np.flatnonzero(sizes == threshold)[: count - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)


@jit
def _histogram(bits: NDArray[np.uint32]) -> NDArray[np.int64]:
    counts = np.zeros(_BINS, np.int64)
    for value in bits:
        counts[(value & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1
    return counts


@jit
def _collect(bits: NDArray[np.uint32], least: np.uint32, found: Index) -> Index:
    count = 0
    for at in range(len(bits)):
        if (bits[at] & np.uint32(0x7FFFFFFF)) >= least:
            found[count] = at
            count += 1
    return found
