"""What every recovery must pass. Adding a recovery is adding a row to TABLE."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import blobs, stop_after
from tests.images.test_write import tree

from privet.errors import UsageError
from privet.images import ImageSet, open_images
from privet.learning import Job, Learner, Runtime
from privet.learning import chunks as module
from privet.learning.chunks import Change
from privet.protection import LSP, OPS, publish
from privet.recovery import (
    COIN,
    DVAE,
    JPEG,
    AdversarialTraining,
    Auto,
    BitDepth,
    Blur,
    Chain,
    Grayscale,
    Nothing,
    Projection,
    Recovery,
    UEraser,
    Versions,
    create_recovery,
    restore,
)
from privet.recovery.base import ImageRecovery

Make = Callable[..., Path]

TABLE: dict[str, Recovery] = {
    "none": Nothing(),
    "jpeg-10": JPEG(10),
    "jpeg-75": JPEG(75),
    "grayscale": Grayscale(),
    "bitdepth-2": BitDepth(2),
    "blur-0.5": Blur(0.5),
    "projection": Projection(),
    "coin": COIN(),
    "dvae-4": DVAE(width=4),
    "auto": Auto(
        (
            Versions((JPEG(10), Chain((JPEG(10), Grayscale())))),
            JPEG(10),
            Grayscale(),
            Projection(),
            COIN(),
            Nothing(),
        )
    ),
    "versions": Versions((JPEG(10), Chain((JPEG(10), Grayscale())))),
    "adversarial-4": AdversarialTraining(4.0),
    "adversarial-0.5": AdversarialTraining(0.5),
    "ueraser": UEraser(),
    "ueraser-lite": UEraser(draws=1),
    "ueraser-max": UEraser(share=1.0),
    "projection+jpeg-75": Chain((Projection(), JPEG(75))),
    "coin+grayscale+adversarial-2": Chain((COIN(), Grayscale(), AdversarialTraining(2.0))),
}
# Those that look at each image alone, and draw nothing at random.
ALONE = ("none", "jpeg", "grayscale", "bitdepth", "blur", "adversarial", "ueraser")
CHANGES = {name: recovery for name, recovery in TABLE.items() if not recovery.trains and name != "none"}


def recovered(recovery: Recovery, images: ImageSet, runtime: Runtime) -> torch.Tensor:
    return recovery.recover(images, Job(runtime=runtime)).pixels


@pytest.mark.parametrize("name", TABLE)
def test_every_recovery(name: str, runtime: Runtime) -> None:
    recovery = create_recovery(name)
    assert recovery.record() == TABLE[name].record()
    assert recovery.name == name
    images = blobs(6, size=(16, 20))
    before = images.pixels.clone()
    job = Job(runtime=runtime)
    first, second = recovery.recover(images, job), recovery.recover(images, Job(runtime=runtime))
    assert torch.equal(images.pixels, before)
    assert torch.equal(first.pixels, second.pixels)
    assert first.pixels.dtype == torch.uint8
    copies = len(first) // len(images)
    assert (copies > 1) == (name == "versions") or name == "auto"  # which may choose versions
    assert (first.size, len(set(first.names))) == (images.size, copies * len(images))
    assert torch.equal(first.labels, images.labels.repeat(copies))
    if copies == 1:
        assert first.names == images.names
    if name.split("-")[0] in ALONE:
        one = recovered(recovery, images.subset([4]), runtime)
        assert torch.equal(one[0], first.pixels[4])  # whatever else is in the set
    assert recovery.present(images, job.facts).size == images.size


@pytest.mark.parametrize("name", CHANGES)
class TestThoseThatChangeImages:
    def test_interrupted_anywhere_it_ends_with_the_same_bytes(
        self, name: str, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "CHUNK", 4)
        images = blobs(10, size=(16, 16))
        restore(images, CHANGES[name], tmp_path / "whole", runtime=runtime, checkpoint_seconds=0)
        expected = tree(tmp_path / "whole")
        reports = 1
        while True:
            try:
                restore(
                    images,
                    CHANGES[name],
                    tmp_path / "parts",
                    runtime=runtime,
                    checkpoint_seconds=0,
                    progress=stop_after(reports),
                )
                break
            except KeyboardInterrupt:
                reports += 1
        assert reports > 4
        assert tree(tmp_path / "parts") == expected

    def test_files_keep_names_size_and_kind(
        self, name: str, runtime: Runtime, tmp_path: Path, make_folder: Make
    ) -> None:
        clean = make_folder(blobs(4, size=(20, 30), grey=True))
        images = open_images(clean, size=16)
        result = restore(images, CHANGES[name], tmp_path / "out", runtime=runtime)
        names = CHANGES[name].recover(images, Job(runtime=runtime)).names
        assert len(names) >= len(images)
        assert result.written.ok == len(names)
        for one in names:
            with Image.open(tmp_path / "out" / f"{one}.png") as after:
                assert (after.size, after.mode) == ((30, 20), "L")
        assert open_images(tmp_path / "out").class_names == images.class_names


def test_a_way_of_training_writes_no_files(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="adversarial-4 is a way of training and leaves images as they are"):
        restore(blobs(2), AdversarialTraining(4.0), tmp_path / "out", runtime=runtime)
    assert not (tmp_path / "out").exists()


def test_versions_are_all_there_and_take_as_many_steps(runtime: Runtime, tmp_path: Path) -> None:
    images, versions = blobs(5, size=(16, 16)), TABLE["versions"]
    found = versions.recover(images, Job(runtime=runtime))
    for number, part in enumerate((JPEG(10), Chain((JPEG(10), Grayscale())))):
        assert torch.equal(found.pixels[5 * number : 5 * number + 5], recovered(part, images, runtime))
    assert torch.equal(found.labels, images.labels.repeat(2))
    assert Learner(epochs=21).for_versions(2) == Learner(epochs=10)
    assert Learner(epochs=1).for_versions(2) == Learner(epochs=1)
    assert versions.present(images, {}) is images
    restore(images, versions, tmp_path / "out", runtime=runtime)
    again = open_images(tmp_path / "out")
    assert set(again.names) == set(found.names) and len(again) == 10
    both = create_recovery("versions+blur-1")
    assert both.recover(images, Job(runtime=runtime)).names == found.names
    with pytest.raises(UsageError, match="at least two different recoveries"):
        Versions((JPEG(10), AdversarialTraining(4.0)))
    with pytest.raises(UsageError, match="at least two different recoveries"):
        Versions((JPEG(10), JPEG(10)))
    for several in ("versions+versions", "auto+jpeg-10+versions"):
        with pytest.raises(UsageError, match="would make versions of versions"):
            create_recovery(several)
    with pytest.raises(UsageError, match="at least two different recoveries"):
        Versions((JPEG(10), versions))
    with_prior = create_recovery("versions", prior="x")
    assert isinstance(with_prior, Versions)
    assert [part.name for part in with_prior.parts] == [
        "jpeg-10",
        "jpeg-10+grayscale",
        "purify-gently+grayscale",
    ]


def test_what_versions_begin_with_is_done_once(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    images, calls, usual = blobs(2), [], JPEG.recover

    def counted(self: JPEG, images: ImageSet, job: Job) -> ImageSet:
        calls.append(self.name)
        return usual(self, images, job)

    monkeypatch.setattr(JPEG, "recover", counted)
    parts = JPEG(10), Chain((JPEG(10), Grayscale())), Chain((Grayscale(), JPEG(10))), JPEG(20)
    found = Versions(parts).recover(images, Job(runtime=runtime))
    assert calls == ["jpeg-10", "jpeg-10", "jpeg-20"]
    expected = [part.recover(images, Job(runtime=runtime)).pixels for part in parts]
    assert torch.equal(found.pixels, torch.cat(expected))


@dataclass(frozen=True)
class Shade(ImageRecovery):
    """Paints images in a grey that is not in its name."""

    value: int

    name = "shade"

    def _change(self, images: ImageSet, job: Job) -> Change:
        job.facts["evaluations"] = self.value
        return lambda index, randomness: torch.full_like(images.pixels[index], self.value)


def test_parts_of_one_name_are_kept_apart(runtime: Runtime, tmp_path: Path) -> None:
    images, versions = blobs(3), Versions((Chain((Shade(5), Grayscale())), Shade(9)))
    expected = versions.recover(images, Job(runtime=runtime)).pixels
    kept = versions.recover(images, Job(runtime=runtime, workspace=tmp_path))
    assert torch.equal(kept.pixels, expected)
    assert expected.unique().tolist() == [5, 9]
    job = Job(runtime=runtime)
    Chain((Shade(5), Grayscale(), Shade(9))).recover(images, job)
    assert job.facts == {"0-shade": {"evaluations": 5}, "2-shade": {"evaluations": 9}}


def test_ueraser_changes_how_it_learns() -> None:
    usual = Learner()
    for name, draws, share in (("ueraser", 5, 0.25), ("ueraser-lite", 1, 0.25), ("ueraser-max", 5, 1.0)):
        learner = create_recovery(name).adapt(usual)
        assert (learner.distort, learner.draws, learner.hard_share) == (True, draws, share)
    both = create_recovery("ueraser+adversarial-2").adapt(usual)
    assert both.distort
    assert both.radius == 2.0


def test_jpeg_is_pillow_s(runtime: Runtime) -> None:
    images = blobs(2, size=(16, 16))
    buffer = io.BytesIO()
    Image.fromarray(images.pixels[1].permute(1, 2, 0).contiguous().numpy()).save(buffer, "JPEG", quality=10)
    expected = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)
    assert torch.equal(recovered(JPEG(10), images, runtime)[1], expected)
    assert JPEG(10).present(images, {}) is images


def test_grayscale_is_luma_at_training_and_at_test(runtime: Runtime) -> None:
    images = blobs(2)
    for grey in (recovered(Grayscale(), images, runtime), Grayscale().present(images, {}).pixels):
        assert torch.equal(grey[:, 0], grey[:, 2])
        red, green, blue = images.pixels.double().unbind(1)
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        assert float((grey[:, 0] - luma).abs().max()) <= 1


def test_bit_depth_keeps_the_highest_bits(runtime: Runtime) -> None:
    images = blobs(2)
    assert torch.equal(recovered(BitDepth(2), images, runtime), images.pixels & 0b11000000)


def test_adversarial_training_changes_how_it_learns() -> None:
    assert AdversarialTraining(3.0).adapt(Learner()).radius == 3.0
    assert JPEG(10).adapt(Learner()) == Learner()
    assert create_recovery("jpeg-10+adversarial-2").adapt(Learner()).radius == 2.0


def test_a_chain_is_its_parts_in_turn(runtime: Runtime) -> None:
    images = blobs(5, size=(16, 16))
    job = Job(runtime=runtime)
    expected = Grayscale().recover(JPEG(10).recover(images, job), job).pixels
    assert torch.equal(recovered(create_recovery("jpeg-10+grayscale"), images, runtime), expected)
    assert (
        torch.equal(create_recovery("jpeg-10+grayscale").present(images, {}).pixels[:, 0], expected[:, 0])
        is False
    )


def test_projection_leaves_nothing_of_the_regression_s_directions(runtime: Runtime) -> None:
    images = blobs(60, size=(8, 8))
    job = Job(runtime=runtime)
    basis = Projection()._basis(images, job)
    assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-5)
    left = Projection().recover(images, job).pixels.float().flatten(1)
    before = images.pixels.float().flatten(1)
    assert float((left @ basis).std(0).mean()) < 0.05 * float((before @ basis).std(0).mean())
    assert torch.allclose((left @ basis).mean(0), (before @ basis).mean(0), rtol=0.05, atol=2)
    others = torch.eye(192) - basis @ basis.T
    assert float(((left - before) @ others).abs().mean()) < 1  # rounding, and clipping at 0 and 255


@pytest.mark.parametrize("method", [OPS(), LSP(epsilon=3.0, patch=4)], ids=["ops", "lsp"])
def test_projection_takes_class_wise_noise_off(method: OPS | LSP, runtime: Runtime, tmp_path: Path) -> None:
    """A straight line tells the protected images apart, and no longer does after the projection."""
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(60, 190, (1200, 3, 8, 8), dtype=torch.uint8, generator=draws)
    images = ImageSet.from_arrays(pixels, torch.arange(1200) % 4, class_names=list("abcd"))
    publish(images, method, tmp_path / "out", runtime=runtime)
    protected = open_images(tmp_path / "out")

    def told_apart(some: ImageSet) -> float:
        basis = torch.cat((some.pixels.float().flatten(1), torch.ones(1200, 1)), 1)
        targets = torch.nn.functional.one_hot(some.labels, 4).float()
        weights = torch.linalg.lstsq(basis[:900], targets[:900]).solution
        return float(((basis[900:] @ weights).argmax(1) == some.labels[900:]).float().mean())

    assert told_apart(protected) > 0.9
    after = Projection(batch_size=32).recover(protected, Job(runtime=runtime))
    assert told_apart(after) < 0.75


def test_coin_interpolates_between_the_four_pixels_around_a_place(runtime: Runtime) -> None:
    images = blobs(2, size=(5, 7))
    after = recovered(COIN(reach=2.0), images, runtime)
    draws = Job(runtime=runtime).random("recover", 0)
    offset = (2 * torch.rand(2, 2, 5, 7, generator=draws) - 1) * 2.0
    for which, row, column in np.ndindex(2, 5, 7):
        y, x = (
            float(at + moved) for at, moved in zip((row, column), offset[which, :, row, column], strict=True)
        )
        top, left = int(np.floor(y)), int(np.floor(x))
        expected = np.zeros(3)
        for down, right in np.ndindex(2, 2):
            weight = (1 - abs(y - top - down)) * (1 - abs(x - left - right))
            expected += weight * images.pixels[which, :, (top + down) % 5, (left + right) % 7].numpy()
        assert np.abs(after[which, :, row, column].numpy() - expected).max() <= 0.51


def test_coin_fetches_pixels_from_near_by(runtime: Runtime) -> None:
    ramp = torch.arange(40).view(1, 1, 1, 40).expand(1, 3, 40, 40).to(torch.uint8) * 4
    images = ImageSet.from_arrays(ramp.contiguous(), torch.tensor([0]))
    after = recovered(COIN(reach=2.0), images, runtime)[0, 0].int()
    moved = (after - ramp[0, 0].int())[:, 3:-3]
    assert int(moved.abs().max()) <= 8  # two pixels, four levels each
    assert abs(float(moved.float().mean())) < 0.4
    assert float(moved.float().std()) == pytest.approx(4 * 2 / 3**0.5, rel=0.1)  # uniform in [-8, 8]
    edge = recovered(COIN(reach=2.0), images, runtime)[0, 0, :, 0]
    assert int(edge.max()) > 100  # the image is continued by itself


@pytest.mark.parametrize(
    "name",
    [
        "",
        "jpeg",
        "jpeg-0",
        "jpeg-101",
        "jpeg--5",
        "jpeg-1.5",
        "adversarial-0",
        "adversarial-x",
        "blur",
        "blur-0",
        "bitdepth-8",
        "none-3",
        "dvae-3",
        "dvae-16.5",
        "ueraser-5",
        "projection+",
        "+",
    ],
)
def test_unknown_recoveries_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="Unknown recovery .* expected one of none, grayscale, projection"):
        create_recovery(name)
