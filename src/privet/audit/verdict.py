"""What a grid means, in words and in one grade for each recovery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from privet.audit.flags import Facts, Flag
from privet.audit.statistics import Row, kept, select
from privet.audit.store import Plan

# Grades by the share of the clean images' worth that the luckiest learner still got.
HOLDS, WEAKENS = 0.25, 0.60
GRADES = ("holds", "weakens", "fails")
# A treatment under which clean or randomly noised files keep less than this tests nothing.
TESTS = 0.50


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What one recovery does to the protection.

    Attributes:
        recovery: its name.
        grade: "holds" (at most a quarter is learned), "weakens" (at most 60 %), "fails", or
            "untested" (little is learned, but little is learned from the controls too; or the audit's own controls
            failed, and nothing can be said at all).
        kept: the share that the luckiest learner still learned, over all architectures and seeds; means nothing where
            nothing was tested.
        accuracy: what that learner reached on clean images.
        architecture: which it was.
        reference: what the same architecture reaches on clean images without any recovery, on average.
        clean: what it reaches on clean images under this recovery, on average.
        untested: the architectures of which it is not known whether they would learn, as little is learned from the
            controls too.
    """

    recovery: str
    grade: str
    kept: float
    accuracy: float
    architecture: str
    reference: float
    clean: float
    untested: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of an audit.

    Attributes:
        grade: "holds" against everything tried, "partly" (not against every recovery), "fails"
            (not even against plain training), or "inconclusive" (a control failed; or nothing broke
            it, but one architecture or one seed is not enough to say that it holds).
        headline: one sentence.
        sentences: what was found for each recovery.
        grades: one for each recovery, in the plan's order.
    """

    grade: str
    headline: str
    sentences: tuple[str, ...]
    grades: tuple[Grade, ...]


def judge(plan: Plan, table: Sequence[Row], flags: Sequence[Flag], facts: Facts) -> Verdict:
    """Judge by what the luckiest learner reached: an unauthorised party tries more than once."""
    grave = [flag.name for flag in flags if flag.grave]
    grades = tuple(_grade(recovery, table, facts.chance) for recovery in plan.recoveries)
    if grave:
        grades = tuple(replace(grade, grade="untested", untested=plan.architectures) for grade in grades)
    failing = [grade for grade in grades if grade.grade in ("weakens", "fails")]
    withstood = [describe(grade.recovery) for grade in grades if grade.grade == "holds"]
    plain = next(grade for grade in grades if grade.recovery == "none")
    narrow = [flag.name for flag in flags if flag.narrow]
    for one in grades:
        if one.grade == "untested":  # with every architecture
            narrow.append(f"{one.recovery}-untested")
        else:
            narrow += [f"{one.recovery}-untested-with-{name}" for name in one.untested]
    if grave:
        grade = "inconclusive"
        headline = f"No verdict: the audit's own controls failed ({', '.join(dict.fromkeys(grave))})."
    elif plain.grade in ("weakens", "fails"):
        grade = "fails"
        headline = (
            "The protection does not hold: plain training on the protected files still learns "
            f"{plain.kept:.0%} of what clean files teach."
        )
    elif failing:
        grade = "partly"
        worst = max(failing, key=lambda one: one.kept)
        headline = (
            f"The protection does not hold against {describe(worst.recovery)}, which brings back "
            f"{worst.kept:.0%} of what clean files teach. It withstood {_and(withstood)}"
            f"{', as far as so narrow an audit can tell' if narrow else ''}."
        )
    elif narrow:
        grade = "inconclusive"
        headline = (
            "Nothing that was tried broke the protection, but too little was tried to say that it holds "
            f"({', '.join(narrow)})."
        )
    else:
        grade = "holds"
        headline = (
            f"The protection held against everything that was tried: {_and(withstood)}, each with "
            f"{len(plan.architectures)} architectures and {len(plan.seeds)} seeds."
        )
    return Verdict(grade=grade, headline=headline, sentences=tuple(map(_sentence, grades)), grades=grades)


def describe(recovery: str) -> str:
    """Return a recovery's name in words."""
    if "+" in recovery:
        return " and then ".join(map(describe, recovery.split("+")))
    kind, _, number = recovery.partition("-")
    return {
        "none": "plain training",
        "grayscale": "grayscale",
        "jpeg": f"JPEG at quality {number}",
        "bitdepth": f"{number} bits a channel",
        "blur": f"a blur of {number} px",
        "projection": "orthogonal projection",
        "purify": f"{'gentle ' if number == 'gently' else ''}purification by a diffusion prior",
        "jcdp": "JCDP (learnable examples)",
        "avatar": "AVATAR",
        "versions": "several versions of each image",
        "coin": "random interpolation (COIN)",
        "dvae": "D-VAE",
        "ueraser": f"UEraser{number and '-'}{number.capitalize()}",
        "adversarial": f"adversarial training at {number}/255",
    }.get(kind, recovery)


def _grade(recovery: str, table: Sequence[Row], chance: float) -> Grade:
    grades = []
    for row in select(table, data="protected", recovery=recovery):
        (reference,) = select(table, data="clean", recovery="none", architecture=row.architecture)
        (clean,) = select(table, data="clean", recovery=recovery, architecture=row.architecture)
        (random,) = select(table, data="random", recovery=recovery, architecture=row.architecture)
        share = kept(row.last.high, reference.last.mean, chance)
        grade = GRADES[(share > HOLDS) + (share > WEAKENS)]
        controls = [kept(control.last.mean, reference.last.mean, chance) for control in (clean, random)]
        if grade == "holds" and min(controls) < TESTS:
            grade = "untested"
        grades.append(
            Grade(
                recovery=recovery,
                grade=grade,
                kept=share,
                accuracy=row.last.high,
                architecture=row.architecture,
                reference=reference.last.mean,
                clean=clean.last.mean,
            )
        )
    worst = max(grades, key=lambda grade: (grade.grade != "untested", grade.kept))
    return replace(worst, untested=tuple(grade.architecture for grade in grades if grade.grade == "untested"))


def _sentence(grade: Grade) -> str:
    verb = {
        "holds": "The protection withstood",
        "untested": "Nothing can be said of",
        "weakens": "The protection is weakened by",
        "fails": "The protection fails under",
    }
    return (
        f"{verb[grade.grade]} {describe(grade.recovery)}: at most {grade.accuracy:.1%} "
        f"({grade.architecture}), where clean files give {grade.clean:.1%} under the same treatment and "
        f"{grade.reference:.1%} without."
    )


def _and(words: Sequence[str]) -> str:
    """Join words as a sentence does."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
