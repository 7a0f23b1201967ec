"""Passes through frozen networks, cut to what a processor's cache holds and spread over its cores."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

# On a processor, frozen passes take this many images at a time: more would leave its cache. Each
# core takes its own pieces, which does more than all cores together on each operation. An image's
# result does not depend on the images beside it.
PIECE = 64


def in_pieces(function: Callable[..., Tensor], *rows: Tensor, size: int = PIECE) -> Tensor:
    """Return what `function` makes of the rows, which it treats one by one.

    Args:
        function: maps tensors with a first dimension in common to one tensor with the same.
        rows: its arguments.
        size: rows a piece.
    """
    if rows[0].device.type != "cpu" or len(rows[0]) <= size:
        return function(*rows)
    pieces, threads = [torch.split(part, size) for part in rows], torch.get_num_threads()
    return torch.cat(list(map(function, *pieces) if threads == 1 else _pool(threads).map(function, *pieces)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that compute with one core each."""
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    list(pool.map(time.sleep, [0.01] * threads))  # start them all
    torch.set_num_threads(threads)  # the initialiser has set a default for threads to come
    return pool
