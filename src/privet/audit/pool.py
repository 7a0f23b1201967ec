"""Going through an audit's cells, one after the other or several at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

import torch

from privet.learning.runtime import end_with_parent, steady, use_threads

Cell = TypeVar("Cell")
Result = TypeVar("Result")
_work: Callable[[Any], Any]


def each(
    cells: Sequence[Cell],
    make: Callable[..., Callable[[Cell], Result]],
    arguments: tuple[Any, ...],
    *,
    workers: int,
    threads: int,
) -> Iterator[Result]:
    """Yield what each cell comes to, as results come.

    Args:
        cells: what is to be done.
        make: makes of `arguments` what does a cell; called once in each process.
        arguments: what can be sent to another process.
        workers: processes.
        threads: of each.
    """
    if workers <= 1 or len(cells) <= 1:
        with use_threads(threads):
            work = make(*arguments)
            for cell in cells:
                yield work(cell)
        return
    context: BaseContext = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(make, arguments, threads)
    ) as pool:
        waiting: set[Future[Result]] = {pool.submit(_one, cell) for cell in cells}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            pool.shutdown(cancel_futures=True)


def _start(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...], threads: int) -> None:
    global _work
    end_with_parent()
    torch.set_num_threads(threads)
    steady()
    _work = make(*arguments)


def _one(cell: Any) -> Any:
    return _work(cell)
