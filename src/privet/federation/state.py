"""What a sender keeps from round to round: above all what its messages left out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from privet.errors import InputError, UsageError
from privet.federation.schema import Values, finite

Index = NDArray[np.int64]

CHUNK = 1 << 20  # values that float32 adds up without losing much


@dataclass(kw_only=True)
class SenderState:
    """Error feedback with a second thought: what a lost reply carried is taken back.

    A message tells a part of the update. The rest, the residual e, is added to the next one:
    a = u + ρe, e ← a − decoded(a). Only the server knows whether a reply arrived, so it says with
    each request which of the sender's rounds it accepted last; a reply that it did not accept is taken
    back by restoring a where the message had told it.

    ρ is 1 up to `patience` rounds of absence and falls by `decay` for each further one, for a residual
    ages with the model that it was made for (Li and Li, "Analysis of error feedback in federated
    non-convex optimization with biased compression", ICML 2023, show the harm of stale ones).

    Attributes:
        seed: of whatever the codec draws; differs from sender to sender.
        decay: of the residual, for each round of absence beyond `patience`.
        patience: rounds of absence that cost nothing.
        clip: the residual's norm is at most so many times the update's.
        round: of the federation, written into messages.
        base: version of the model that the update is a difference to, written into messages.
        sent: the round of the last message, or None.
        residual: what was left out, or None before the first message.
    """

    seed: int = 0
    decay: float = 0.9
    patience: int = 5
    clip: float = 10.0
    round: int = 0
    base: int = 0
    sent: int | None = None
    residual: Values | None = field(default=None, repr=False)
    _index: Index | None = field(default=None, repr=False)  # where the last message told something
    _told: Values | None = field(default=None, repr=False)  # the sum there, before it was told

    def __post_init__(self) -> None:
        if not (0 <= self.decay <= 1 and self.patience >= 0 and self.clip > 0):
            raise UsageError(
                f"Expected a decay from 0 to 1, a patience of 0 or more and a clip above 0, got {self.decay}, "
                f"{self.patience} and {self.clip}."
            )

    @property
    def told(self) -> tuple[Index, Values] | None:
        """Where the last message told values, and what they were before they became levels; None if it told all."""
        return None if self._index is None or self._told is None else (self._index, self._told)

    def begin(self, *, round: int, base: int = 0, accepted: int | None) -> None:
        """Begin a round; `accepted` is this sender's last round that the receiver accepted, or None."""
        if not (0 <= round < 2**32 and 0 <= base < 2**32):
            raise UsageError(f"Expected round and base from 0 to 2³²−1, got {round} and {base}.")
        if self.sent != accepted:
            self._take_back()
        self.round, self.base = round, base

    def left(self, count: int) -> Values | None:
        """Return what earlier messages left out, faded by absence, or None if that is nothing.

        Args:
            count: values of the model; a residual of another model, or a damaged one, is dropped as by a restart.
        """
        if self.residual is None:
            return None
        if len(self.residual) != count or not finite(self.residual):
            self.residual = None
            return None
        absent = 0 if self.sent is None else max(0, self.round - self.sent - self.patience)
        return self.residual * np.float32(self.decay**absent) if absent else self.residual

    def carry(self, update: Values) -> Values:
        """Add the residual to an update, in place, and return it: what there is to tell.

        Raises:
            InputError: the sum is beyond float32.
        """
        left = self.left(len(update))
        if left is None:
            return update
        size, limit = norm(left), self.clip * norm(update)
        with np.errstate(over="ignore"):
            update += left if not size > limit > 0 else left * np.float32(limit / size)
        if not finite(update):
            raise InputError(
                "Expected an update that is finite together with what earlier messages left out of theirs."
            )
        return update

    def settle(self, total: Values, index: Index | None, decoded: Values) -> None:
        """Keep what a message left of `total`: it told `decoded` at `index` (everywhere if None).

        `total` becomes the state's own.
        """
        self.sent = self.round
        self._index = index
        if index is None:
            self._told = total
            self.residual = total - decoded
        else:
            self._told = total[index]
            total[index] -= decoded
            self.residual = total

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the state as arrays, for a file or for Flower's context."""
        numbers = np.array([self.round, self.base, -1 if self.sent is None else self.sent], np.int64)
        held = {"numbers": numbers, "residual": self.residual, "index": self._index, "told": self._told}
        return {name: array for name, array in held.items() if array is not None}

    def restore(self, arrays: dict[str, NDArray[Any]]) -> Self:
        """Go on from what `arrays` returned.

        Raises:
            InputError: it is no such state.
        """
        try:
            self.round, self.base, sent = (int(number) for number in arrays["numbers"])
            self.residual = _copy(arrays.get("residual"), np.float32)
            self._index, self._told = (
                _copy(arrays.get("index"), np.int64),
                _copy(arrays.get("told"), np.float32),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"Expected the arrays of a sender's state: {error}.") from error
        self.sent = None if sent < 0 else sent
        return self

    def _take_back(self) -> None:
        if self.residual is not None and self._told is not None:
            if self._index is None:
                self.residual = self._told
            else:
                self.residual[self._index] = self._told
        self._index = self._told = None


def norm(values: Values) -> float:
    """Return the Euclidean norm; infinite where a square is beyond float32."""
    with np.errstate(over="ignore"):
        return math.sqrt(
            sum(float(np.dot(part, part)) for part in np.split(values, range(CHUNK, len(values), CHUNK)))
        )


def _copy(array: NDArray[Any] | None, dtype: type[np.generic]) -> NDArray[Any] | None:
    return None if array is None else np.array(array, dtype)
