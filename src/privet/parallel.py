"""Work in threads, with results in order and bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Given = TypeVar("Given")
Result = TypeVar("Result")


def ordered(
    function: Callable[[Given], Result], given: Iterable[Given], workers: int
) -> Iterator[tuple[Given, Result]]:
    """Yield each argument with its result, in order; at most a few per worker are under way."""
    waiting = iter(given)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        ahead: deque[tuple[Given, Future[Result]]] = deque()
        try:
            while True:
                for one in islice(waiting, 4 * max(1, workers) - len(ahead)):
                    ahead.append((one, pool.submit(function, one)))
                if not ahead:
                    return
                one, future = ahead.popleft()
                yield one, future.result()
        finally:  # a caller that stops early, or an error, does not wait for the rest
            pool.shutdown(cancel_futures=True)
