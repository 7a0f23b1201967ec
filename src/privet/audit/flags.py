"""Reasons to doubt an audit, found by the audit itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from privet.audit.statistics import Row, kept, select
from privet.audit.store import Plan
from privet.learning.confidence import uncertainty
from privet.models import family
from privet.recovery import uses_prior
from privet.recovery.prior import BLIND


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One reason for doubt.

    Attributes:
        name: stable, for programs.
        grave: whether no verdict can be given because of it.
        narrow: whether too little was tried to say that a protection holds.
        says: what was found, what it means, and what to do.
    """

    name: str
    grave: bool = False
    narrow: bool = False
    says: str


@dataclass(frozen=True, kw_only=True)
class PriorFacts:
    """What is known of the prior that recoveries denoise with.

    Attributes:
        clean: how many originals of the protected images it was trained on; None if it does not tell.
        test: how many test images, likewise.
        own: its error (of the noise, mean square) on the images that it was trained on, or None if unknown.
        here: its error on the test images.
    """

    clean: int | None
    test: int | None
    own: float | None
    here: float


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of the files beside the grid.

    Attributes:
        chance: accuracy of always naming the commonest class.
        test: number of test images.
        paired: images of the protected set that were found in the clean one.
        unpaired: images of either set without a counterpart.
        overlap: test images whose pixels are also among the clean training images.
        linf: the largest change of a pixel, in 1/255.
        excess: by what an image exceeds the budget that run.json claims, or None.
        protection: run.json of the protected set, if it has one.
        prior: what is known of the prior that recoveries denoise with, if there is one.
    """

    chance: float
    test: int
    paired: int
    unpaired: int
    overlap: int
    linf: int
    excess: str | None
    protection: dict[str, Any] | None
    prior: PriorFacts | None = None


# A flag is raised beyond these.
CONTROL_KEPT = 0.75  # what the random control must leave learnable
LEARNED = 0.10  # clean accuracy must exceed chance by this
EARLY_STOPPING = 0.05  # best epoch above the last
SPREAD = 0.05  # standard deviation over seeds
SMALL_TEST = 500  # images
FOREIGN = 1.25  # a prior's error here, of its error on its own images


def find_flags(plan: Plan, table: Sequence[Row], facts: Facts) -> list[Flag]:
    """Return every reason to doubt this audit, gravest first."""
    flags = [
        *_controls(plan, table, facts),
        *_design(plan, facts),
        *_training(table),
        *_files(facts),
        *_prior(facts),
        *_recoveries(plan, table, facts),
    ]
    return sorted(flags, key=lambda flag: not flag.grave)


def _controls(plan: Plan, table: Sequence[Row], facts: Facts) -> list[Flag]:
    flags = []
    for architecture in plan.architectures:
        (clean,) = select(table, data="clean", recovery="none", architecture=architecture)
        (random,) = select(table, data="random", recovery="none", architecture=architecture)
        if clean.last.mean < facts.chance + LEARNED:
            flags.append(
                Flag(
                    name="clean-not-learned",
                    grave=True,
                    says=f"{architecture} does not learn the clean images either ({clean.last.mean:.1%}, chance "
                    f"is {facts.chance:.1%}), so its failure on protected ones means nothing. Train longer or on "
                    "more images.",
                )
            )
        elif kept(random.last.mean, clean.last.mean, facts.chance) < CONTROL_KEPT:
            flags.append(
                Flag(
                    name="control-protects",
                    grave=True,
                    says=f"Random noise of the same size hurts {architecture} as well ({random.last.mean:.1%} "
                    f"against {clean.last.mean:.1%} on clean images), so the effect is not the method's. The "
                    "budget is too large for these images, or training too short.",
                )
            )
    return flags


def _design(plan: Plan, facts: Facts) -> list[Flag]:
    flags = []
    surrogate = ((facts.protection or {}).get("settings") or {}).get("surrogate")
    families = {family(name) for name in plan.architectures}
    if facts.protection is None:
        flags.append(
            Flag(
                name="surrogate-unknown",
                narrow=len(families) == 1,  # of two kinds one is not the surrogate's, whatever that is
                says="The protected files come without privet's run.json, so nobody knows which surrogate they were "
                "made with, and whether a learner of another architecture was tried.",
            )
        )
    elif surrogate and families == {family(surrogate)}:
        flags.append(
            Flag(
                name="same-architecture",
                narrow=True,
                says=f"Every learner is of the surrogate's kind ({surrogate}). Others may learn what these do not: "
                "add an architecture of another kind.",
            )
        )
    if len(plan.architectures) == 1:
        flags.append(
            Flag(
                name="one-architecture",
                narrow=True,
                says="One architecture was tried; a protection is not shown by one.",
            )
        )
    if len(plan.seeds) == 1:
        flags.append(
            Flag(
                name="one-seed",
                narrow=True,
                says="One seed was tried, so chance cannot be told from effect; use at least 3.",
            )
        )
    return flags


def _training(table: Sequence[Row]) -> list[Flag]:
    flags = []
    every = [
        (best - last, row, best, last, epoch)
        for row in select(table, data="protected")
        for best, last, epoch in zip(row.best.values, row.last.values, row.best_epochs, strict=True)
    ]
    gain, worst, best, last, epoch = max(every, key=lambda one: one[0])
    if gain > EARLY_STOPPING:
        flags.append(
            Flag(
                name="best-above-last",
                says=f"Stopping early helps the learner: {worst.architecture} under {worst.recovery} reached "
                f"{best:.1%} at epoch {epoch} and ended at {last:.1%}. Whoever owns a few clean images can stop "
                "there.",
            )
        )
    wide = [row for row in table if (row.last.sd or 0) > SPREAD]
    if wide:
        widest = max(wide, key=lambda row: row.last.sd or 0)
        flags.append(
            Flag(
                name="seeds-disagree",
                says=f"Seeds disagree: {widest.architecture} on {widest.data} files under {widest.recovery} has "
                f"a standard deviation of {widest.last.sd:.1%}. Use more seeds.",
            )
        )
    return flags


def _prior(facts: Facts) -> list[Flag]:
    if facts.prior is None:
        return []
    flags = []
    if facts.prior.here >= BLIND:
        flags.append(
            Flag(
                name="prior-blind",
                narrow=True,  # what denoises with it was not really tried
                says="The prior is blind to images like these: its error on the test images is "
                f"{facts.prior.here:.2f}, and 1 is that of seeing no noise at all. Recoveries with it add noise and "
                "take hardly any off, so their failure says nothing. Train one with more steps, or on images more "
                "like these.",
            )
        )
    if facts.prior.clean is None:
        flags.append(
            Flag(
                name="prior-unknown",
                says="Nobody knows which images the prior was trained on. If the originals or the test images were "
                "among them, recoveries with it look better than they are.",
            )
        )
        return flags
    if facts.prior.own is not None and facts.prior.here > FOREIGN * facts.prior.own:
        flags.append(
            Flag(
                name="prior-other-domain",
                says=f"The prior was trained on images of another kind: its error on the test images is "
                f"{facts.prior.here:.4f}, on its own {facts.prior.own:.4f}. Recoveries with a fitting one may "
                "bring back more.",
            )
        )
    for seen, total, name, whose in (
        (facts.prior.clean, facts.paired, "prior-saw-originals", "the originals of the protected images"),
        (facts.prior.test or 0, facts.test, "prior-saw-test", "the test images"),
    ):
        if seen:
            flags.append(
                Flag(
                    name=name,
                    says=f"The prior was trained on {seen} of the {total} images that are {whose}, which nobody who "
                    "attacks has. Recoveries with it look better than they are; train one on other images.",
                )
            )
    return flags


def _recoveries(plan: Plan, table: Sequence[Row], facts: Facts) -> list[Flag]:
    """Find recoveries that denoise with a prior and do not repay it."""
    level = {
        recovery: max(row.last.mean for row in select(table, data="protected", recovery=recovery))
        for recovery in plan.recoveries
    }
    alone = [name for name in plan.recoveries if re.fullmatch(r"jpeg-\d+", name)]
    jpeg = max(alone, key=level.__getitem__, default=None)
    return [
        Flag(
            name="worse-than-jpeg",
            says=f"{name} brings accuracy to {level[name]:.1%}, and {jpeg}, which costs nothing, to {level[jpeg]:.1%}. "
            "Train the prior longer, or on images more like these.",
        )
        for name in plan.recoveries
        if jpeg is not None
        and uses_prior(name, given=plan.prior is not None)
        and level[name] < level[jpeg] - uncertainty(facts.test)
    ]


def _files(facts: Facts) -> list[Flag]:
    flags = []
    if facts.overlap:
        flags.append(
            Flag(
                name="test-overlap",
                grave=facts.overlap > facts.test / 10,
                says=f"{facts.overlap} of {facts.test} test images are also training images, which raises "
                "every accuracy on clean files. Use test images that nobody trained on.",
            )
        )
    if facts.unpaired:
        flags.append(
            Flag(
                name="unpaired",
                says=f"{facts.unpaired} images are in only one of the clean and the protected set and were "
                f"left out; {facts.paired} pairs remain.",
            )
        )
    if facts.test < SMALL_TEST:
        flags.append(
            Flag(
                name="small-test",
                says=f"Only {facts.test} test images: an accuracy is uncertain by several points.",
            )
        )
    if facts.excess is not None:
        flags.append(
            Flag(
                name="over-budget",
                grave=True,
                says=f"An image differs from its original by {facts.excess} that run.json claims: these are not "
                "the files of that run.",
            )
        )
    return flags
