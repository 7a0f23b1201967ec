"""What a licence's audit comes to: conditionally learnable, or why not, by bounds that were set beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from privet.audit.licence_plan import (
    ANOTHER_KEY,
    CLEAN,
    CLEAN_PART,
    DISTILLED,
    FILES_ALONE,
    LEARNED,
    LICENSEE,
    MIXED,
    PAIRS,
    PLAIN,
    RECOVERY,
    LicencePlan,
    Seat,
)
from privet.audit.statistics import Spread
from privet.audit.verdict import describe

COST, GAP = 0.02, 0.30  # of accuracy: what the licensee may lose, and what everybody else must
YES, PLAINLY, NO, OPEN = "conditionally learnable", "against plain training only", "not", "inconclusive"


@dataclass(frozen=True, kw_only=True)
class LicenceRow:
    """All seeds of one party and network.

    Attributes:
        who: as in `Seat`.
        architecture: likewise.
        freedom: likewise.
        last: accuracies on clean test images after the last epoch.
        peak: after each learner's best epoch.
        counts: whether the verdict asks for the gap here.
    """

    who: str
    architecture: str
    freedom: str
    last: Spread
    peak: Spread
    counts: bool


@dataclass(frozen=True, kw_only=True)
class LicenceVerdict:
    """The result of a licence's audit.

    Attributes:
        grade: `YES` if the licensee loses at most `COST` and everybody else, at their best epoch and
            luckiest seed, at least `GAP`; `PLAINLY` if that holds of those who train on the files as they
            are; `NO`; or `OPEN` where too little was tried or clean files teach too little.
        headline: one sentence.
        reasons: what keeps it from a better grade.
        licensee: what the licensee reaches, the mean over seeds.
        clean: what the same network learns from the originals, likewise.
        hacker: the highest peak of anybody else with that network.
        strongest: who that is.
    """

    grade: str
    headline: str
    reasons: tuple[str, ...]
    licensee: float
    clean: float
    hacker: float
    strongest: str


def licence_rows(results: Mapping[Seat, dict[str, Any]]) -> list[LicenceRow]:
    """Group finished learners by everything but the seed."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for seat, result in results.items():
        groups.setdefault((seat.who, seat.architecture, seat.freedom), []).append(result)
    return [
        LicenceRow(
            who=who,
            architecture=architecture,
            freedom=freedom,
            last=Spread(values=tuple(one["last"] for one in found)),
            peak=Spread(values=tuple(one["best"] for one in found)),
            counts=who not in (CLEAN, LICENSEE, CLEAN_PART, MIXED),
        )
        for (who, architecture, freedom), found in groups.items()
    ]


def judge_licence(plan: LicencePlan, table: Sequence[LicenceRow], *, chance: float) -> LicenceVerdict:
    """Judge by the bounds, the luckiest of everybody without a licence against the mean of clean files."""
    main = plan.architectures[0]
    reference = {row.architecture: row.last.mean for row in table if row.who == CLEAN and not row.freedom}
    (licensee,) = (row for row in table if (row.who, row.architecture, row.freedom) == (LICENSEE, main, ""))
    cost = reference[main] - licensee.last.mean
    nearest_first = sorted(
        (row for row in table if row.counts),
        key=lambda row: reference[row.architecture] - row.peak.high,
    )
    plain: list[str] = []
    strong: list[str] = []
    for row in nearest_first:
        if reference[row.architecture] - row.peak.high < GAP:
            words = (
                f"{who(row.who)} {'reaches' if row.who != PLAIN else 'reach'} {row.peak.high:.1%} at best "
                f"({row.architecture}), where clean files give {reference[row.architecture]:.1%}"
            )
            (plain if row.who == PLAIN else strong).append(words)
    lost = [f"the licensee loses {100 * cost:.1f} points"] if cost > COST else []
    empty = [
        f"{name} learns too little from clean files to lose {100 * GAP:.0f} points"
        for name, value in reference.items()
        if value - chance < GAP
    ]
    narrow = len(plan.architectures) < 2 or len(plan.seeds) < 2
    few = ["one network or one seed is not enough to say that it holds"] if narrow else []
    best = next(row for row in nearest_first if row.architecture == main)
    bounds = f"the licensee may lose {100 * COST:.0f} points, everybody else must lose {100 * GAP:.0f}"
    if empty:
        grade, headline = OPEN, f"No verdict: {empty[0]}."
    elif lost or plain:
        grade, headline = NO, f"NOT conditionally learnable ({bounds}): {(lost + plain)[0]}."
    elif few:
        grade, headline = OPEN, f"No verdict: {few[0]}."
    elif strong:
        grade = PLAINLY
        headline = f"Conditionally learnable against plain training only: others get through: {strong[0]}."
    else:
        grade, headline = YES, f"Conditionally learnable against everything that was tried ({bounds})."
    return LicenceVerdict(
        grade=grade,
        headline=headline,
        reasons=tuple(empty + lost + plain + strong + few),
        licensee=licensee.last.mean,
        clean=reference[main],
        hacker=best.peak.high,
        strongest=best.who,
    )


def who(name: str) -> str:
    """Return a party in words."""
    kind, _, what = name.partition(" ")
    if kind == RECOVERY:
        return f"who tries {describe(what)}"
    if kind == PAIRS and what:
        return f"who has {what} pairs of an original and its protected file"
    return {
        CLEAN: "the originals",
        LICENSEE: "the licensee",
        PLAIN: "those who train on the files as they are",
        ANOTHER_KEY: "who guesses a key",
        LEARNED: "who learns a layer in the place of the stem",
        FILES_ALONE: "who looks for the noise in the files alone",
        DISTILLED: "who imitates the licensee's network",
        CLEAN_PART: "who has a part of the originals, and trains on that alone",
        MIXED: "who puts a part of the originals into the release",
    }[name]
