"""How much came out: similarity after matching, outcomes by thresholds set before, bounds, baselines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from privet.errors import UsageError
from privet.images.similarity import WINDOW
from privet.leakage.base import Reconstruction
from privet.leakage.problem import FAILED

EXACT = 100.0  # dB, the most that is told apart
UNMATCHED = 0.1  # a gradient that leaves more than this share unexplained was not found

OUTCOMES = ("recovered", "label only", "underdetermined", "attack failed")


@dataclass(frozen=True, kw_only=True)
class Success:
    """What counts as recovered, fixed before the attack: any of these is enough.

    Attributes:
        psnr: in dB, at least; above 0.
        ssim: at least; above 0, and beyond 1 it never counts.
        identified: whether it is enough that a gallery names the right person first (identify.py).
    """

    psnr: float = 20.0
    ssim: float = 0.6
    identified: bool = False

    def __post_init__(self) -> None:
        for name, least in (("psnr", self.psnr), ("ssim", self.ssim)):
            if not 0 < least < math.inf:
                raise UsageError(
                    f"Expected {name} as a finite number above 0, got {least}: at 0 or less any image counts as "
                    "recovered. What no image reaches leaves it out."
                )

    def met(self, psnr: float, ssim: float | None, rank: int | None = None) -> bool:
        """Say whether an image as similar as this counts, whose person a gallery names in this place."""
        alike = psnr >= self.psnr or (ssim is not None and ssim >= self.ssim)
        return alike or (self.identified and rank == 1)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came out for one private image.

    Attributes:
        outcome: "recovered"; "label only" (the label came out, the image did not); "underdetermined" (neither, and
            fewer numbers were sent than looked for); "attack failed" (neither, for the reason given).
        psnr: of the image matched to it, in dB.
        ssim: likewise; None for images below 11 px.
        label: whether its label came out; None if the attacker was told.
        reason: why the attack failed, else "".
        rank: of its person in a gallery, from 1; None without a gallery.
    """

    outcome: str
    psnr: float
    ssim: float | None
    label: bool | None
    reason: str
    rank: int | None = None


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of images in [0, 1], (images, channels, height, width), in dB."""
    error = (one.double() - other.double()).square().flatten(1).mean(1)
    return -10 * error.clamp_min(10 ** (-EXACT / 10)).log10()


def ssim(one: Tensor, other: Tensor) -> list[float | None]:
    """Return each pair's structural similarity (Wang et al. 2004, Gaussian window)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(one.shape[2:]) < WINDOW:
        return [None] * len(one)
    found = structural_similarity_index_measure(
        one.double(), other.double(), data_range=1.0, reduction="none"
    )
    return [float(value) for value in found.reshape(-1)]


def match(found: Tensor, private: Tensor) -> Tensor:
    """Return which of the found images belongs to each private one: the least squared error in all."""
    cost = torch.cdist(private.double().flatten(1), found.double().flatten(1)).square()
    return torch.as_tensor(linear_sum_assignment(cost.numpy())[1])


def matched(reconstruction: Reconstruction, private: Tensor) -> Tensor:
    """Return the images that were found, in colour and in the order of the private ones."""
    images = reconstruction.images.expand(-1, private.shape[1], -1, -1)
    return images[match(images, private)]


def judge(
    reconstruction: Reconstruction,
    private: Tensor,
    labels: Sequence[int],
    success: Success,
    ranks: Sequence[int | None] | None = None,
    *,
    told: bool = False,
) -> list[Found]:
    """Compare a reconstruction with the truth, which the attack never saw.

    Args:
        reconstruction: of one update.
        private: its images in [0, 1], (images, channels, height, width).
        labels: theirs.
        success: the thresholds.
        ranks: places that a gallery gave to their people, or None without a gallery.
        told: whether the attacker was given the labels: then they are none that came out.
    """
    images = matched(reconstruction, private)
    left = Counter(reconstruction.labels.tolist())
    founds = []
    for ratio, similarity, label, rank in zip(
        psnr(images, private).tolist(),
        ssim(images, private),
        labels,
        ranks or [None] * len(labels),
        strict=True,
    ):
        right = left[label] > 0
        left[label] -= right
        came_out = None if told else right
        recovered = success.met(ratio, similarity, rank)
        outcome, reason = _outcome(reconstruction, recovered=recovered, label=bool(came_out))
        founds.append(
            Found(outcome=outcome, psnr=ratio, ssim=similarity, label=came_out, reason=reason, rank=rank)
        )
    return founds


def _outcome(reconstruction: Reconstruction, *, recovered: bool, label: bool) -> tuple[str, str]:
    if reconstruction.failed:
        return "attack failed", reconstruction.end.removeprefix(FAILED)
    if recovered:
        return "recovered", ""
    if label:
        return "label only", ""
    if reconstruction.equations < reconstruction.unknowns:
        return "underdetermined", ""
    unexplained = max(reconstruction.distance - reconstruction.floor, 0.0)
    if unexplained > UNMATCHED:
        return "attack failed", f"{unexplained:.0%} of the gradient was left unexplained"
    return "attack failed", "the gradient was found, but with another image"


def baselines(private: Tensor, public: Tensor) -> dict[str, Tensor]:
    """Return what somebody would draw who saw no update, one image for each private one.

    Args:
        private: images in [0, 1], (images, channels, height, width).
        public: images of the same kind that are not private.

    Returns:
        "grey"; "mean" (of the public images); and "nearest": for each private image the most similar
        public one, which only somebody who knows the private one could choose.
    """
    nearest = torch.cdist(private.flatten(1), public.flatten(1)).argmin(1)
    return {
        "grey": torch.full_like(private, 0.5),
        "mean": public.mean(0, keepdim=True).expand_as(private),
        "nearest": public[nearest],
    }
