"""privet invert: reconstruct private images from what a client sent."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.markup import escape

from privet.cli.options import CLIENTS, JUDGEMENT, Clients, Judgement
from privet.cli.screen import progress, say
from privet.errors import OK, UsageError

if TYPE_CHECKING:  # they import torch, which takes seconds
    from privet.leakage import Inversion
    from privet.leakage.victims import Victim


def invert(
    source: str,
    /,
    *,
    out: Path,
    method: str = "grnn",
    preset: str = "default",
    budget: str = "default",
    set: Annotated[list[str], Parameter(name="--set", negative="")] | None = None,
    victims: int = 1,
    defence: str | None = None,
    private: str | None = None,
    hide: Annotated[bool, Parameter(negative="")] = False,
    seed: int = 0,
    device: str = "auto",
    clients: Clients = CLIENTS,
    judgement: Judgement = JUDGEMENT,
) -> int:
    """Attack what clients sent, and see whether their images and labels come out.

    SOURCE is a folder with the record of one update, or images whose clients are simulated. Updates that were
    clipped, noised or compressed are attacked twice: knowing that, and as if nothing had been done to them.

    Parameters
    ----------
    source
        A folder with update.json, or images: a folder of class folders, Parquet, or a hub id.
    out
        New folder for report.json and pairs.png.
    method
        grnn, dlg, ig or analytic. docs/leakage.md says what each does.
    preset
        default, or faithful: as the method's authors released it (grnn).
    budget
        default, or long: ten times the steps.
    set
        Change a setting of the method, as NAME=VALUE; may be repeated.
    victims
        For images: simulated clients.
    defence
        For images: what clients do before they send: clip-NORM, gaussian-SIGMA, laplace-B, topk-PERCENT, int8,
        sign, or several joined by +.
    private
        For a record: its images, if you have them, to measure how much came out.
    hide
        Leave the private images out of pairs.png.
    seed
        Of the victims, the defence and the attack.
    device
        auto, cpu or cuda.
    clients
        For images: how clients are simulated.
    judgement
        What counts.
    """
    from privet.leakage.write import PICTURE, write_attack
    from privet.learning import Runtime
    from privet.learning.update_files import RECORD

    here = Runtime.find(device, "float32")
    here.alone("privet invert")
    inversion = create_inversion(method, preset, budget, set or [])
    recorded = (Path(source) / RECORD).exists()
    _check_options(source, recorded, clients, victims=victims, defence=defence, private=private)
    with progress() as listener:
        if recorded:
            found = [_recorded(Path(source), private)]
        else:
            found = _simulated(source, clients, victims=victims, defence=defence, seed=seed)
        result = write_attack(
            out,
            found,
            inversion,
            runtime=here,
            source={"source": source, "model": clients.network, "defence": defence},
            success=judgement.success,
            seed=seed,
            **judgement.open(found[0].update.size, here),
            hide=hide,
            progress=listener,
        )
    _say(result)
    say(f"Pictures: {escape(str(out / PICTURE))}")
    return OK


def create_inversion(method: str, preset: str, budget: str, settings: list[str]) -> Inversion:
    """Return the inversion of this name, with settings as NAME=VALUE on top of its preset."""
    from privet.cli.protect import parse_settings
    from privet.leakage import INVERSIONS

    if method not in INVERSIONS:
        raise UsageError(f"Unknown method {method!r}; expected one of {', '.join(INVERSIONS)}.")
    if budget not in ("default", "long"):
        raise UsageError(f"Expected a budget default or long, got {budget!r}.")
    kind = INVERSIONS[method]
    inversion = kind.preset(preset, **parse_settings(kind, settings))
    return inversion if budget == "default" else inversion.lasting(10)


def _check_options(
    source: str, recorded: bool, clients: Clients, *, victims: int, defence: str | None, private: str | None
) -> None:
    """Refuse options that have no effect on such a source."""
    chosen = {"victims": victims != 1, "defence": defence is not None}
    chosen |= {
        field.name: getattr(clients, field.name) != getattr(CLIENTS, field.name) for field in fields(clients)
    }
    idle = [f"--{name.replace('_', '-')}" for name, yes in chosen.items() if yes]
    if recorded and idle:
        raise UsageError(
            f"{source} is the record of an update that was sent; leave {', '.join(idle)} out, which say how clients "
            "are simulated."
        )
    if private is not None and not recorded:
        raise UsageError(
            f"{source} is no record of an update, so its images are the private ones; leave --private out."
        )


def _recorded(folder: Path, private: str | None) -> Victim:
    from privet.images import open_images
    from privet.leakage.victims import open_victim
    from privet.learning import load_update

    truth = None if private is None else open_images(private, size=load_update(folder).size)
    return open_victim(folder, truth)


def _simulated(
    source: str, clients: Clients, *, victims: int, defence: str | None, seed: int
) -> list[Victim]:
    from privet.leakage.defences import create_defence
    from privet.leakage.victims import simulate

    chosen = None if defence is None else create_defence(defence)
    network, name, images = clients.open(source, seed=seed)
    return simulate(
        network, images, architecture=name, victims=victims, defence=chosen, seed=seed, **clients.settings
    )


def _say(result: dict[str, Any]) -> None:
    for words in next(iter(result["threat_model"].values())):
        say(escape(words))
    for one in result["attacks"]:
        kind = "attack" if len(result["attacks"]) == 1 else "aware" if one["aware"] else "naive"
        total = one["summary"]
        if not total:
            ends = ", ".join(map(_end, one["victims"]))
            say(
                f"[bold]{kind}[/]: {escape(ends)}; how much came out is not known without the private images."
            )
            continue
        low, high = total["bounds"]
        labels = (
            "labels were told" if total["labels_right"] is None else f"{total['labels_right']} labels right"
        )
        outcomes = ", ".join(f"{count} {name}" for name, count in total["outcomes"].items() if count)
        say(
            f"[bold]{kind}[/]: images of {total['victims_recovered']} of {total['victims']} clients recovered "
            f"(95 % bounds {low:.0%} to {high:.0%}); of {total['images']} images {outcomes}; median PSNR "
            f"{total['median_psnr']:.1f} dB, best {total['best_psnr']:.1f} dB; {labels}"
        )
        if one["identification"]:
            say(f"[bold]{kind}[/]: {identified_words(one['identification'])}")
    for name, row in result["identification"].items():
        say(f"control {name}: {identified_words(row)}")
    for name, row in result["baselines"].items():
        say(
            f"baseline {name}: median PSNR {row['median_psnr']:.1f} dB, {row['recovered']} of {row['images']}"
        )


def _end(victim: dict[str, Any]) -> str:
    """Return in words how the search for a victim's images ended."""
    distance = victim["distance"]  # None if it is infinite
    return str(victim["end"]) if distance is None else f"{victim['end']} (distance {distance:.3g})"


def identified_words(row: dict[str, Any]) -> str:
    """Return in words how images of people compared with a gallery."""
    shares = []
    for place in (1, 5):
        rank = row[f"rank{place}"]
        low, high = rank["bounds"]
        shares.append(
            f"{rank['count']} at rank {place} (95 % bounds {low:.0%} to {high:.0%}, chance {rank['chance']:.0%})"
        )
    seen = row["verification"]
    return (
        f"of {row['images']} images the right person {' and '.join(shares)}; verification: area under the curve "
        f"{seen['area']:.3f}, {seen['true_accepts_at_1_percent']:.0%} accepted at 1 % of others"
    )
