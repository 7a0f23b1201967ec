"""What a person sees while a job runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import get_console
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from privet.errors import OK, PARTIAL
from privet.progress import Progress as Listener
from privet.progress import silent

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from privet.learning import Publication

LINE_SECONDS = 15.0  # between lines where there is no terminal


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_each_second(task.speed) if task.speed else "", style="cyan")


def say(text: str) -> None:
    """Print a line; a terminal may wrap it, but a path in it can still be copied whole."""
    get_console().print(text, soft_wrap=True)


def doubt(text: str) -> None:
    """Print why what is done may be worth little."""
    say(f"[yellow]Doubt:[/] {escape(text)}")


@contextlib.contextmanager
def progress(rank: int = 0) -> Iterator[Listener]:
    """Yield a listener that draws a bar on a terminal, and prints a line now and then elsewhere.

    Of several processes only the first, of rank 0, shows anything.
    """
    console = Console(stderr=True, highlight=False)
    if rank > 0:
        yield silent
        return
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, int] = {}

        def listen(stage: str, done: int, total: int) -> None:
            name = stage.partition(";")[0]
            if name not in tasks:
                for task in tasks.values():
                    bars.remove_task(task)  # type: ignore[arg-type]
                tasks.clear()
                tasks[name] = bars.add_task(stage, total=total)
            bars.update(tasks[name], completed=done, total=total, description=stage)  # type: ignore[arg-type]

        yield listen


class _Lines:
    """Prints a stage's share, rate and time left, at most every few seconds."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stage, self.first = "", 0
        self.started = self.printed = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        name = stage.partition(";")[0]
        if name != self.stage:
            self.stage, self.first = name, done
            self.started = self.printed = now
        if now - self.printed < LINE_SECONDS:
            return
        self.printed = now
        line = f"{stage}: {done / total:.0%}"
        if rate := (done - self.first) / (now - self.started):
            line += f", {_each_second(rate)}, {(total - done) / rate:,.0f} s left"
        self.console.print(line, soft_wrap=True)


def _each_second(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"


def written(publication: Publication, what: str, *, rank: int) -> int:
    """Say what was written and what was skipped, and return the exit code."""
    if rank > 0:
        return OK
    records, out = publication.written, publication.out
    if chosen := publication.run["facts"].get("chosen"):
        what = f"{what}, which chose {chosen},"
    say(f"{records.ok:,} images {what} and written to {escape(str(out))}")
    if not records.skipped:
        return OK
    say(f"{len(records.skipped):,} skipped:")
    for record in records.skipped[:10]:
        say(f"  {escape(record['file'])}: {escape(record['reason'])}")
    if len(records.skipped) > 10:
        say(f"  ... and {len(records.skipped) - 10} more, all in {escape(str(out / 'manifest.jsonl'))}")
    return PARTIAL
