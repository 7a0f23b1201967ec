"""How a long job says how far it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called by a long job, at most a few times a second matters; must return quickly."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Say that `done` of `total` images of this stage are through.

        What follows a semicolon in `stage` is news of the same stage, as in "rounds; accuracy 43.1%".
        """


def silent(stage: str, done: int, total: int) -> None:
    """Listen to nothing."""
