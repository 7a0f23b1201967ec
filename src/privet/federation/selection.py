"""Which values are worth sending: the largest of all, and a few of each tensor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privet.federation.fast import fast, jit
from privet.federation.schema import Schema, Values

Index = NDArray[np.int64]

FLOOR = 8  # each tensor keeps at least an eighth of its share


def select(values: Values, schema: Schema, count: int) -> Index:
    """Return the positions of `count` values, sorted: the largest in magnitude, but of each tensor enough.

    Every tensor keeps at least an eighth of the fraction that is kept of all, so that none is starved.
    Zeros are never kept, and of equal magnitudes those at lower positions are.
    """
    sizes = np.abs(values)
    floors = [count * tensor.size // (FLOOR * schema.size) for tensor in schema.compressed]
    while True:
        chosen = largest(sizes, count)
        ends = np.searchsorted(chosen, schema.offsets)
        short = [tensor for tensor, floor in enumerate(floors) if ends[tensor + 1] - ends[tensor] < floor]
        if not short:
            return chosen
        for tensor in short:
            part = sizes[schema.offsets[tensor] : schema.offsets[tensor + 1]]
            part[largest(part, floors[tensor])] = np.inf
            floors[tensor] = 0


def largest(sizes: Values, count: int) -> Index:
    """Return the positions of the `count` largest, sorted; zeros are left out, lower positions win ties."""
    if count <= 0 or not len(sizes):
        return np.zeros(0, np.int64)
    threshold = np.partition(sizes, len(sizes) - count)[len(sizes) - count] if count < len(sizes) else np.float32(0)
    if threshold == 0:
        return np.flatnonzero(sizes)[:count]
    if fast():
        chosen = np.empty(count, np.int64)
        _pick(sizes, threshold, count - int(np.count_nonzero(sizes > threshold)), chosen)
        return chosen
    above = np.flatnonzero(sizes > threshold)
    ties = np.flatnonzero(sizes == threshold)[: count - len(above)]
    return np.sort(np.concatenate((above, ties)))


@jit
def _pick(sizes: Values, threshold: np.float32, ties: int, chosen: Index) -> None:
    found = 0
    for at in range(len(sizes)):
        if sizes[at] > threshold:
            chosen[found] = at
            found += 1
        elif sizes[at] == threshold and ties > 0:
            chosen[found] = at
            found += 1
            ties -= 1
