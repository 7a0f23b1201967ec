"""Going through an audit's cells, one after the other or several at a time."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

import torch

from privet.errors import UsageError
from privet.learning import Learner
from privet.learning.runtime import end_with_parent, steady, use_threads
from privet.progress import Progress, silent

Cell = TypeVar("Cell")
Result = TypeVar("Result")
LOOK_SECONDS = 0.5  # between looks at how far other processes are
_work: Callable[[Any, Progress], Any]
_shares: MutableSequence[float]


def each(
    cells: Sequence[Cell],
    make: Callable[..., Callable[[Cell, Progress], Result]],
    arguments: tuple[Any, ...],
    *,
    keep: Callable[[Result], None],
    images: Sequence[int],
    workers: int,
    threads: int,
    progress: Progress = silent,
) -> None:
    """Train the learner of each cell, and keep what it comes to as soon as it is trained.

    Whatever ends this early, Ctrl-C or a learner that fails: what was finished by then is kept, and no process stays.

    Args:
        cells: what is to be done.
        make: makes of `arguments` what does a cell, and tells how far it is; called once in each process.
        arguments: what can be sent to another process.
        keep: called here with each result.
        images: how many images each cell's learner looks at, by `looks`.
        workers: processes.
        threads: of each.
        progress: told about images that learners have looked at, of those of all cells.

    Raises:
        UsageError: a worker was killed.
    """

    def tell() -> None:
        seen = sum(share * count for share, count in zip(shares, images, strict=True))
        progress(f"training {len(cells)} learners", int(seen), sum(images))

    if workers <= 1 or len(cells) <= 1:
        shares: MutableSequence[float] = [0.0] * len(cells)
        with use_threads(threads):
            work = make(*arguments)
            for number, cell in enumerate(cells):
                keep(work(cell, _listener(shares, number, tell)))
                shares[number] = 1.0
        return
    context: BaseContext = torch.multiprocessing.get_context("spawn")
    shares = context.RawArray("d", len(cells))
    waiting: set[Future[Result]] = set()
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(make, arguments, threads, shares)
    ) as pool:
        try:
            with _deaf():
                numbers = {pool.submit(_one, number, cell): number for number, cell in enumerate(cells)}
            waiting.update(numbers)
            while waiting:
                tell()
                done, _ = wait(waiting, LOOK_SECONDS, FIRST_COMPLETED)
                for future in done:
                    waiting.remove(future)
                    keep(future.result())
                    shares[numbers[future]] = 1.0
        except BaseException as error:
            for process in list(pool._processes.values()):  # from Python 3.14 on there is a method for it
                process.terminate()
            pool.shutdown(cancel_futures=True)  # then every future knows how it ended
            for future in waiting:
                if not future.cancelled() and future.exception() is None:
                    keep(future.result())
            if isinstance(error, BrokenProcessPool):
                raise UsageError(
                    f"One of {workers} workers was ended from outside, most likely because memory ran out. Ask for "
                    "fewer (--workers); the same command goes on with what is left."
                ) from error
            raise


def looks(learner: Learner, count: int) -> int:
    """Return how many images a learner looks at that has so many to learn from: an attacked one once a step more."""
    return learner.epochs * count * (1 + (learner.attack_steps if learner.radius else 0))


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Keep Ctrl-C from the processes that start in the block: a terminal sends it to them too, and a worker that is
    interrupted would go on with the next cell.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _listener(shares: MutableSequence[float], number: int, tell: Callable[[], None]) -> Progress:
    """Return what a cell tells how far it is."""

    def listen(stage: str, done: int, total: int) -> None:
        shares[number] = done / total
        tell()

    return listen


def _start(
    make: Callable[..., Callable[[Any, Progress], Any]],
    arguments: tuple[Any, ...],
    threads: int,
    shares: MutableSequence[float],
) -> None:
    """Make of a process a worker."""
    global _work, _shares
    end_with_parent()
    torch.set_num_threads(threads)
    steady()
    _work, _shares = make(*arguments), shares


def _one(number: int, cell: Any) -> Any:
    return _work(cell, _listener(_shares, number, lambda: None))
