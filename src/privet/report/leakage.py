"""A leakage audit as report.json and as one self-contained page that needs nothing else."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import torch

from privet.audit.leakage import LeakageAudit, needed_victims
from privet.audit.leakage_plan import LAYER, NAIVE, NONE, Setting
from privet.files import write_bytes, write_json
from privet.images.montage import montage, png
from privet.leakage.measure import OUTCOMES
from privet.leakage.results import baseline_rows, control_rows
from privet.leakage.victims import threat_model, treatments
from privet.learning.confidence import clopper_pearson
from privet.report.leakage_plots import frontier, layer_bars, loss_curves, psnr_curves
from privet.report.pages import pages

JSON, PAGE = "report.json", "report.html"
ROWS = 8  # private images that are shown
LEARNED = 1.5  # times the accuracy of a guess
FIVE = 0.05  # a share of success that many would still accept


def write_leakage_report(audit: LeakageAudit, out: Path, *, hide: bool = False) -> dict[str, Any]:
    """Write report.json and report.html into `out`, and return what the former holds.

    Args:
        audit: what was found.
        out: the audit's folder.
        hide: leave the private images out of the page.
    """
    report = summarise_leakage(audit)
    write_json(out / JSON, report)
    write_bytes(out / PAGE, render_leakage(report, pictures=_pictures(audit, hide=hide)).encode())
    return report


def summarise_leakage(audit: LeakageAudit) -> dict[str, Any]:
    """Return everything that an audit found, as JSON values."""
    private = _private(audit)
    whole = [one for one in audit.results if one.attacker != LAYER]
    settings = [_row(audit, one) for one in whole]
    worst = max(
        (row for row in settings if row["judged"]), key=lambda row: (row["share"], row["median_psnr"])
    )
    baselines = {} if audit.public is None else baseline_rows(private, audit.public, audit.plan.success)
    return {
        "headline": _headline(audit, worst),
        "worst": {key: worst[key] for key in ("method", "defence", "attacker", "share", "bounds")},
        "highest_bound": audit.highest,
        "doubts": _doubts(audit, settings, baselines),
        "threat_model": _threats(audit),
        "settings": settings,
        "layers": [_row(audit, one) for one in audit.results if one.attacker == LAYER],
        "defences": [_defence(audit, name, settings) for name in audit.victims],
        "chance": audit.chance,
        "baselines": baselines,
        "identification": {} if audit.gallery is None else control_rows(audit.victims[NONE], audit.gallery),
        "victims": {str(one.name): audit.results[one]["victims"] for one in audit.results},
        "shown": _worst_first(audit),
        "run": audit.run,
    }


def render_leakage(report: dict[str, Any], *, pictures: dict[str, dict[str, Any]]) -> str:
    """Return the page for a report.

    Args:
        report: what `summarise_leakage` returned, or read back from report.json.
        pictures: for each method the names of columns, and rows of images as PNG bytes.
    """
    return (
        pages()
        .get_template("leakage.html")
        .render(
            **report,
            outcomes=OUTCOMES,
            losses=loss_curves(report),
            ratios=psnr_curves(report),
            bars=layer_bars(report) if report["layers"] else "",
            measured=report["defences"][0]["accuracy"] is not None,
            plot=frontier(report) if len(report["defences"]) > 1 else "",
            pictures={
                name: {**picture, "png": base64.b64encode(picture["png"]).decode()}
                for name, picture in pictures.items()
            },
        )
    )


def _row(audit: LeakageAudit, setting: Setting) -> dict[str, Any]:
    """Return a setting's figures, beside those of the same attack without a defence."""
    result = audit.results[setting]
    control = audit.results[Setting(method=setting.method)]["summary"]
    first = result["victims"][0]
    return {
        "name": setting.name,
        "method": setting.method,
        "defence": setting.defence,
        "attacker": setting.attacker,
        "layer": setting.layer,
        "judged": setting in audit.judged,
        **result["summary"],
        "bounds": list(result["summary"]["bounds"]),
        "identification": result["identification"],
        "control": {key: control[key] for key in ("victims", "victims_recovered", "share", "median_psnr")},
        "equations": min(victim["equations"] for victim in result["victims"]),
        "unknowns": first["unknowns"],
    }


def _defence(audit: LeakageAudit, name: str, settings: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a defence's price, and what the best attack on it came to, whether naive or aware."""
    rows = [row for row in settings if row["defence"] == name]

    def best(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        row = max(chosen, key=lambda row: (row["share"], row["median_psnr"]))
        return {key: row[key] for key in ("method", "attacker", "share", "bounds", "median_psnr")}

    return {
        "defence": name,
        "gradient_error": audit.errors[name]["one"],
        "mean_gradient_error": audit.errors[name]["mean"],
        "accuracy": audit.accuracies.get(name),
        "equations": rows[0]["equations"],
        "best": best(rows),
        "naive": None if name == NONE else best([row for row in rows if row["attacker"] == NAIVE]),
    }


def _headline(audit: LeakageAudit, worst: dict[str, Any]) -> str:
    count, total = worst["victims_recovered"], worst["victims"]
    if count:
        return f"Images of {count} of {total} clients came out {_where(worst)}"
    bound = worst["bounds"][1]
    return (
        f"No image of {total} clients came out by what was tried; that allows up to {bound:.0%} all the same"
    )


def _where(row: dict[str, Any]) -> str:
    """Return a setting's defence in words."""
    if row["defence"] == NONE:
        return "without a defence"
    return f"under {row['defence']}{' naively' if row['attacker'] == NAIVE else ''}"


def _doubts(
    audit: LeakageAudit, settings: list[dict[str, Any]], baselines: dict[str, Any]
) -> list[dict[str, str]]:
    """Return why this audit cannot be trusted further."""
    doubts = []
    for row in settings:
        if row["defence"] != NONE:
            continue
        if row["share"] == 0:
            doubts.append(
                (
                    "control-failed",
                    f"Without any defence {row['method']} recovered nothing either, so its failures under a defence "
                    "say nothing of the defence. Give it more steps, or another network.",
                )
            )
        higher = [name for name, one in baselines.items() if one["median_psnr"] > row["median_psnr"]]
        if higher and row["share"] > 0:
            doubts.append(
                (
                    "below-baseline",
                    f"Without any defence {row['method']} has a lower median PSNR than the baseline {higher[0]}, "
                    "which saw no update.",
                )
            )
    doubts += [
        (
            "recognised",
            f"{row['method']} recovered {row['outcomes']['recovered']} of {row['images']} images {_where(row)}, but "
            f"the gallery names the right person of {row['identification']['rank1']['count']}. Count that with "
            "--identified.",
        )
        for row in settings
        if row["judged"] and _recognised(row)
    ]
    doubts += [
        (
            "baseline-counts",
            f"The baseline {name}, which saw no update, counts as recovered for {one['recovered']} of "
            f"{one['images']} images too: here success means little. Give --psnr and --ssim higher values.",
        )
        for name, one in baselines.items()
        if one["recovered"]
    ]
    if audit.accuracies and audit.accuracies[NONE] < LEARNED * audit.chance:
        doubts.append(
            (
                "nothing-learned",
                f"Training without a defence came to {audit.accuracies[NONE]:.1%}, where naming the commonest class "
                f"comes to {audit.chance:.1%}: the accuracies say nothing of the defences. Give it more --rounds.",
            )
        )
    count = audit.plan.clients.victims
    bound = clopper_pearson(0, count)[1]
    if bound > FIVE:
        doubts.append(
            (
                "few-victims",
                f"With {count} victims even no success at all allows a share of up to {bound:.0%}. It takes "
                f"{needed_victims(FIVE)} victims to come below {FIVE:.0%}.",
            )
        )
    if len(audit.plan.inversions) == 1:
        doubts.append(("one-method", f"Only one attack was tried, {audit.plan.inversions[0].name}."))
    if not baselines:
        doubts.append(
            ("no-baseline", "There were no public images, so nothing shows what a guess would reach.")
        )
    return [{"name": name, "says": says} for name, says in doubts]


def _recognised(row: dict[str, Any]) -> bool:
    """Say whether more people are recognised than images count as recovered, and more than by chance."""
    if row["identification"] is None:
        return False
    first = row["identification"]["rank1"]
    return bool(first["count"] > row["outcomes"]["recovered"] and first["bounds"][0] > first["chance"])


def _threats(audit: LeakageAudit) -> list[dict[str, Any]]:
    """Return in words what the attacker has, without a defence and under each."""
    threats = [{"defence": NONE, "says": threat_model(audit.victims[NONE][0].update, aware=True)}]
    for name, victims in audit.victims.items():
        if name != NONE:
            done = ", then ".join(treatments(victims[0].update))
            says = f"The values were {done}. Attacked knowing that, and as if nothing had been done."
            threats.append({"defence": name, "says": [says]})
    return threats


def _private(audit: LeakageAudit) -> torch.Tensor:
    images = [victim.images for victim in audit.victims[NONE]]
    return torch.cat([one for one in images if one is not None])


def _worst_first(audit: LeakageAudit) -> list[dict[str, Any]]:
    """Return the private images that came out best under a setting that counts, by their positions."""
    ratios = []
    for setting in audit.judged:
        victims = audit.results[setting]["victims"]
        ratios.append([image["psnr"] for victim in victims for image in victim["images"]])
    best = [max(each) for each in zip(*ratios, strict=True)]
    order = sorted(range(len(best)), key=lambda index: -best[index])[:ROWS]
    return [{"image": index, "psnr": best[index]} for index in order]


def _pictures(audit: LeakageAudit, *, hide: bool) -> dict[str, dict[str, Any]]:
    """Return for each method a picture: a row for each private image, a column for each setting."""
    private = (255 * _private(audit)).round().to(torch.uint8)
    index = [one["image"] for one in _worst_first(audit)]
    pictures = {}
    for method in (one.name for one in audit.plan.inversions):
        settings = [one for one in audit.results if one.method == method and one.attacker != LAYER]
        columns = [] if hide else [private[index]]
        columns += [audit.images[one][index] for one in settings]
        names = [] if hide else ["private"]
        names += [
            "no defence" if one.defence == NONE else f"{one.defence}, {one.attacker}" for one in settings
        ]
        pictures[method] = {"columns": names, "png": png(montage(list(zip(*columns, strict=True))))}
    return pictures
