"""What every recovery must pass. Adding a recovery is adding a row to TABLE."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import blobs

from privet.errors import UsageError
from privet.learning import Learner
from privet.recovery import JPEG, AdversarialTraining, Grayscale, Nothing, Recovery, create_recovery

TABLE: dict[str, Recovery] = {
    "none": Nothing(),
    "jpeg-10": JPEG(10),
    "jpeg-75": JPEG(75),
    "grayscale": Grayscale(),
    "adversarial-4": AdversarialTraining(4.0),
    "adversarial-0.5": AdversarialTraining(0.5),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_recovery(name: str) -> None:
    recovery = create_recovery(name)
    assert recovery == TABLE[name] or isinstance(recovery, Nothing)
    assert recovery.name == name
    images = blobs(6, size=(16, 20))
    before = images.pixels.clone()
    first, second = recovery.recover(images), recovery.recover(images)
    assert torch.equal(images.pixels, before)
    assert torch.equal(first.pixels, second.pixels)
    assert first.pixels.dtype == torch.uint8
    assert (first.size, first.names) == (images.size, images.names)
    assert torch.equal(first.labels, images.labels)
    one = recovery.recover(images.subset([4]))
    assert torch.equal(one.pixels[0], first.pixels[4])  # whatever else is in the set
    assert recovery.present(images).size == images.size
    assert len(recovery.recover(blobs(0))) == 0


def test_jpeg_is_pillow_s() -> None:
    images = blobs(2, size=(16, 16))
    buffer = io.BytesIO()
    Image.fromarray(images.pixels[1].permute(1, 2, 0).contiguous().numpy()).save(buffer, "JPEG", quality=10)
    expected = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)
    assert torch.equal(JPEG(10).recover(images).pixels[1], expected)
    assert JPEG(10).present(images) is images


def test_grayscale_is_luma_at_training_and_at_test() -> None:
    images = blobs(2)
    for grey in (Grayscale().recover(images).pixels, Grayscale().present(images).pixels):
        assert torch.equal(grey[:, 0], grey[:, 2])
        red, green, blue = images.pixels.double().unbind(1)
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        assert float((grey[:, 0] - luma).abs().max()) <= 1


def test_adversarial_training_changes_how_it_learns() -> None:
    assert AdversarialTraining(3.0).adapt(Learner()).radius == 3.0
    assert JPEG(10).adapt(Learner()) == Learner()


@pytest.mark.parametrize(
    "name", ["", "jpeg", "jpeg-0", "jpeg-101", "jpeg--5", "adversarial-0", "adversarial-x", "blur"]
)
def test_unknown_recoveries_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="Unknown recovery .* expected one of none, jpeg-QUALITY, grayscale"):
        create_recovery(name)
