"""privet audit: measure what a protection is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cyclopts import App
from rich.markup import escape

from privet.cli.leakage import leakage
from privet.cli.licence import licence
from privet.cli.options import MACHINE, Machine, Workers, processes
from privet.cli.options import split as listed
from privet.cli.prior import doubt_blind
from privet.cli.screen import progress, say
from privet.errors import OK

audit = App(
    name="audit",
    help="Train learners on clean, randomly noised and protected files, and say whether the protection holds. "
    "A killed audit goes on when the same command is given again. What federated updates give away: audit leakage. "
    "Who learns from a licensed release: audit licence.",
)
audit.command(leakage)
audit.command(licence)

COLOURS = {"holds": "green", "partly": "yellow", "fails": "red", "inconclusive": "magenta"}


@audit.default
def protection(
    clean: str,
    protected: str,
    /,
    *,
    test: str,
    out: Path,
    preset: str | None = None,
    recoveries: str | None = None,
    architectures: str | None = None,
    seeds: int | None = None,
    epochs: int | None = None,
    flip: bool = True,
    prior: str | None = None,
    size: int | None = None,
    split: str | None = None,
    test_split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    machine: Machine = MACHINE,
    workers: Workers = None,
) -> int:
    """Train learners on clean, randomly noised and protected files, and say whether the protection holds.

    Every finished learner is one line of cells.jsonl; a killed audit goes on when the same command is given again.

    Parameters
    ----------
    clean
        The images as they were: a folder of class folders, a .csv or .jsonl, Parquet, or a hub id.
    protected
        The same images as published, under the same names.
    test
        Clean images of the same classes that nobody trains on.
    out
        New folder for report.html, report.json, cells.jsonl and the control's files.
    preset
        paper (three large networks, three seeds, 103 epochs; needs a GPU) or cpu.
        Default: paper where there is a GPU, else cpu.
    recoveries
        What is tried against the protection, with commas between: none, jpeg-QUALITY, grayscale,
        bitdepth-BITS, blur-SIGMA, projection, coin, dvae, adversarial-RADIUS, ueraser, ueraser-lite, ueraser-max,
        versions, auto; purify, purify-gently, jcdp, avatar with --prior; or several joined by +.
        Default: none,jpeg-10,jpeg-50,jpeg-75,grayscale,versions,adversarial-4.
    architectures
        Networks of the learners, with commas between; simclr:NAME for one that learns without labels.
    seeds
        How often each learner is trained.
    epochs
        Passes of each learner over the images.
    flip
        Whether views are mirrored; --no-flip for handwriting.
    prior
        For purify, purify-gently, jcdp and avatar, and a third of the versions: a folder of 'privet prior train',
        or a model of the hub.
    size
        Side in pixels at which networks see the images.
    split
        Split of the clean images, if they come from the hub or from a folder of several.
    test_split
        Likewise of the test images.
    limit
        Use only so many of the clean images, the same that 'privet protect --limit' takes.
    seed
        Of the random control.
    workers
        Learners trained at a time (default: the number of processors, or 1 on a GPU). Results do not depend on it.
    machine
        Where it runs.
    """
    from privet.audit import Cell, run_audit
    from privet.audit.store import plan
    from privet.recovery import load_prior
    from privet.report import write_report

    here = machine.find()
    here.alone("privet audit")
    on_gpu = here.device.type == "cuda"
    chosen = plan(
        preset or ("paper" if on_gpu else "cpu"),
        recoveries=None if recoveries is None else listed(recoveries),
        architectures=None if architectures is None else listed(architectures),
        seeds=seeds,
        epochs=epochs,
        flip=flip,
        prior=prior,
    )

    if prior is not None:  # rather than after hours
        doubt_blind(load_prior(prior, runtime=here))

    def finished(cell: Cell, result: dict[str, Any], done: int, total: int) -> None:
        name = f"{cell.data} files, {cell.recovery}, {cell.architecture}, seed {cell.seed}"
        say(f"[{done}/{total}] {name}: {result['last']:.1%} (best {result['best']:.1%})")

    with progress() as listener:
        result = run_audit(
            clean,
            protected,
            test=test,
            out=out,
            plan=chosen,
            runtime=here,
            seed=seed,
            size=size,
            split=split,
            test_split=test_split,
            limit=limit,
            workers=workers or processes(here),
            progress=listener,
            finished=finished,
        )
    page = write_report(result, out)
    verdict = result.verdict
    say(f"\n[bold {COLOURS[verdict.grade]}]{escape(verdict.headline)}[/]")
    for sentence in verdict.sentences:
        say(f"  {escape(sentence)}")
    for flag in result.flags:
        say(f"  [yellow]Doubt ({flag.name}):[/] {escape(flag.says)}")
    say(f"Report: {escape(str(page))}")
    return OK
