"""privet audit licence: measure who learns from a licensed release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape

from privet.cli.options import MACHINE, Machine, Workers, processes
from privet.cli.options import split as listed
from privet.cli.passphrase import read_passphrase
from privet.cli.screen import progress, say
from privet.errors import OK

COLOURS = {"conditionally learnable": "green", "against plain training only": "yellow", "not": "red"}


def licence(
    folder: Path,
    /,
    *,
    licence: Path,
    clean: str,
    test: str,
    out: Path,
    architectures: str = "",
    seeds: int = 3,
    tries: int = 5,
    recoveries: str = "jpeg-10,grayscale,versions",
    pairs: tuple[int, ...] = (50,),
    share: float = 0.1,
    prior: str | None = None,
    split: str | None = None,
    test_split: str | None = None,
    passphrase_file: Path | None = None,
    machine: Machine = MACHINE,
    workers: Workers = None,
) -> int:
    """Train the licensee and everybody else on a release, and say whether it is conditionally learnable.

    It is, if the licensee loses at most 2 points of accuracy and everybody else, at their best epoch, at least 30.
    Every finished learner is one line of cells.jsonl; a killed audit goes on when the same command is given again.

    Parameters
    ----------
    folder
        The release.
    licence
        A licence for it, such as the vendor's own NAME.licence.
    clean
        The originals.
    test
        Clean images of the same classes that nobody trains on.
    out
        New folder for report.html, report.json and cells.jsonl.
    architectures
        Other networks than the recipe's, with commas between, which outsiders train too.
        Without any, nothing can be said to hold.
    seeds
        How often each learner is trained.
    tries
        How often outsiders train the recipe's network on the files as they are.
    recoveries
        What outsiders try, with commas between; as for privet audit.
    pairs
        How many images outsiders have both clean and protected; may be repeated.
    share
        Of the originals that an outsider has and mixes in; 0 to leave that out.
    prior
        For the recoveries purify, jcdp and avatar.
    split
        Split of the originals, if they come from the hub or from a folder of several.
    test_split
        Likewise of the test images.
    passphrase_file
        A file whose first line opens the licence (default: asked for).
    workers
        Learners trained at a time (default: the number of processors, or 1 on a GPU).
    machine
        Where it runs.
    """
    from privet.audit import LicencePlan, Seat, audit_licence
    from privet.audit.licence_verdict import who
    from privet.licensing import read_licence
    from privet.report import write_licence_report

    opened = read_licence(licence, read_passphrase(passphrase_file, "Passphrase of the licence"))
    learner, here = opened.learner(), machine.find()
    here.alone("privet audit licence")
    plan = LicencePlan(
        architectures=(learner.architecture, *listed(architectures)),
        seeds=tuple(range(seeds)),
        tries=tries,
        recoveries=listed(recoveries),
        pairs=pairs,
        share=share,
        learner=learner,
        prior=prior,
    )

    def finished(seat: Seat, result: dict[str, Any], done: int, total: int) -> None:
        name = ", ".join(
            part for part in (who(seat.who), seat.architecture, f"seed {seat.seed}", seat.freedom) if part
        )
        say(f"[{done}/{total}] {escape(name)}: {result['last']:.1%} (best {result['best']:.1%})")

    with progress() as listener:
        found = audit_licence(
            folder,
            opened,
            clean=clean,
            test=test,
            out=out,
            plan=plan,
            runtime=here,
            split=split,
            test_split=test_split,
            workers=workers or processes(here),
            progress=listener,
            finished=finished,
        )
    write_licence_report(found, out)
    verdict = found.verdict
    say(f"\n[bold {COLOURS.get(verdict.grade, 'magenta')}]{escape(verdict.headline)}[/]")
    for reason in verdict.reasons:
        say(f"  {escape(reason)}")
    say(f"Report: {escape(str(out / 'report.html'))}")
    return OK
