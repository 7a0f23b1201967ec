"""Ungeneralizable examples, part by part: the objective against its formula, and what each part is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import blobs
from torch import Tensor, nn

from privet.images import ImageSet
from privet.learning import Job, Learner, Runtime
from privet.models import create_model
from privet.protection import UGE, trajectory, uge
from privet.protection.authorised import derangement, initial_weights
from privet.protection.feature_space import FeatureSpace, train_space
from privet.protection.matching import weight_gradient
from privet.protection.minimise import Batches
from privet.protection.noise import Stored
from privet.protection.objective import Objective
from privet.protection.trajectory import Point, follow
from privet.protection.undistil import undistillation

KEY = bytes(range(32))
METHOD = UGE(
    key=KEY,
    authorised=("cnn-w4", "vgg11-w4"),
    encoders=("vgg11-w4", "cnn-w4"),
    encoder_epochs=4,
    train_epochs=2,
    points=3,
    refreshes=1,
    passes=6,
    batch_size=4,
)


def network(name: str, seed: int) -> nn.Module:
    return create_model(name, classes=3, size=(8, 8), seed=seed)


def gradient_of(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of training on a batch as one vector, and the logits, without anything of the package."""
    logits = model.train()(x)
    weights = [weight for weight in model.parameters() if weight.ndim >= 2]
    found = torch.autograd.grad(F.cross_entropy(logits, labels), weights, create_graph=True)
    return torch.cat([part.flatten() for part in found]), logits


@pytest.mark.parametrize("distance", ["repel", "permute", "surrogate"])
@pytest.mark.parametrize("matching", ["cosine", "residual"])
@pytest.mark.parametrize("late", [True, False])
def test_the_objective_is_what_its_formula_says(
    distance: str, matching: str, late: bool, runtime: Runtime
) -> None:
    images = blobs(12)
    x, labels, targets = images.pixels.float() / 255, images.labels, derangement(KEY, 3)
    names = ("cnn-w4", "resnet8-w4")
    at_point = [network(name, 10 + number) for number, name in enumerate(names)]
    for model in at_point:  # as late in a training: sure of its answers
        with torch.no_grad():
            last = [weight for weight in model.parameters() if weight.ndim == 2][-1]
            last *= 10 / model(x).std()
    scales = [
        share * float(gradient_of(model, x, labels)[0].square().sum().detach())
        for share, model in zip((0.7, 1.9), at_point, strict=True)
    ]
    points = [
        Point(
            state={name: value.clone() for name, value in model.state_dict().items()}, scale=scale, late=late
        )
        for model, scale in zip(at_point, scales, strict=True)
    ]
    spaces = [
        FeatureSpace.fit(network("cnn-w4", seed).eval().requires_grad_(False), images, Job(runtime=runtime))
        for seed in (5, 6)
    ]
    made = Objective(
        matching=matching,
        distance=distance,
        distance_weight=0.25,
        undistil=50.0,
        networks=[network(name, 20) for name in names],  # of which the architecture alone counts
        spaces=spaces,
        targets=targets,
    )
    noise = 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    seen = (x + noise).clamp(0, 1).requires_grad_()
    loss, measured = made(seen, x, labels, points=points, weight=3.0)

    expected, mismatches = torch.zeros(()), dict[str, list[Tensor]](cosine=[], residual=[])
    for model, scale in zip(at_point, scales, strict=True):
        wanted, meant = gradient_of(model, x, labels)
        given, said = gradient_of(model, seen, labels)
        wanted, meant = wanted.detach(), meant.detach()
        mismatches["cosine"].append(1 - F.cosine_similarity(wanted, given, dim=0))
        mismatches["residual"].append((given - wanted).square().sum() / scale)
        spoilt = undistillation(meant, said, labels)
        assert abs(float(spoilt.detach())) > 1e-4
        expected = expected + 3.0 * mismatches[matching][-1] / 2 + (50.0 * spoilt / 2 if late else 0)
    apart = torch.stack(
        [
            {
                "repel": lambda space: space.repel(seen, x),
                "permute": lambda space: space.permute(seen, labels, targets[labels]),
                "surrogate": lambda space: space.surrogate(seen, targets[labels]),
            }[distance](space)
            for space in spaces
        ]
    ).mean()
    expected = expected + 0.25 * apart
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    slope, wanted_slope = (torch.autograd.grad(one, seen)[0] for one in (loss, expected))
    assert torch.allclose(slope, wanted_slope, rtol=1e-3, atol=1e-4 * float(wanted_slope.abs().max()))
    means = {name: float(torch.stack(values).mean().detach()) for name, values in mismatches.items()}
    assert measured == pytest.approx({**means, "distance": float(apart.detach())}, rel=1e-3)


def test_the_objective_is_of_the_keys_networks_and_of_every_encoder(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, trained = blobs(8), list[tuple[str, int, int]]()

    def train(images: ImageSet, learner: Learner, *, number: int, job: Job) -> Any:
        trained.append((learner.architecture, learner.epochs, number))
        return number

    monkeypatch.setattr(uge, "train_space", train)
    made = replace(METHOD, distance="repel", distance_weight=0.7, undistil=0.4)._objective(
        images, Job(runtime=runtime)
    )
    assert trained == [("vgg11-w4", 4, 0), ("cnn-w4", 4, 1)] and made.spaces == [0, 1]
    assert torch.equal(made.targets, derangement(KEY, 3))
    assert (made.matching, made.distance, made.distance_weight, made.undistil) == (
        "residual",
        "repel",
        0.7,
        0.4,
    )
    for number, (model, name) in enumerate(zip(made.networks, METHOD.authorised, strict=True)):
        own = initial_weights(KEY, name, classes=3, size=(8, 8), number=number).state_dict()
        assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


def test_points_are_of_the_originals_and_then_of_the_current_images_too(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = blobs(12)
    followed = list[tuple[str, str, int, int, bool, bool]]()
    chosen: dict[int, set[str]] = {1: set(), 2: set()}
    passed, left, steps = list[int](), list[float](), 0

    def record(
        model: nn.Module, learner: Learner, images_: ImageSet, originals: ImageSet, **rest: Any
    ) -> list[Any]:
        same = [torch.equal(one.pixels, images.pixels) for one in (images_, originals)]
        followed.append((rest["name"], learner.architecture, learner.epochs, rest["count"], *same))
        return [rest["name"]]

    def descend(
        self: UGE, noise: Any, index: Tensor, batch: Any, objective: Any, *rest: Any
    ) -> dict[str, float]:
        nonlocal steps
        points, done, *_ = rest
        chosen[1 if steps < 18 else 2].update(points)
        passed.extend(index.tolist() if steps < 3 else [])
        left.append(done)
        steps += 1
        return {"cosine": 0.0, "residual": 9.0, "distance": 0.0}

    monkeypatch.setattr(uge, "follow", record)
    monkeypatch.setattr(UGE, "_descend", descend)
    monkeypatch.setattr(UGE, "_objective", lambda *_: "any")

    def run(method: UGE) -> float:
        nonlocal steps
        steps = 0
        job = Job(runtime=runtime)
        method._optimise(images, Batches(images, runtime), job)
        return float(job.facts["matching_weight"])

    assert run(METHOD) > 1  # the residual is above the tolerance
    assert followed == [
        ("authorised-1-originals", "cnn-w4", 2, 3, True, True),
        ("authorised-2-originals", "vgg11-w4", 2, 3, True, True),
        ("authorised-1-round-2", "cnn-w4", 2, 3, False, True),
        ("authorised-2-round-2", "vgg11-w4", 2, 3, False, True),
    ]
    assert chosen[1] == {"authorised-1-originals", "authorised-2-originals"}
    assert chosen[2] == {name for name, *_ in followed}
    assert sorted(passed) == list(range(12))  # a pass sees every image once
    assert left == pytest.approx([step / 36 for step in range(36)])
    assert run(replace(METHOD, matching="cosine")) < 1


@pytest.mark.parametrize("grey", [False, True])
def test_a_step_moves_grey_images_alike_in_all_channels_and_less_the_later(
    grey: bool, runtime: Runtime
) -> None:
    images, index = blobs(6, grey=grey), torch.arange(6)
    batches = Batches(images, runtime)
    moves = []
    for done in (0.0, 0.5):
        noise = Stored(images, epsilon=8 / 255, step_size=4 / 255, job=Job(runtime=runtime))
        noise.noise //= 4  # so that no step ends at the budget
        before = noise.noise.float()

        def spy(
            seen: Tensor, originals: Tensor, labels: Tensor, **rest: Any
        ) -> tuple[Tensor, dict[str, float]]:
            alike = torch.allclose(seen - originals, (seen - originals).mean(1, keepdim=True), atol=1e-6)
            assert alike is grey
            return seen.sum(), {}

        METHOD._descend(noise, index, batches[index], spy, [], done, 1.0, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        moves.append(float((before - noise.noise.float()).max()) * 8 / 127)
    assert moves == pytest.approx([4, 2], abs=0.1)  # in 1/255, down the loss


class Still:
    """Views that leave images as they are."""

    def draw(self, *_: Any) -> Still:
        return self

    def apply(self, x: Tensor) -> Tensor:
        return x


def test_the_scale_of_a_point_is_that_of_the_originals_mean_gradient(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectory, "augmentation_for", lambda *_, **__: Still())
    images, originals = blobs(16, seed=1), blobs(16, seed=2)
    learner = Learner(architecture="cnn-w4", epochs=4, batch_size=4)
    job = Job(runtime=runtime)
    points = follow(network("cnn-w4", 1), learner, images, originals, count=4, name="x", job=job)
    order = torch.randperm(16, generator=trajectory.generator(0, "signal"))

    def power(point: Point) -> float:
        parts: Sequence[Tensor] = [
            torch.cat([part.flatten() for part in gradient])
            for index in torch.split(order, 4)
            for gradient, _ in [
                weight_gradient(
                    network("cnn-w4", 1),
                    point.state,
                    originals.pixels[index].float() / 255,
                    originals.labels[index],
                )
            ]
        ]
        return float(torch.stack(tuple(parts)).mean(0).square().sum())

    powers = [power(point) for point in points]
    floor = 0.1 * sum(powers) / len(powers)
    assert [point.scale for point in points] == pytest.approx([one + floor for one in powers], rel=1e-4)
    # Squares of even steps, of 16: 0, 2, 7, 16; late from three quarters on, that step included.
    assert [point.late for point in points] == [False, False, False, True]
    monkeypatch.setattr(trajectory, "LATE", 7 / 16)
    points = follow(network("cnn-w4", 1), learner, images, originals, count=4, name="x", job=job)
    assert [point.late for point in points] == [False, False, True, True]


def test_an_encoder_is_frozen_and_its_margin_is_between_classes(runtime: Runtime) -> None:
    images = blobs(60)
    learner = Learner(architecture="vgg11-w4", epochs=3, batch_size=16)
    space = train_space(images, learner, number=0, job=Job(runtime=runtime))
    assert not any(module.training for module in space.model.modules())
    assert not any(weight.requires_grad for weight in space.model.parameters())
    x = images.pixels.float() / 255
    z = space(x)
    apart = (z[:, None] - z[None]).square().mean(2)[images.labels[:, None] != images.labels[None]]
    assert 0.8 < float((apart <= space.margin).float().mean()) < 0.97
    moved = (x + 0.2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    nearness = (1 - (space(moved) - z).square().mean(1) / space.margin).clamp(min=0).mean()
    assert float(space.repel(moved, x)) == pytest.approx(float(nearness), rel=1e-4)
    assert float(nearness) > 0


def test_the_margin_is_not_of_pairs_of_one_class(runtime: Runtime) -> None:
    pixels = torch.zeros(82, 3, 8, 8, dtype=torch.uint8)
    pixels[80:] = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = ImageSet.from_arrays(pixels, (torch.arange(82) >= 80).long())
    space = FeatureSpace.fit(network("cnn-w4", 5).eval().requires_grad_(False), images, Job(runtime=runtime))
    assert space.margin > 0.1  # nearly all pairs are of black images of one class, at distance 0
