"""Recoveries, one a file, and their names."""

from __future__ import annotations

import re

from privet.errors import UsageError
from privet.recovery.adversarial import AdversarialTraining
from privet.recovery.base import Nothing, Recovery
from privet.recovery.squeeze import JPEG, Grayscale

__all__ = ["JPEG", "AdversarialTraining", "Grayscale", "Nothing", "Recovery", "create_recovery"]

RECOVERIES = ("none", "jpeg-QUALITY", "grayscale", "adversarial-RADIUS")


def create_recovery(name: str) -> Recovery:
    """Return the recovery of this name: none, jpeg-10, grayscale, adversarial-4 (in 1/255), ...

    Raises:
        UsageError: no such recovery, or a number out of range.
    """
    if name == "none":
        return Nothing()
    if name == "grayscale":
        return Grayscale()
    if (match := re.fullmatch(r"jpeg-(\d{1,3})", name)) and 1 <= int(match[1]) <= 100:
        return JPEG(int(match[1]))
    if (match := re.fullmatch(r"adversarial-(\d{1,2}(?:\.\d+)?)", name)) and float(match[1]) > 0:
        return AdversarialTraining(float(match[1]))
    raise UsageError(
        f"Unknown recovery {name!r}; expected one of {', '.join(RECOVERIES)} (quality 1 to 100, radius in 1/255)."
    )
