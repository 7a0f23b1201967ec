"""What attacks came to, as JSON values."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from privet.files import json_line
from privet.leakage.attack import Attack
from privet.leakage.base import Reconstruction
from privet.leakage.identify import Gallery, controls
from privet.leakage.measure import OUTCOMES, Found, Success, baselines, psnr, ssim
from privet.leakage.victims import Victim, threat_model
from privet.learning.confidence import clopper_pearson
from privet.learning.update_files import contents


def summary(found: Sequence[Sequence[Found]]) -> dict[str, Any]:
    """Return what attacks on several victims came to; a victim counts if any of its images came out.

    How many labels came out is None if the attacker was told some.
    """
    images = [one for victim in found for one in victim]
    if not images:
        return {}
    hit = sum(any(one.outcome == "recovered" for one in victim) for victim in found)
    ssims = [one.ssim for one in images if one.ssim is not None]
    outcomes = Counter(one.outcome for one in images)
    labels = [one.label for one in images if one.label is not None]
    return {
        "victims": len(found),
        "victims_recovered": hit,
        "share": hit / len(found),
        "bounds": clopper_pearson(hit, len(found)),
        "images": len(images),
        "outcomes": {outcome: outcomes[outcome] for outcome in OUTCOMES},
        "labels_right": sum(labels) if len(labels) == len(images) else None,
        "median_psnr": statistics.median(one.psnr for one in images),
        "best_psnr": max(one.psnr for one in images),
        "median_ssim": statistics.median(ssims) if ssims else None,
    }


def report(
    victims: Sequence[Victim],
    attacks: Sequence[Attack],
    success: Success,
    public: Tensor | None = None,
    gallery: Gallery | None = None,
) -> dict[str, Any]:
    """Return everything that was found out, as JSON values.

    Args:
        victims: who was attacked.
        attacks: how.
        success: the thresholds.
        public: images of the same kind that are not private, in [0, 1], for the baselines.
        gallery: of the people whom the images show, as it was attacked with.
    """
    known = [victim.images for victim in victims if victim.images is not None]
    return {
        "threat_model": {
            "aware" if one.aware else "naive": threat_model(victims[0].update, aware=one.aware)
            for one in attacks
        },
        "success": asdict(success),
        "attacks": [
            {
                "aware": one.aware,
                "seconds": round(one.seconds, 2),
                "summary": summary(one.found),
                "identification": one.identified and one.identified.summary(),
                "victims": [
                    victim_row(result, found)
                    for result, found in zip(one.reconstructions, one.found, strict=True)
                ],
            }
            for one in attacks
        ],
        "baselines": baseline_rows(torch.cat(known), public, success) if known and public is not None else {},
        "identification": control_rows(victims, gallery) if known and gallery is not None else {},
    }


def victim_row(result: Reconstruction, found: Sequence[Found]) -> dict[str, Any]:
    """Return what came of one victim, as JSON values."""
    finite = [None if abs(value) == torch.inf else value for value in (result.distance, *result.distances)]
    return {
        "end": result.end,
        "steps": result.steps,
        "distance": finite[0],
        "distances": finite[1:],
        "noise_floor": result.floor,
        "equations": result.equations,
        "unknowns": result.unknowns,
        "labels": result.labels.tolist(),
        "images": [asdict(one) for one in found],
        "history": [list(point) for point in result.history],
    }


def control_rows(victims: Sequence[Victim], gallery: Gallery) -> dict[str, Any]:
    """Return what the gallery makes of the private images themselves, and of images that show nobody."""
    known = [victim for victim in victims if victim.images is not None]
    private = torch.cat([victim.images for victim in known if victim.images is not None])
    people = [person for victim in known for person in victim.people]
    return {name: one.summary() for name, one in controls(private, people, gallery).items()}


def baseline_rows(private: Tensor, public: Tensor, success: Success) -> dict[str, Any]:
    """Return how many private images baselines would count as recovered, as JSON values."""
    rows = {}
    for name, drawn in baselines(private, public).items():
        ratios = psnr(drawn, private).tolist()
        similar = ssim(drawn, private)
        hits = sum(map(success.met, ratios, similar))
        rows[name] = {"median_psnr": statistics.median(ratios), "recovered": hits, "images": len(ratios)}
    return rows


def digest(victims: Sequence[Victim], public: Tensor | None) -> str:
    """Return a hash of everything that is known of the victims, and of the public images."""
    hashed = hashlib.sha256()
    for victim in victims:
        about = {**contents(victim.update)[0], "truth": victim.labels, "people": victim.people}
        hashed.update(json_line(about))
    for images in (*(victim.images for victim in victims), public):
        hashed.update(b"" if images is None else images.contiguous().numpy().tobytes())
    return hashed.hexdigest()
