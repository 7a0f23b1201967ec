from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import blobs

from privet.errors import UsageError
from privet.images import ImageSet
from privet.learning import Learner, Runtime, accuracy, learn, make_optimizer, study
from privet.learning.contrastive import attacked, contrastive_loss, nt_xent, usual
from privet.learning.probe import PENALTY, features, probe
from privet.models import create_model, family, load_model
from privet.models.projection import ProjectionHead, last_layer, other_head
from privet.seeds import generator

Make = Callable[..., Path]


def slow_nt_xent(projections: torch.Tensor, temperature: float) -> float:
    """The plain version: one pair after the other."""
    z = [row / np.linalg.norm(row) for row in projections.numpy()]
    half, losses = len(z) // 2, []
    for i in range(len(z)):
        j = (i + half) % len(z)
        others = [math.exp(float(z[i] @ z[k]) / temperature) for k in range(len(z)) if k != i]
        losses.append(-math.log(math.exp(float(z[i] @ z[j]) / temperature) / sum(others)))
    return sum(losses) / len(losses)


@settings(deadline=None, max_examples=40)
@given(
    images=st.integers(1, 6),
    width=st.integers(1, 5),
    temperature=st.sampled_from([0.07, 0.5, 2.0]),
    seed=st.integers(0, 1000),
)
def test_the_loss_is_the_plain_version(images: int, width: int, temperature: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(2 * images, width, dtype=torch.float64, generator=random)
    assert float(nt_xent(z, temperature=temperature)) == pytest.approx(slow_nt_xent(z, temperature), abs=1e-9)


def test_views_that_match_cost_less_than_views_that_do_not() -> None:
    z = torch.eye(4)
    matching, crossed = torch.cat((z, z)), torch.cat((z, z.roll(1, 0)))
    assert float(nt_xent(matching)) < float(nt_xent(crossed))
    assert float(nt_xent(3 * matching)) == pytest.approx(float(nt_xent(matching)))


def test_a_learner_without_labels_learns(runtime: Runtime) -> None:
    train, test = blobs(256, size=(16, 16)), blobs(60, size=(16, 16), seed=1)
    learner = Learner(architecture="simclr:cnn-w8", epochs=8, batch_size=64, flip=False)
    learned = learn(train, test, learner, runtime=runtime)
    chance = math.log(127)  # of finding one among the 127 other views of a batch
    assert learned.history[0].loss == pytest.approx(chance, abs=0.05)
    assert learned.history[-1].loss < chance - 0.3
    assert learned.accuracy > 0.8
    assert learned.accuracy == accuracy(learned.model, test, runtime=runtime)
    assert learned.history[-1].train_accuracy > 0.8


@pytest.mark.parametrize(
    ("architecture", "optimiser", "batch", "expected"),
    [
        ("simclr:vit-w32", None, 64, (torch.optim.AdamW, 0.001, 0.05)),
        ("simclr:vit-w32", "adamw", 64, (torch.optim.AdamW, 0.001, 0.05)),
        ("simclr:vit-w32", "sgd", 256, (torch.optim.SGD, 0.25, 0.0001)),
        ("simclr:cnn-w4", None, 256, (torch.optim.SGD, 0.25, 0.0001)),
        ("simclr:cnn-w4", "sgd", 1024, (torch.optim.SGD, 0.5, 0.0001)),
    ],
)
def test_what_a_learner_without_labels_learns_with(
    architecture: str, optimiser: str | None, batch: int, expected: tuple[type, float, float]
) -> None:
    learner = usual(Learner(architecture=architecture, optimiser=optimiser, batch_size=batch), 2000)
    optimizer, rate = make_optimizer(create_model(architecture, classes=2, size=(8, 8)), learner)
    assert (type(optimizer), rate, optimizer.defaults["weight_decay"]) == expected


def test_a_convolutional_network_without_labels_learns_with_sgd_alone() -> None:
    with pytest.raises(UsageError, match="simclr:cnn-w4 learns without labels, with SGD alone"):
        Learner(architecture="simclr:cnn-w4", optimiser="adamw")


def test_labels_do_not_reach_the_encoder(runtime: Runtime) -> None:
    train = blobs(24)
    other = ImageSet.from_arrays(train.pixels, train.labels.flip(0), names=train.names)
    learner = Learner(architecture="simclr:cnn-w4", epochs=1, batch_size=8)
    first, second = (learn(images, blobs(9), learner, runtime=runtime).model for images in (train, other))
    assert torch.equal(*(features(model, train, runtime=runtime) for model in (first, second)))
    assert not torch.equal(last_layer(first)[1].weight, last_layer(second)[1].weight)  # type: ignore[arg-type]


def test_adversarial_views_are_harder_to_match(runtime: Runtime) -> None:
    model = create_model("simclr:cnn-w4", classes=3, size=(8, 8))
    views = blobs(16).pixels.float() / 255
    learner = Learner(radius=8.0, attack_steps=4)
    harder = attacked(model, views, learner, generator(0, "attack"), runtime)
    assert float((harder - views).abs().max()) <= 8 / 255 + 1e-6
    model.eval()
    assert contrastive_loss(model, harder, runtime=runtime) > contrastive_loss(model, views, runtime=runtime)
    plain = attacked(model, views, Learner(), generator(0, "attack"), runtime)
    assert torch.equal(plain, views)


def test_a_probe_is_where_its_loss_is_least(runtime: Runtime) -> None:
    images = blobs(60, size=(16, 16))
    model = create_model("simclr:cnn-w4", classes=3, size=images.size)
    layer, own = probe(model, images, runtime=runtime)
    x = features(model, images, runtime=runtime).double().numpy()
    weight, bias = (part.detach().double().numpy() for part in (layer.weight, layer.bias))
    logits = x @ weight.T + bias
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    excess = (shares - np.eye(3)[images.labels.numpy()]) / len(x)
    scale = x.std(0, ddof=1)
    gradient = excess.T @ ((x - x.mean(0)) / scale) + PENALTY * weight * scale
    assert np.abs(gradient).max() < 1e-3
    assert np.abs(excess.sum(0)).max() < 1e-3
    assert own == pytest.approx((logits.argmax(1) == images.labels.numpy()).mean())
    assert own > 0.9


def test_what_a_probe_returns_depends_on_its_labels_only_through_the_last_layer(runtime: Runtime) -> None:
    images = blobs(30)
    model = create_model("resnet8-w8", classes=3, size=images.size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe(model, images, runtime=runtime)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["resnet8-w8", "vgg11-w8", "densenet22", "mobilenetv2", "vit-w32", "cnn-w4"])
def test_any_network_can_have_a_projection_head(name: str) -> None:
    model = create_model(f"simclr:{name}", classes=3, size=(16, 16)).eval()
    path, head = last_layer(model)
    assert isinstance(head, ProjectionHead)
    x = torch.rand(2, 3, 16, 16)
    assert model(x).shape == (2, 128)
    with other_head(model, torch.nn.Identity()):
        assert model(x).shape == (2, head.fc1.in_features)
    assert model.get_submodule(path) is head
    assert family(f"simclr:{name}") == family(name)


def test_a_network_without_a_linear_layer_cannot() -> None:
    with pytest.raises(UsageError, match="a network that ends in a linear layer, got one without any"):
        last_layer(torch.nn.Conv2d(3, 3, 1))


def test_a_study_without_labels_writes_a_classifier(
    runtime: Runtime, tmp_path: Path, make_folder: Make
) -> None:
    train, test = make_folder(blobs(24), "train"), make_folder(blobs(9, seed=1), "test")
    learner = Learner(architecture="simclr:cnn-w4", epochs=2, batch_size=8)
    learned = study(train, test, learner, tmp_path / "out", runtime=runtime)
    model, about = load_model(tmp_path / "out/learner.safetensors")
    assert about.architecture == "cnn-w4"
    assert accuracy(model, blobs(9, seed=1), runtime=runtime) == learned.accuracy
    again = study(train, test, learner, tmp_path / "out", runtime=runtime)
    assert again.history == learned.history
