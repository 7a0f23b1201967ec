from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.conftest import blobs
from torch import Tensor

from privet.errors import UsageError
from privet.images import ImageSet
from privet.learning import Job, Runtime, frozen
from privet.learning.contrastive import contrastive_loss
from privet.models import create_model
from privet.protection import UCL
from privet.protection.minimise import Batches, unpack
from privet.protection.ucl import Noise
from privet.seeds import generator

METHOD = UCL(surrogate="cnn-w8", epsilon=16, batch_size=16, step_size=1.6)


def loss(model: torch.nn.Module, images: ImageSet, noise: Noise, runtime: Runtime) -> float:
    """Return the mean contrastive loss of noisy images over some draws that no descent has seen."""
    batch = Batches(images, runtime)[torch.arange(len(images))]
    delta = unpack(noise.stored[noise.rows], METHOD.epsilon / 255)
    draws = (METHOD._views(batch, delta, generator(5, "draw", number)) for number in range(8))
    with frozen(model), torch.no_grad():
        return sum(float(contrastive_loss(model, views, runtime=runtime)) for views in draws) / 8


@pytest.mark.parametrize("mode", ["sample", "class"])
def test_descents_lower_the_loss_on_fresh_views(runtime: Runtime, mode: str) -> None:
    images = blobs(32, size=(16, 16))
    job, method = Job(runtime=runtime), replace(METHOD, class_steps=2)
    model = create_model("simclr:cnn-w8", classes=3, size=images.size, seed=1)
    noise = method._start(images, mode, job)
    before = loss(model, images, noise, runtime)  # chance: the network is untrained
    for round_ in range(5):
        method._improve(model, Batches(images, runtime), noise, round_, 4, "", job)
    assert loss(model, images, noise, runtime) < before - 0.003


def test_batches_are_dealt_across_classes(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of class folders a batch would hold one class, and an image would meet only its like."""
    images = ImageSet.from_arrays(
        torch.randint(0, 256, (60, 3, 4, 4), dtype=torch.uint8), torch.arange(60) // 20
    )
    seen = list[Tensor]()

    def spy(method: UCL, model: object, views: Tensor, delta: Tensor, labels: Tensor, job: object) -> Tensor:
        seen.append(labels)
        return delta.sum()

    monkeypatch.setattr(UCL, "_loss", spy)
    UCL(surrogate="cnn-w4", batch_size=16, class_rounds=0, rounds=1, train_steps=1).protect(
        images, Job(runtime=runtime)
    )
    assert all(len(labels.unique()) == 3 for labels in seen)
    assert sorted(len(labels) for labels in seen[:: METHOD.noise_steps]) == [15, 15, 15, 15]


def test_class_wise_noise_is_where_sample_wise_noise_starts(runtime: Runtime) -> None:
    images = ImageSet.from_arrays(
        torch.randint(40, 200, (12, 3, 8, 8), dtype=torch.uint8), torch.arange(12) % 3
    )
    settings = {"surrogate": "cnn-w4", "batch_size": 8, "class_steps": 2, "train_steps": 1}
    far = UCL(class_rounds=2, rounds=0, **settings).protect(images, Job(runtime=runtime))  # type: ignore[arg-type]
    near = UCL(class_rounds=2, rounds=1, noise_steps=1, **settings)  # type: ignore[arg-type]
    moved = near.protect(images, Job(runtime=runtime)).pixels.short() - far.pixels.short()
    assert 0 < int(moved.abs().max()) <= 1  # one descent of 0.8


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="ucl needs noise_steps of at least 1, got 0"):
        UCL(noise_steps=0)
    with pytest.raises(
        UsageError, match="ucl needs at least 1 round, class-wise or sample-wise, got 0 and 0"
    ):
        UCL(class_rounds=0, rounds=0)
