"""Recoveries, one a file, and their names."""

from __future__ import annotations

import re
from collections.abc import Callable

from privet.errors import UsageError
from privet.recovery.adversarial import AdversarialTraining
from privet.recovery.base import ImageRecovery, Nothing, Recovery
from privet.recovery.chain import Chain
from privet.recovery.coin import COIN
from privet.recovery.projection import Projection
from privet.recovery.publication import restore
from privet.recovery.squeeze import JPEG, BitDepth, Blur, Grayscale

__all__ = [
    "COIN",
    "JPEG",
    "AdversarialTraining",
    "BitDepth",
    "Blur",
    "Chain",
    "Grayscale",
    "ImageRecovery",
    "Nothing",
    "Projection",
    "Recovery",
    "create_recovery",
    "restore",
]

PLAIN: dict[str, Callable[[], Recovery]] = {
    "none": Nothing,
    "grayscale": Grayscale,
    "projection": Projection,
    "coin": COIN,
}
# Name, what makes it of its number, and the range of the number.
NUMBERED: dict[str, tuple[Callable[[float], Recovery], float, float]] = {
    "jpeg": (lambda quality: JPEG(int(quality)), 1, 100),
    "bitdepth": (lambda bits: BitDepth(int(bits)), 1, 7),
    "blur": (Blur, 0.1, 100),
    "adversarial": (AdversarialTraining, 0.01, 255),
}
WHOLE = ("jpeg", "bitdepth")


def create_recovery(name: str) -> Recovery:
    """Return the recovery of this name: none, jpeg-10, adversarial-4 (in 1/255), projection+jpeg-75, ...

    Raises:
        UsageError: no such recovery, or a number out of range.
    """
    parts = name.split("+")
    if len(parts) > 1:
        return Chain(tuple(create_recovery(part) for part in parts))
    if name in PLAIN:
        return PLAIN[name]()
    kind, _, number = name.partition("-")
    if kind in NUMBERED and re.fullmatch(r"\d{1,3}" if kind in WHOLE else r"\d{1,3}(\.\d+)?", number):
        make, least, most = NUMBERED[kind]
        if least <= float(number) <= most:
            return make(float(number))
    names = [*PLAIN, *(f"{kind}-NUMBER" for kind in NUMBERED)]
    raise UsageError(
        f"Unknown recovery {name!r}; expected one of {', '.join(names)} (quality 1 to 100, 1 to 7 bits, sigma in "
        "pixels, radius in 1/255), or several joined by +."
    )
