"""Recoveries, one a file, and their names."""

from __future__ import annotations

import re
from collections.abc import Callable

from privet.errors import UsageError
from privet.recovery.adversarial import AdversarialTraining
from privet.recovery.auto import Auto
from privet.recovery.avatar import AVATAR
from privet.recovery.base import ImageRecovery, Nothing, Recovery
from privet.recovery.chain import Chain
from privet.recovery.coin import COIN
from privet.recovery.dvae import DVAE
from privet.recovery.jcdp import JCDP
from privet.recovery.prior import Prior, load_prior
from privet.recovery.prior_training import PriorTraining, noise_error, train_prior
from privet.recovery.projection import Projection
from privet.recovery.publication import restore
from privet.recovery.purify import Purify
from privet.recovery.squeeze import JPEG, BitDepth, Blur, Grayscale
from privet.recovery.ueraser import UEraser
from privet.recovery.versions import Versions

__all__ = [
    "AVATAR",
    "COIN",
    "DVAE",
    "JCDP",
    "JPEG",
    "AdversarialTraining",
    "Auto",
    "BitDepth",
    "Blur",
    "Chain",
    "Grayscale",
    "ImageRecovery",
    "Nothing",
    "Prior",
    "PriorTraining",
    "Projection",
    "Purify",
    "Recovery",
    "UEraser",
    "Versions",
    "create_recovery",
    "load_prior",
    "needs_prior",
    "noise_error",
    "restore",
    "train_prior",
    "uses_prior",
]

PLAIN: dict[str, Callable[[], Recovery]] = {
    "none": Nothing,
    "grayscale": Grayscale,
    "projection": Projection,
    "coin": COIN,
    "dvae": DVAE,
    "ueraser": UEraser,
    "ueraser-lite": lambda: UEraser(draws=1),
    "ueraser-max": lambda: UEraser(share=1.0),
}
WITH_PRIOR: dict[str, Callable[[str], Recovery]] = {
    "purify": Purify,
    "purify-gently": Purify.gently,
    "jcdp": JCDP,
    "avatar": AVATAR,
}
# Name, what makes it of its number, and the range of the number.
NUMBERED: dict[str, tuple[Callable[[float], Recovery], float, float]] = {
    "jpeg": (lambda quality: JPEG(int(quality)), 1, 100),
    "bitdepth": (lambda bits: BitDepth(int(bits)), 1, 7),
    "blur": (Blur, 0.1, 100),
    "dvae": (lambda width: DVAE(int(width)), 4, 512),
    "adversarial": (AdversarialTraining, 0.01, 255),
}
WHOLE = ("jpeg", "bitdepth", "dvae")
# Among which `auto` chooses, by what they bring back on average; the second one where there is a prior.
CANDIDATES = ("versions", "purify-gently", "jpeg-10", "grayscale", "projection", "coin", "none")

MADE_OF_OTHERS = ("auto", "versions")  # which denoise with a prior if one is given, and do without

# What `versions` are; the last one where there is a prior.
VERSIONS = ("jpeg-10", "jpeg-10+grayscale", "purify-gently+grayscale")


def needs_prior(name: str) -> bool:
    """Say whether a recovery of this name denoises with a prior."""
    return any(part.partition("-")[0] in WITH_PRIOR for part in name.split("+"))


def uses_prior(name: str, *, given: bool) -> bool:
    """Say whether a recovery of this name denoises with a prior, if one is given or even if none is."""
    return needs_prior(name) or (given and any(part in MADE_OF_OTHERS for part in name.split("+")))


def create_recovery(name: str, *, prior: str | None = None) -> Recovery:
    """Return the recovery of this name: none, jpeg-10, adversarial-4 (in 1/255), projection+jpeg-75, ...

    Args:
        name: the name.
        prior: a folder or a model of the hub, for those that denoise with one; "auto" and "versions" do without,
            or use it too.

    Raises:
        UsageError: no such recovery, a number out of range, or no prior where one is needed.
    """
    parts = name.split("+")
    if len(parts) > 1:
        return Chain(tuple(create_recovery(part, prior=prior) for part in parts))
    if name in MADE_OF_OTHERS:
        named = CANDIDATES if name == "auto" else VERSIONS
        usable = (one for one in named if prior is not None or not needs_prior(one))
        made = tuple(create_recovery(one, prior=prior) for one in usable)
        return Auto(made) if name == "auto" else Versions(made)
    kind, _, number = name.partition("-")
    if name in WITH_PRIOR or re.fullmatch(r"purify-[1-9]", name):
        if prior is None:
            raise UsageError(
                f"{name} needs a prior: train one on unprotected images with 'privet prior train', and name its "
                "folder with --prior."
            )
        return WITH_PRIOR[name](prior) if name in WITH_PRIOR else Purify(prior, rounds=int(number))
    if name in PLAIN:
        return PLAIN[name]()
    if kind in NUMBERED and re.fullmatch(r"\d{1,3}" if kind in WHOLE else r"\d{1,3}(\.\d+)?", number):
        make, least, most = NUMBERED[kind]
        if least <= float(number) <= most:
            return make(float(number))
    names = [
        *PLAIN,
        *WITH_PRIOR,
        "purify-ROUNDS",
        *MADE_OF_OTHERS,
        *(f"{kind}-NUMBER" for kind in NUMBERED),
    ]
    raise UsageError(
        f"Unknown recovery {name!r}; expected one of {', '.join(names)} (quality 1 to 100, 1 to 7 bits, sigma in "
        "pixels, width 4 to 512, radius in 1/255), or several joined by +."
    )
