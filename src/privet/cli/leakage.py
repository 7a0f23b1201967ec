"""privet audit leakage: measure what federated updates give away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.markup import escape

from privet.cli.invert import create_inversion
from privet.cli.options import CLIENTS, JUDGEMENT, Clients, Judgement, split
from privet.cli.screen import progress, say
from privet.errors import CONTROL_FAILED, OK, OVER_LIMIT, UsageError

if TYPE_CHECKING:  # they import torch, which takes seconds
    from privet.audit import LeakageAudit
    from privet.audit.leakage_plan import Setting
    from privet.leakage import Inversion


def leakage(
    source: str,
    /,
    *,
    out: Path,
    methods: str = "grnn",
    defences: str = "none",
    budget: str = "default",
    set: Annotated[list[str], Parameter(name="--set", negative="")] | None = None,
    victims: int = 10,
    layers: bool = True,
    test: str | None = None,
    test_split: str | None = None,
    rounds: int = 300,
    fail_above: float | None = None,
    hide: Annotated[bool, Parameter(negative="")] = False,
    seed: int = 0,
    device: str = "auto",
    clients: Clients = CLIENTS,
    judgement: Judgement = JUDGEMENT,
) -> int:
    """Attack simulated clients with every method, against every defence, and say what came out.

    Every attack on a defence stands beside the same attack without one. Every finished setting is one line of
    cells.jsonl; a killed audit goes on when the same command is given again.

    Parameters
    ----------
    source
        The clients' images: a folder of class folders, Parquet, or a hub id.
    out
        New folder for report.html, report.json, cells.jsonl and the images that were found.
    methods
        Inversions, with commas between: grnn, dlg, ig, analytic.
    defences
        With commas between: none, clip-NORM, gaussian-SIGMA, laplace-B, topk-PERCENT, int8, sign, or several joined
        by +. Without a defence clients are attacked in any case, as the control.
    budget
        default, or long: ten times the steps.
    set
        Change a setting of all methods, as NAME=VALUE, or of one, as METHOD.NAME=VALUE; may be repeated.
    victims
        Simulated clients.
    layers
        Whether single layers are attacked as well, by the first method; --no-layers for deep networks.
    test
        Images with the same classes, to measure what each defence costs: the accuracy of a network that such clients
        train, each round with new images of the source.
    test_split
        Split of those, if they come from the hub or from a folder of several.
    rounds
        Of that training.
    fail_above
        End with exit code 9 if the upper 95 % bound of the share of clients who lose an image exceeds this share under
        any of --defences; with 10 if it does not, but no method recovered anything without a defence either.
    hide
        Leave the private images out of the page.
    seed
        Of the victims, the defences and the attacks.
    device
        auto, cpu or cuda.
    clients
        How they are simulated.
    judgement
        What counts.
    """
    from privet.audit import Clients as Simulated
    from privet.audit import LeakagePlan, audit_leakage
    from privet.images import align, open_images
    from privet.learning import Runtime
    from privet.report import write_leakage_report

    if fail_above is not None:
        _announce(fail_above, victims)
    here = Runtime.find(device, "float32")
    here.alone("privet audit leakage")
    plan = LeakagePlan(
        inversions=_inversions(split(methods), budget, set or []),
        defences=split(defences),
        layers=layers,
        clients=Simulated(victims=victims, **clients.settings),
        success=judgement.success,
        rounds=rounds,
        seed=seed,
    )
    with progress() as listener:
        network, name, images = clients.open(source, seed=seed)
        tested = None
        if test is not None:
            tested = align(open_images(test, size=images.size, split=test_split), images.class_names)
        found = audit_leakage(
            network,
            images,
            architecture=name,
            out=out,
            plan=plan,
            runtime=here,
            source={"source": source, "model": clients.network, "test": test},
            test=tested,
            **judgement.open(images.size, here),
            progress=listener,
            finished=_finished,
        )
    report = write_leakage_report(found, out, hide=hide)
    _say(report)
    say(f"Report: {escape(str(out / 'report.html'))}")
    return OK if fail_above is None else _judged(found, fail_above)


def _judged(found: LeakageAudit, limit: float) -> int:
    """Say whether the audit stays within a limit, and return the exit code."""
    if found.control_failed:
        say(
            "[bold red]The control failed:[/] no method recovered an image without a defence either, so nothing is "
            "known of the limit. Give the attacks more steps, or audit another network."
        )
    if found.highest > limit:
        say(f"[bold red]Above the limit:[/] the upper bound is {found.highest:.1%}, not {limit:.1%}.")
        return OVER_LIMIT
    return CONTROL_FAILED if found.control_failed else OK


def _announce(limit: float, victims: int) -> None:
    """Refuse a limit that is none, and say before the work if it cannot be met."""
    from privet.audit.leakage import needed_victims

    if not 0 < limit <= 1:
        raise UsageError(f"Expected --fail-above to be a share above 0 and at most 1, got {limit}.")
    if victims < (needed := needed_victims(limit)):
        say(
            f"With {victims} victims no outcome can stay within --fail-above {limit:g}: it takes at least {needed}."
        )


def _inversions(methods: tuple[str, ...], budget: str, settings: list[str]) -> tuple[Inversion, ...]:
    """Return the inversions, each with the settings that are meant for it."""
    for setting in settings:
        method, dot, _ = setting.partition("=")[0].partition(".")
        if dot and method not in methods:
            raise UsageError(f"--set {setting} is for {method}, which is not among --methods.")
    found = []
    for method in methods:
        mine = [one.removeprefix(f"{method}.") for one in settings if _is_for(one, method)]
        found.append(create_inversion(method, "default", budget, mine))
    return tuple(found)


def _is_for(setting: str, method: str) -> bool:
    name = setting.partition("=")[0]
    return "." not in name or name.startswith(f"{method}.")


def _finished(setting: Setting, result: dict[str, Any], done: int, total: int) -> None:
    total_found = result["summary"]
    what = f"layer {setting.layer} alone" if setting.layer else f"{setting.defence}, {setting.attacker}"
    say(
        f"[{done}/{total}] {setting.method}, {escape(what)}: {total_found['victims_recovered']} of "
        f"{total_found['victims']} clients, median PSNR {total_found['median_psnr']:.1f} dB"
    )


def _say(report: dict[str, Any]) -> None:
    colour = "red" if report["worst"]["share"] else "magenta"
    say(f"\n[bold {colour}]{escape(report['headline'])}[/]")
    low, high = report["worst"]["bounds"]
    say(f"  95 % bounds of that share: {low:.0%} to {high:.0%}")
    if report["identification"]:
        clean = report["identification"]["clean"]
        known = ", ".join(
            f"{row['method']} {row['defence']} {row['attacker']} {row['identification']['rank1']['count']}"
            for row in report["settings"]
        )
        say(
            f"  Recognised first in the gallery, of {clean['images']}: {escape(known)}; the private images "
            f"themselves {clean['rank1']['count']}, by chance {clean['rank1']['chance']:.0%}"
        )
    for doubt in report["doubts"]:
        say(f"  [yellow]Doubt ({doubt['name']}):[/] {escape(doubt['says'])}")
