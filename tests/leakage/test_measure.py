"""Similarity, matching, outcomes, bounds and labels, against known answers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.leakage.victims import victims
from torch import Tensor

from privet.errors import UsageError
from privet.leakage import Reconstruction
from privet.leakage.client import Client, network_of
from privet.leakage.defences import create_defence
from privet.leakage.labels import (
    Head,
    by_counts,
    by_rows,
    by_sign,
    by_smallest,
    count_again,
    infer_labels,
    labels_of,
    unclipped,
)
from privet.leakage.measure import Found, Success, baselines, judge, match, psnr, ssim
from privet.leakage.results import summary
from privet.leakage.victims import Victim
from privet.learning import Update


def test_psnr_of_known_errors() -> None:
    one = torch.full((3, 3, 12, 12), 0.5)
    other = one.clone()
    other[0] += 0.1
    other[1, :, :6] += 1 / 255
    found = psnr(other, one).tolist()
    assert found[0] == pytest.approx(20, abs=1e-5)
    assert found[1] == pytest.approx(20 * math.log10(255) + 10 * math.log10(2), abs=1e-4)
    assert found[2] == 100


def test_ssim_of_known_pairs() -> None:
    torch.manual_seed(0)
    one = torch.rand(2, 3, 32, 32)
    same, inverted = ssim(one, torch.stack([one[0], 1 - one[1]]))
    assert same == pytest.approx(1)
    assert inverted is not None and inverted < -0.9
    # Two constant images have no structure: what is left is the comparison of their means.
    flat = [torch.full((1, 3, 32, 32), value) for value in (0.25, 0.75)]
    expected = (2 * 0.25 * 0.75 + 0.01**2) / (0.25**2 + 0.75**2 + 0.01**2)
    assert ssim(*flat)[0] == pytest.approx(expected, rel=1e-4)
    assert ssim(one[:, :, :10], one[:, :, :10]) == [None, None]


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(5)))
def test_matching_undoes_any_order(order: list[int]) -> None:
    torch.manual_seed(0)
    private = torch.rand(5, 3, 8, 8)
    found = private[order] + 0.05 * torch.randn(5, 3, 8, 8)
    assert [order[i] for i in match(found, private).tolist()] == list(range(5))


def result(images: torch.Tensor, labels: list[int], **facts: Any) -> Reconstruction:
    known: dict[str, Any] = {
        "distance": 0.01,
        "distances": (0.01,),
        "floor": 0.0,
        "end": "steps",
        "steps": 1,
        "history": (),
        "equations": 100,
        "unknowns": 100,
    }
    return Reconstruction(images=images, labels=torch.tensor(labels), **{**known, **facts})


def test_outcomes() -> None:
    torch.manual_seed(0)
    private = torch.rand(3, 3, 16, 16)
    success = Success(psnr=20, ssim=0.9)
    noisy = (private + 0.01).flip(0)
    assert [one.outcome for one in judge(result(noisy, [2, 1, 0]), private, [0, 1, 2], success)] == [
        "recovered"
    ] * 3
    other = torch.rand(3, 3, 16, 16)
    founds = judge(result(other, [1, 1, 2]), private, [1, 1, 1], success)
    assert [(one.outcome, one.label) for one in founds] == [
        ("label only", True),
        ("label only", True),
        ("attack failed", False),
    ]
    for facts, outcome, words in (
        ({"equations": 99}, "underdetermined", ""),
        ({"distance": 0.5}, "attack failed", "50% of the gradient was left unexplained"),
        ({"distance": 0.5, "floor": 0.45}, "attack failed", "found, but with another image"),
        ({"end": "failed: not finite at step 3"}, "attack failed", "not finite at step 3"),
    ):
        found = judge(result(other, [0, 0, 0], **facts), private, [1, 1, 1], success)[0]
        assert (found.outcome, words in found.reason) == (outcome, True)
    # What is not finite never counts, whatever it looks like.
    assert (
        judge(result(noisy, [0, 1, 2], end="failed: x"), private, [0, 1, 2], success)[0].outcome
        == "attack failed"
    )


def test_labels_that_were_told_did_not_come_out() -> None:
    """So an attack that knew them, and found nothing, failed."""
    private, other = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    founds = judge(result(other, [0, 1]), private, [0, 1], Success(), told=True)
    assert [(one.outcome, one.label) for one in founds] == [("attack failed", None)] * 2
    assert summary([founds])["labels_right"] is None
    founds = judge(result(other, [0, 1]), private, [0, 1], Success())
    assert [(one.outcome, one.label) for one in founds] == [("label only", True)] * 2
    assert summary([founds])["labels_right"] == 2


def test_either_threshold_is_enough() -> None:
    private = torch.rand(1, 3, 16, 16)
    darker = private * 0.5
    for success, outcome in (
        (Success(psnr=90, ssim=0.5), "recovered"),
        (Success(psnr=90, ssim=0.999), "label only"),
    ):
        assert judge(result(darker, [0]), private, [0], success)[0].outcome == outcome


@pytest.mark.parametrize("least", [-1.0, 0.0, math.nan, math.inf])
def test_thresholds_that_say_nothing(least: float) -> None:
    for name in ("psnr", "ssim"):
        with pytest.raises(UsageError, match=f"Expected {name} as a finite number above 0, got {least}"):
            Success(**{name: least})


def test_a_victim_counts_if_any_of_its_images_came_out() -> None:
    out = Found(outcome="recovered", psnr=30.0, ssim=0.9, label=True, reason="")
    not_out = replace(out, outcome="label only", psnr=10.0)
    total = summary([[out, not_out], [not_out, not_out]])
    assert (total["victims_recovered"], total["victims"], total["images"]) == (1, 2, 4)
    assert total["outcomes"]["label only"] == 3
    assert total["median_psnr"] == 10
    assert summary([]) == {}


def test_baselines() -> None:
    private, public = torch.rand(2, 3, 8, 8), torch.rand(6, 3, 8, 8)
    public[4] = private[1]
    drawn = baselines(private, public)
    assert torch.equal(drawn["nearest"][1], private[1])
    assert torch.equal(drawn["mean"][0], public.mean(0))
    assert float(drawn["grey"].unique()) == 0.5


@pytest.mark.parametrize("architecture", ["lenet-sigmoid", "lenet-strided-sigmoid-w4", "lenet", "resnet8-w4"])
def test_one_label_by_its_sign(architecture: str) -> None:
    for victim in victims(6, architecture=architecture):
        assert tuple(infer_labels(victim.update, network_of(victim.update)).tolist()) == victim.labels
        head = Head.of(victim.update)
        if architecture == "lenet-sigmoid":  # features of one sign
            assert by_sign(replace(head, bias=None)) == victim.labels[0]
            assert by_smallest(head, 1).tolist() == list(victim.labels)


@pytest.mark.parametrize("without", [(), ("fc.bias",)], ids=["bias", "rows alone"])
def test_many_labels_by_their_counts(without: tuple[str, ...]) -> None:
    """Several of a class, and classes that are absent."""
    for victim in victims(1, architecture="lenet-strided-sigmoid-w4", batch_size=8):
        values = {name: value for name, value in victim.update.values.items() if name not in without}
        update = replace(victim.update, values=values)
        found = infer_labels(update, network_of(update))
        assert found.tolist() == sorted(victim.labels)


def told(found: list[Victim]) -> tuple[Client, Tensor, Tensor, Tensor]:
    """Return the client of these victims, the last layer's bias that each sent, their images, and their labels."""
    client = Client.of(
        [one.update for one in found],
        network_of(found[0].update),
        device=torch.device("cpu"),
        dtype=torch.float64,
    )
    biases = [Head.of(one.update).bias for one in found]
    bias = torch.stack([one.double() for one in biases if one is not None])
    x = torch.stack([one.images.double() for one in found if one.images is not None])
    truth = torch.tensor([one.labels for one in found])
    return client, bias, x, truth


def test_labels_are_counted_again_from_the_images() -> None:
    """With the true images the counts are exact; who may keep a label keeps it."""
    found = victims(2, batch_size=4, architecture="lenet-strided-sigmoid")
    client, bias, x, truth = told(found)
    clipped, noise = torch.tensor([False, False]), torch.zeros(2)
    assert torch.equal(count_again(truth, bias, client, x, clipped=clipped, noise=noise), truth)
    wrong = truth.clone()
    wrong[0, 2] = (truth[0, 2] + 1) % 3
    again = count_again(wrong, bias, client, x, clipped=clipped, noise=noise)
    assert again.sort(1).values.tolist() == truth.sort(1).values.tolist()
    assert int((again[0] != wrong[0]).sum()) == 1
    assert torch.equal(again[1], truth[1])


@pytest.mark.parametrize("without", [(), ("fc.bias",)], ids=["bias", "rows alone"])
@pytest.mark.parametrize("defence", ["clip-1000", "clip-0.1", "clip-0.001"])
def test_labels_of_clipped_batches(defence: str, without: tuple[str, ...]) -> None:
    """They are counted as if nothing had been clipped, unless the attack does not know of it."""
    found = victims(6, batch_size=2)
    right = {True: 0, False: 0}
    for victim in found:
        values = {name: value for name, value in victim.update.values.items() if name not in without}
        update = create_defence(defence).apply(replace(victim.update, values=values))
        for aware in right:
            labels = infer_labels(update, network_of(update), aware=aware)
            right[aware] += labels.tolist() == sorted(victim.labels)
    assert right[True] == 6
    assert (right[False] == 6) == (defence == "clip-1000")


def test_noise_is_not_taken_for_a_factor() -> None:
    """A rare class whose db is all noise would make the factor far too large."""
    probabilities = torch.tensor([0.001, 0.2, 0.2, 0.599])
    slopes = 0.1 * (probabilities - torch.tensor([0.0, 0.5, 0.5, 0.0])) + torch.tensor([0.004, 0.0, 0.0, 0.0])
    for noise, right in ((0.003, True), (0.0, False)):
        found = unclipped(slopes, probabilities, 2, torch.tensor([noise]))
        assert (labels_of(2 * (probabilities - found), 2).tolist() == [1, 2]) == right


def test_labels_of_clipped_batches_are_counted_again() -> None:
    found = victims(3, batch_size=2, defence="clip-0.01")
    client, bias, x, truth = told(found)
    clipped, noise = torch.tensor([True, True, False]), torch.zeros(3)  # the last attack does not know
    wrong = (truth + torch.tensor([0, 1])) % 3
    again = count_again(wrong, bias, client, x, clipped=clipped, noise=noise).sort(1).values
    assert torch.equal(again[:2], truth[:2].sort(1).values)
    assert not torch.equal(again[2], truth[2].sort().values)


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-4, 1.0), labels=st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_the_factor_of_a_clipped_batch_is_exact(scale: float, labels: list[int]) -> None:
    """Where a class does not occur, here the last, and the mean probabilities are known."""
    logits = torch.randn(len(labels), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slopes = (logits.softmax(1) - F.one_hot(torch.tensor(labels), 6)).mean(0)
    found = unclipped(scale * slopes, logits.softmax(1).mean(0), len(labels), torch.zeros(1))
    torch.testing.assert_close(found, slopes)


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=2, max_size=6))
def test_counts_from_exact_expectations(counts: list[int]) -> None:
    images = sum(counts)
    if images == 0:
        return
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    torch.manual_seed(images)
    logits, features = torch.randn(images, len(counts)), torch.ones(images, 5) * 0.5
    error = (logits.softmax(1) - F.one_hot(labels, len(counts))) / images
    head = Head(weight=error.T @ features, bias=error.sum(0))
    probabilities = logits.softmax(1).mean(0)
    assert by_counts(head, images, probabilities).tolist() == labels.tolist()
    assert by_rows(head, images, probabilities, 2.5).tolist() == labels.tolist()
    assert labels_of(torch.tensor(counts) + 0.3, images).tolist() == labels.tolist() or images > 3


def test_labels_that_nobody_can_infer() -> None:
    update: Update = victims(1)[0].update
    body = {name: value for name, value in update.values.items() if not name.startswith("fc")}
    with pytest.raises(UsageError, match='use labels="joint"'):
        infer_labels(replace(update, values=body), network_of(update))
    with pytest.raises(UsageError, match="cannot have different labels"):
        by_smallest(Head(weight=torch.zeros(3, 4), bias=None), 4)
