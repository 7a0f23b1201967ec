"""Positions by the row and column that they lie in.

What training changes most clusters: in the rows of units that learn, in the columns of inputs that are alive, in the
same kernel. So the number of positions in each row is sent, and from it, from the positions that the column had in
the rows above, and from whether the kernel has one already, both ends estimate how likely each cell is. Cells of like
likelihood form a class, and each class sends its own gaps by Rice's code.

There is no arithmetic coder in it: a class's gaps can be written and read at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from privet.errors import CodecError
from privet.federation.fast import fast, jit
from privet.federation.rice import Numbers, read_rice, write_rice
from privet.federation.schema import Schema, Tensor
from privet.federation.wire import Reader, varint

Mask = NDArray[np.bool_]

CLASSES = 64  # 32 octaves of likelihood, for kernels without and with a position so far
_HALF = 32
_SHIFT = 24  # class 24 is a likelihood of about one half to one
_NEIGHBOURS = 4  # columns that count as a kernel where there is none


def kernel(tensor: Tensor) -> int:
    """Return how many neighbouring columns belong together."""
    size = math.prod(tensor.shape[2:])
    return size if size > 1 else _NEIGHBOURS


def write_context(index: Numbers, schema: Schema) -> bytes:
    """Return the positions, which are sorted and unique."""
    mask = np.zeros(schema.size, np.bool_)
    mask[index] = True
    gaps, kinds = np.empty(len(index), np.int64), np.empty(len(index), np.int64)
    passed = np.zeros(CLASSES, np.int64)
    rows, sizes, done = [], [], 0
    for tensor, part in _parts(schema, mask):
        count, width = tensor.matrix
        cells = part.reshape(count, width)
        hits = cells.sum(axis=1)
        rows.append(hits)
        sizes.append(count)
        found = int(hits.sum())
        if found:
            visit = _gaps if fast() else _gaps_in_rows
            visit(cells, hits, kernel(tensor), passed, gaps[done : done + found], kinds[done : done + found])
        done += found
    order = np.argsort(kinds, kind="stable")
    counts = np.bincount(kinds, minlength=CLASSES).tolist()
    head = write_rice(np.concatenate(rows), sizes) if rows else b""
    return head + b"".join(map(varint, _trim(counts))) + write_rice(gaps[order], counts)


def read_context(reader: Reader, schema: Schema) -> Numbers:
    """Return the positions.

    Raises:
        CodecError: there are none that these bytes could stand for.
    """
    tensors = schema.compressed
    if not tensors:
        return np.zeros(0, np.int64)
    sizes = [tensor.matrix[0] for tensor in tensors]
    rows = np.split(read_rice(reader, sizes, schema.size, "positions a row"), np.cumsum(sizes)[:-1])
    counts = _read_counts(reader, sum(int(hits.sum()) for hits in rows))
    gaps = np.split(read_rice(reader, counts, schema.size, "positions"), np.cumsum(counts)[:-1])
    ranks = np.concatenate(
        [np.cumsum(group + 1) - 1 for group in gaps]
    )  # of positions among their class's cells
    ends = np.cumsum(counts)
    passed = np.zeros(CLASSES, np.int64)
    next_: Numbers = ends - np.array(counts)
    mask = np.zeros(schema.size, np.bool_)
    for (tensor, part), hits in zip(_parts(schema, mask), rows, strict=True):
        cells = part.reshape(tensor.matrix)
        if int(hits.max(initial=0)) > tensor.matrix[1]:
            raise CodecError("Expected no more positions in a row than it has cells.")
        visit = _place if fast() else _place_in_rows
        if not visit(cells, hits, kernel(tensor), passed, ranks, next_, ends):
            raise CodecError("Expected as many positions in each row as were announced.")
    if (next_ != ends).any():
        raise CodecError("Expected all positions to lie in the model.")
    return np.flatnonzero(mask)


def _parts(schema: Schema, mask: Mask) -> Iterator[tuple[Tensor, Mask]]:
    for tensor, start, end in zip(schema.compressed, schema.offsets, schema.offsets[1:], strict=False):
        yield tensor, mask[start:end]


def _trim(counts: list[int]) -> list[int]:
    """Return the first used class, how many follow, and their counts."""
    used = [kind for kind, count in enumerate(counts) if count]
    if not used:
        return [0, 0]
    return [used[0], used[-1] + 1 - used[0], *counts[used[0] : used[-1] + 1]]


def _read_counts(reader: Reader, total: int) -> list[int]:
    first = reader.varint("first class", most=CLASSES - 1)
    length = reader.varint("number of classes", most=CLASSES - first)
    counts = [reader.varint("positions of a class", most=total) for _ in range(length)]
    if sum(counts) != total or (counts and not (counts[0] and counts[-1])) or (first and not counts):
        raise CodecError("Expected the classes' positions to add up to the rows'.")
    return [0] * first + counts + [0] * (CLASSES - first - length)


def _classes(hits: int, above: Numbers, total: int) -> Numbers:
    """Return the class of each cell of a row: the octave of hits * (above + 1) / (width + total)."""
    likely = (hits * (above + 1) << _SHIFT) // (len(above) + total)
    return np.minimum(np.frexp(likely.astype(np.float64))[1], _HALF - 1).astype(np.int64)


def _gaps_in_rows(
    cells: Mask, hits: Numbers, kernel: int, passed: Numbers, gaps: Numbers, kinds: Numbers
) -> None:
    done = 0
    seen, last = (
        np.zeros(CLASSES, np.int64),
        -passed,
    )  # cells of each class, and those up to its last position
    above, total = np.zeros(cells.shape[1], np.int64), 0
    for row in np.flatnonzero(hits):
        octaves = _classes(int(hits[row]), above, total)
        near = np.zeros(-(-cells.shape[1] // kernel), np.int64)
        for tap in range(min(kernel, cells.shape[1])):
            here = cells[row, tap::kernel]
            kind = octaves[tap::kernel] + _HALF * (near[: len(here)] > 0)
            rank = seen[kind] + _ranks(kind)
            for at in np.flatnonzero(here):
                gaps[done], kinds[done] = rank[at] - last[kind[at]], kind[at]
                last[kind[at]] = rank[at] + 1
                done += 1
            seen += np.bincount(kind, minlength=CLASSES)
            near[: len(here)] += here
        above += cells[row]
        total += int(hits[row])
    passed[:] = seen - last


def _place_in_rows(
    cells: Mask, hits: Numbers, kernel: int, passed: Numbers, ranks: Numbers, next_: Numbers, ends: Numbers
) -> bool:
    above, total = np.zeros(cells.shape[1], np.int64), 0
    for row in np.flatnonzero(hits):
        octaves = _classes(int(hits[row]), above, total)
        near = np.zeros(-(-cells.shape[1] // kernel), np.int64)
        for tap in range(min(kernel, cells.shape[1])):
            kind = octaves[tap::kernel] + _HALF * (near[: len(octaves[tap::kernel])] > 0)
            rank = passed[kind] + _ranks(kind)
            here = np.zeros(len(kind), np.bool_)
            for each in np.unique(kind):
                ahead = ranks[next_[each] : ends[each]]
                stop = int(np.searchsorted(ahead, passed[each] + np.count_nonzero(kind == each)))
                here[kind == each] = np.isin(rank[kind == each], ahead[:stop])
                next_[each] += stop
            passed += np.bincount(kind, minlength=CLASSES)
            cells[row, tap::kernel] = here
            near[: len(here)] += here
        if int(cells[row].sum()) != hits[row]:
            return False
        above += cells[row]
        total += int(hits[row])
    return True


def _ranks(kind: Numbers) -> Numbers:
    """Return for each cell how many of its class come before it."""
    order = np.argsort(kind, kind="stable")
    counts = np.bincount(kind, minlength=CLASSES)
    ranks = np.empty(len(kind), np.int64)
    ranks[order] = np.arange(len(kind)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


@jit
def _octaves(hits: int, most: int, width: int, total: int, table: Numbers) -> None:
    for above in range(most + 1):
        likely = (hits * (above + 1) << _SHIFT) // (width + total)
        octave = 0
        while likely > 0 and octave < _HALF - 1:
            likely >>= 1
            octave += 1
        table[above] = octave


@jit
def _gaps(cells: Mask, hits: Numbers, kernel: int, passed: Numbers, gaps: Numbers, kinds: Numbers) -> None:
    rows, width = cells.shape
    above, table = np.zeros(width, np.int32), np.zeros(rows + 1, np.int64)
    near = np.zeros((width + kernel - 1) // kernel, np.int64)
    done, total, most = 0, 0, 0
    for row in range(rows):
        if hits[row] == 0:
            continue
        _octaves(hits[row], most, width, total, table)
        near[:] = 0
        for tap in range(min(kernel, width)):
            for group, at in enumerate(range(tap, width, kernel)):
                kind = table[above[at]] + near[group]
                if cells[row, at]:
                    gaps[done], kinds[done] = passed[kind], kind
                    done += 1
                    passed[kind] = 0
                    above[at] += 1
                    most = max(most, above[at])
                    near[group] = _HALF
                else:
                    passed[kind] += 1
        total += hits[row]


@jit
def _place(
    cells: Mask, hits: Numbers, kernel: int, passed: Numbers, ranks: Numbers, next_: Numbers, ends: Numbers
) -> bool:
    rows, width = cells.shape
    above, table = np.zeros(width, np.int32), np.zeros(rows + 1, np.int64)
    near = np.zeros((width + kernel - 1) // kernel, np.int64)
    total, most = 0, 0
    ahead = np.full(len(ends), -1, np.int64)  # rank of each class's next position
    for kind in range(len(ends)):
        if next_[kind] < ends[kind]:
            ahead[kind] = ranks[next_[kind]]
    for row in range(rows):
        if hits[row] == 0:
            continue
        _octaves(hits[row], most, width, total, table)
        near[:] = 0
        found = 0
        for tap in range(min(kernel, width)):
            for group, at in enumerate(range(tap, width, kernel)):
                kind = table[above[at]] + near[group]
                if passed[kind] == ahead[kind]:
                    cells[row, at] = True
                    found += 1
                    next_[kind] += 1
                    ahead[kind] = ranks[next_[kind]] if next_[kind] < ends[kind] else -1
                    above[at] += 1
                    most = max(most, above[at])
                    near[group] = _HALF
                passed[kind] += 1
        if found != hits[row]:
            return False
        total += hits[row]
    return True
