"""Whose face it is: ranks, verification and controls against slow counts, and what a gallery refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.leakage.victims import blocks, victims
from torch import Tensor

from privet.cli import main
from privet.errors import InputError, UsageError
from privet.images import ImageSet
from privet.leakage import IG
from privet.leakage.attack import attack
from privet.leakage.embedder import Embedder
from privet.leakage.identify import Gallery, Identified, controls, identify
from privet.leakage.measure import Success, judge, matched
from privet.leakage.results import report
from privet.leakage.write import write_attack
from privet.learning import Runtime
from privet.models import SavedModel, create_model, save_model
from privet.seeds import generator

Make = Callable[..., Path]


def faces(people: int, each: int, *, side: int = 16) -> ImageSet:
    """Return photographs of people: a pattern each, under noise."""
    drawn = generator(0, "faces")
    patterns = torch.randint(40, 216, (people, 3, side, side), generator=drawn)
    noise = torch.randint(-20, 21, (people * each, 3, side, side), generator=drawn)
    labels = torch.arange(people).repeat_interleave(each)
    pixels = (patterns[labels] + noise).to(torch.uint8)
    names = [f"p{label}/{index:03d}" for index, label in enumerate(labels.tolist())]
    return ImageSet.from_arrays(pixels, labels, class_names=[f"p{i}" for i in range(people)], names=names)


def pixels_of(images: ImageSet) -> Tensor:
    return images.pixels.float() / 255


def gallery_of(images: ImageSet) -> Gallery:
    return Gallery(photographs=images, embedder=Embedder.pixels())


def test_scores_against_a_slow_count() -> None:
    """The highest cosine with any photograph of a person, after the mean vector is taken away."""
    known, probes = faces(4, 3), pixels_of(faces(4, 4))[::4]
    found = identify(probes, ["p0", "p1", "p2", "p3"], gallery_of(known))
    vectors = [photograph.mean(0).flatten().double() for photograph in pixels_of(known)]
    mean = torch.stack(vectors).mean(0)
    for i, probe in enumerate(probes):
        for person in range(4):
            cosines = [
                float(F.cosine_similarity(probe.mean(0).flatten().double() - mean, vector - mean, dim=0))
                for vector, label in zip(vectors, known.labels.tolist(), strict=True)
                if label == person
            ]
            assert float(found.scores[i, person]) == pytest.approx(max(cosines), abs=1e-6)
    assert found.ranks == (1, 1, 1, 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranks_and_verification_against_slow_counts(data: st.DataObject) -> None:
    count, people = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 30))
    values = data.draw(st.lists(st.integers(0, 9), min_size=count * people, max_size=count * people))
    own = data.draw(st.lists(st.integers(0, people - 1), min_size=count, max_size=count))
    scores = torch.tensor(values, dtype=torch.float64).view(count, people) / 9
    found = Identified(scores=scores, own=torch.tensor(own))
    genuine = [float(scores[i, person]) for i, person in enumerate(own)]
    impostor = [float(scores[i, j]) for i in range(count) for j in range(people) if j != own[i]]
    assert list(found.ranks) == [
        1 + sum(float(scores[i, j]) >= genuine[i] for j in range(people) if j != own[i]) for i in range(count)
    ]
    wins = [(one > other) + 0.5 * (one == other) for one in genuine for other in impostor]
    assert found.area == pytest.approx(sum(wins) / len(wins))
    accepted = max(
        sum(one > threshold for one in genuine)
        for threshold in [*impostor, 2.0]
        if sum(other > threshold for other in impostor) <= 0.01 * len(impostor)
    )
    assert found.accepted == pytest.approx(accepted / count)
    total = found.summary()
    assert total["rank5"]["count"] == sum(rank <= 5 for rank in found.ranks) >= total["rank1"]["count"]
    assert total["rank1"]["chance"] == pytest.approx(1 / people)
    low, high = total["rank1"]["bounds"]
    assert low <= total["rank1"]["share"] <= high


def test_no_more_than_one_in_a_hundred_others_are_accepted() -> None:
    """Of 200 scores with others, 0 to 199, two may be accepted: those above 197."""
    for genuine, accepted in ((197.5, 1.0), (197.0, 0.0), (196.5, 0.0)):
        scores = torch.arange(200, dtype=torch.float64).view(2, 100)
        own = torch.full((2, 1), genuine, dtype=torch.float64)
        found = Identified(scores=torch.cat([own, scores], 1), own=torch.tensor([0, 0]))
        assert found.accepted == accepted


def test_an_image_of_nobody_comes_last() -> None:
    known, probes = faces(4, 3), pixels_of(faces(4, 4))[::4]
    found = identify(probes, known.class_names, gallery_of(known), failed=[False, True, False, False])
    assert found.ranks == (1, 4, 1, 1)
    flat = Gallery(photographs=known, embedder=Embedder(embed=lambda images: images.new_ones(len(images), 2)))
    assert identify(probes, known.class_names, flat).ranks == (4, 4, 4, 4)  # who ties comes last


def test_controls() -> None:
    known, probes = faces(6, 3), pixels_of(faces(6, 4))[::4]
    found = controls(probes, known.class_names, gallery_of(known))
    assert list(found) == ["clean", "mean", "grey"]
    assert found["clean"].summary()["rank1"]["count"] == 6
    for name in ("mean", "grey"):
        assert found[name].summary()["rank1"]["count"] <= 1  # always the same person, or nobody


def test_photographs_that_are_private_leave_the_gallery() -> None:
    photographs = faces(3, 4)
    private = pixels_of(photographs)[::4]
    kept = gallery_of(photographs).without(private)
    assert len(kept.photographs) == 9
    assert kept.record()["photographs"] == 9
    with pytest.raises(InputError, match="open both at one size"):
        gallery_of(photographs).without(private[:, :, :8])
    alone = gallery_of(photographs.subset([0, 4, 5, 8, 9])).without(private)
    with pytest.raises(InputError, match="no photograph of p0, other than the private ones"):
        identify(private, photographs.class_names, alone)


def test_who_taught_the_embedder_is_not_in_the_gallery(runtime: Runtime, tmp_path: Path) -> None:
    model = create_model("resnet8-w4", classes=2, size=(8, 8))
    for names, fits in ((("a", "b"), True), (("a", "p2"), False)):
        path = tmp_path / "learner.safetensors"
        save_model(path, model, SavedModel(architecture="resnet8-w4", class_names=names, size=(8, 8)))
        embedder = Embedder.load(path, runtime)
        if fits:
            vectors = embedder.embed(pixels_of(faces(3, 2)))  # resized from 16 to 8 px
            assert vectors.shape == (6, 16)
            assert Gallery(photographs=faces(3, 2), embedder=embedder).record()["embedder"]["people"] == 2
        else:
            with pytest.raises(UsageError, match="trained on 1 people of the gallery, 'p2' for one"):
                Gallery(photographs=faces(3, 2), embedder=embedder)


def test_a_gallery_of_one_and_an_embedder_that_returns_rubbish() -> None:
    with pytest.raises(InputError, match="at least 2 people, got 1"):
        gallery_of(faces(1, 3))
    for rubbish in (lambda x: x, lambda x: x.flatten(1)[:1], lambda x: x.flatten(1) * torch.nan):
        broken = Gallery(photographs=faces(3, 2), embedder=Embedder(embed=rubbish))
        with pytest.raises(UsageError, match="Expected the embedder to return finite vectors"):
            identify(torch.rand(1, 3, 16, 16), ["p0"], broken)


def test_to_be_identified_can_count(runtime: Runtime) -> None:
    found = victims(2)
    results = IG(steps=1).invert([victim.update for victim in found], runtime=runtime)
    assert found[0].images is not None
    for success, rank, outcome in (
        (Success(identified=True), 1, "recovered"),
        (Success(identified=True), 2, "label only"),
        (Success(), 1, "label only"),
    ):
        judged = judge(results[0], found[0].images, found[0].labels, success, [rank])[0]
        assert (judged.outcome, judged.rank) == (outcome, rank)


def test_an_attack_with_a_gallery(runtime: Runtime, tmp_path: Path) -> None:
    """Each row of the report has its own person's rank, also where batches hold several images."""
    found = [
        replace(one, people=tuple(f"p{i}" for i in range(2 * k, 2 * k + 2)))
        for k, one in enumerate(victims(2, batch_size=2))
    ]
    private = torch.cat([one.images for one in found if one.images is not None])
    noisy = (private + 0.05 * torch.randn(private.shape, generator=generator(0, "x"))).clamp(0, 1)
    pixels = (255 * torch.cat([noisy, private])).round().byte()
    photographs = ImageSet.from_arrays(pixels, torch.arange(8) % 4, class_names=[f"p{i}" for i in range(4)])
    gallery = gallery_of(photographs).without(private)
    assert len(gallery.photographs) == 4
    runs = attack(found, IG(steps=10), runtime=runtime, gallery=gallery)
    told = report(found, runs, Success(), gallery=gallery)
    assert told["identification"]["clean"]["rank1"]["count"] == 4
    ranks = [image["rank"] for victim in told["attacks"][0]["victims"] for image in victim["images"]]
    one_by_one = []
    for victim, result in zip(found, runs[0].reconstructions, strict=True):
        assert victim.images is not None
        for image, person in zip(matched(result, victim.images), victim.people, strict=True):
            one_by_one += identify(image[None], [person], gallery).ranks
    assert ranks == one_by_one
    assert told["attacks"][0]["identification"]["rank1"]["count"] == ranks.count(1)
    with pytest.raises(UsageError, match="takes a gallery"):
        write_attack(
            tmp_path, found, IG(steps=1), runtime=runtime, source={}, success=Success(identified=True)
        )


def test_an_attack_that_failed_identifies_nobody(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if what it left lying there looks like the person."""
    found = [replace(one, people=(f"p{k}",)) for k, one in enumerate(victims(2))]
    photographs = ImageSet.from_arrays(
        torch.cat([(255 * one.images).round().byte() for one in found if one.images is not None]),
        torch.tensor([0, 1]),
        class_names=["p0", "p1"],
    )
    results = IG(steps=1).invert([one.update for one in found], runtime=runtime)
    assert found[0].images is not None
    broken = replace(results[0], images=found[0].images, end="failed: not finite")
    monkeypatch.setattr(IG, "invert", lambda self, updates, **settings: [broken, results[1]])
    run = attack(found, IG(steps=1), runtime=runtime, gallery=gallery_of(photographs))[0]
    assert run.found[0][0].rank == 2
    assert run.found[0][0].outcome == "attack failed"


def test_the_command(tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]) -> None:
    people = faces(4, 5)
    source = make_folder(people.subset([0, 5, 10, 15]), "private")
    gallery = make_folder(people, "gallery")
    given = [
        "invert",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--architecture",
        "lenet-strided-sigmoid-w4",
    ]
    more = ["--method", "ig", "--set", "steps=40", "--device", "cpu", "--victims", "4", "--identified"]
    assert main([*given, *more, "--gallery", str(gallery)]) == 0
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["gallery"]["photographs"] == 16  # without the private ones
    assert told["success"]["identified"] is True
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "control clean: of 4 images the right person 4 at rank 1 (95 % bounds 40% to 100%, chance 25%)"
        in printed
    )
    other = make_folder(blocks(6), "strangers")
    assert (
        main([*given[:3], str(tmp_path / "x"), *given[4:], *more, "--gallery", str(other)])
        == InputError.exit_code
    )
    assert "no photograph of" in " ".join(capsys.readouterr().err.split())
