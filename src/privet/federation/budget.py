"""How much a message may take: a fraction of the values, or so many bytes in all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from privet.errors import UsageError

_UNITS = {"B": 1, "kB": 1000, "KB": 1000, "MB": 10**6, "KiB": 2**10, "MiB": 2**20}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Either the fraction of values to keep, in (0, 1], or the bytes that the whole message may take."""

    fraction: float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.bytes is None):
            raise UsageError("Expected a budget of either a fraction or bytes.")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise UsageError(f"Expected a budget above 0 % and up to 100 %, got {100 * self.fraction:g} %.")
        if self.bytes is not None and self.bytes < 1:
            raise UsageError(f"Expected a budget of at least 1 byte, got {self.bytes}.")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the budget that "1%", "0.5 %", "64KiB", "1.5 MB" or "300B" stands for.

        Raises:
            UsageError: it stands for none.
        """
        match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*(%|[kKM]i?B|B)\s*", text)
        if match is None or match.group(2) not in ("%", *_UNITS):
            raise UsageError(f"Expected a budget like 1%, 64KiB or 300B ({', '.join(_UNITS)}), got {text!r}.")
        number, unit = float(match.group(1)), match.group(2)
        return cls(fraction=number / 100) if unit == "%" else cls(bytes=int(number * _UNITS[unit]))

    def __str__(self) -> str:
        return f"{100 * self.fraction:g}%" if self.fraction is not None else f"{self.bytes}B"
