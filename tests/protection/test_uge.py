"""Ungeneralizable examples: the losses, what the key decides, and that each part of the objective has its effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import blobs, stop_after
from torch import Tensor, nn

from privet.errors import OutputError, UsageError
from privet.images import ImageSet
from privet.learning import Job, Learner, Runtime
from privet.models import SavedModel, create_model, load_model, save_model
from privet.protection import UGE, RandomNoise, publish
from privet.protection.authorised import derangement, initial_weights
from privet.protection.feature_space import FeatureSpace, Whitening, train_space
from privet.protection.generator import UNet
from privet.protection.matching import cosine_distance, residual, squared_norm, weight_gradient
from privet.protection.minimise import Batches
from privet.protection.noise import Stored
from privet.protection.objective import Objective
from privet.protection.trajectory import Point, follow
from privet.protection.undistil import undistillation

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
METHOD = UGE(
    key=KEY,
    authorised=("cnn-w4",),
    encoders=("vgg11-w4",),
    encoder_epochs=4,
    train_epochs=2,
    points=3,
    refreshes=1,
    passes=2,
    batch_size=8,
)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def value_of(scalar: Tensor) -> float:
    return float(scalar.detach())


class TwoLayers(nn.Module):
    """Smooth everywhere, for finite differences."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 3)
        for number, weight in enumerate(self.parameters()):
            nn.init.normal_(weight, generator=torch.Generator().manual_seed(number))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh().mean((2, 3)))  # type: ignore[no-any-return]


def mismatch(name: str, wanted: Any, given: Any) -> Tensor:
    return cosine_distance(wanted, given) if name == "cosine" else residual(wanted, given, 0.5)


class TestMatching:
    @pytest.mark.parametrize("name", ["cosine", "residual"])
    @pytest.mark.parametrize("architecture", ["cnn-w4", "resnet8-w4", "vit-w32"])
    def test_originals_match_themselves_and_others_do_not(self, name: str, architecture: str) -> None:
        model = create_model(architecture, classes=3, size=(8, 8))
        x, labels, point = seeded(6, 3, 8, 8), torch.arange(6) % 3, model.state_dict()
        wanted, _ = weight_gradient(model, point, x, labels)
        given, _ = weight_gradient(model, point, x.clone().requires_grad_(), labels, differentiable=True)
        assert value_of(mismatch(name, wanted, given)) < 1e-10
        other, _ = weight_gradient(model, point, 1 - x, labels)
        assert value_of(mismatch(name, wanted, other)) > 1e-3
        assert not any(part.requires_grad for part in wanted)

    @pytest.mark.parametrize("architecture", ["cnn-w4", "resnet8-w4", "vit-w32"])
    def test_every_network_has_a_second_derivative(self, architecture: str) -> None:
        model = create_model(architecture, classes=3, size=(8, 8))
        x = seeded(6, 3, 8, 8).requires_grad_()
        given, _ = weight_gradient(model, model.state_dict(), x, torch.arange(6) % 3, differentiable=True)
        assert value_of(torch.autograd.grad(squared_norm(given), x)[0].abs().max()) > 0

    @pytest.mark.parametrize("name", ["cosine", "residual"])
    def test_second_order_gradient_against_finite_differences(self, name: str) -> None:
        model = TwoLayers().double()
        x, labels, point = seeded(5, 3, 5, 5).double(), torch.arange(5) % 3, model.state_dict()
        wanted, _ = weight_gradient(model, point, seeded(5, 3, 5, 5, seed=1).double(), labels)

        def loss(seen: Tensor) -> Tensor:
            given, _ = weight_gradient(model, point, seen, labels, differentiable=True)
            return mismatch(name, wanted, given)

        seen = x.clone().requires_grad_()
        gradient = torch.autograd.grad(loss(seen), seen)[0]
        direction = seeded(5, 3, 5, 5, seed=2).double() - 0.5
        step = 1e-5
        slope = value_of(loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
        assert abs(slope) > 1e-4
        assert value_of((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)

    def test_cosine_against_its_definition_and_residual_against_scale(self) -> None:
        a, b = [seeded(4, 3), seeded(2, seed=1)], [seeded(4, 3, seed=2), seeded(2, seed=3)]
        first, second = (torch.cat([part.flatten() for part in one]) for one in (a, b))
        angle = torch.nn.functional.cosine_similarity(first, second, dim=0)
        assert value_of(cosine_distance(a, b)) == pytest.approx(1 - value_of(angle), rel=1e-5)
        assert value_of(residual(a, b, 4.0)) == pytest.approx(value_of((first - second).square().sum()) / 4)
        assert value_of(cosine_distance(a, [3 * part for part in a])) < 1e-10
        zero = [torch.zeros(2, 2)]
        assert torch.isfinite(cosine_distance(zero, zero))

    def test_neither_network_nor_point_is_changed(self) -> None:
        model = create_model("resnet8-w4", classes=3, size=(8, 8))
        point = {
            name: value.clone()
            for name, value in create_model("resnet8-w4", classes=3, size=(8, 8), seed=1).state_dict().items()
        }
        before = [{name: value.clone() for name, value in one.items()} for one in (model.state_dict(), point)]
        x = seeded(6, 3, 8, 8).requires_grad_()
        given, logits = weight_gradient(model, point, x, torch.arange(6) % 3, differentiable=True)
        squared_norm(given).backward()  # type: ignore[no-untyped-call]
        for one, then in zip((model.state_dict(), point), before, strict=True):
            assert all(torch.equal(one[name], then[name]) for name in then)
        # The statistics are the batch's: with the stored ones the logits would be others.
        model.load_state_dict(point)
        assert torch.allclose(model.train()(x), logits, atol=1e-5)
        model.load_state_dict(point)
        assert not torch.allclose(model.eval()(x), logits, atol=1e-2)


class TestKey:
    def test_decides_the_initial_weights(self) -> None:
        def weights(key: bytes, number: int = 0) -> dict[str, Tensor]:
            return initial_weights(key, "resnet8-w8", classes=3, size=(8, 8), number=number).state_dict()

        one, same, other, second = weights(KEY), weights(KEY), weights(OTHER), weights(KEY, 1)
        public = create_model("resnet8-w8", classes=3, size=(8, 8)).state_dict()
        for name, value in one.items():
            assert torch.equal(value, same[name])
            constant = value.numel() == 1 or bool((public[name] == public[name].flatten()[0]).all())
            for different in (other, second, public):
                assert torch.equal(value, different[name]) is constant
            if value.numel() > 1000:
                assert value_of(value.std()) == pytest.approx(value_of(public[name].std()), rel=0.1)
                assert abs(torch.corrcoef(torch.stack((value.flatten(), public[name].flatten())))[0, 1]) < 0.1

    def test_decides_the_derangement(self) -> None:
        for classes in range(2, 30):
            first = derangement(KEY, classes)
            assert sorted(first.tolist()) == list(range(classes))
            assert not bool((first == torch.arange(classes)).any())
            assert torch.equal(first, derangement(KEY, classes))
        assert not torch.equal(derangement(KEY, 20), derangement(OTHER, 20))

    def test_is_nowhere(self, runtime: Runtime, tmp_path: Path) -> None:
        publish(blobs(9), METHOD, tmp_path / "out", runtime=runtime)
        text = repr(METHOD) + json.dumps(METHOD.settings())
        for secret in (KEY.hex(), repr(KEY)[2:-1]):
            assert secret not in text
            for path in (tmp_path / "out").rglob("*"):
                assert path.is_dir() or secret.encode() not in path.read_bytes()
        assert not list((tmp_path / "out").rglob("*.safetensors"))  # nor the weights that follow from it
        assert METHOD.settings()["key_commitment"] != replace(METHOD, key=OTHER).settings()["key_commitment"]
        with pytest.raises(OutputError, match="settings"):
            publish(blobs(9), replace(METHOD, key=OTHER), tmp_path / "out", runtime=runtime)

    def test_is_needed_before_anything_is_written(self, runtime: Runtime, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="uge needs a vendor's key"):
            publish(blobs(6), replace(METHOD, key=b""), tmp_path / "out", runtime=runtime)
        with pytest.raises(UsageError, match="at least 16 bytes, got 4"):
            publish(blobs(6), replace(METHOD, key=b"1234"), tmp_path / "out", runtime=runtime)
        assert not (tmp_path / "out").exists()

    def test_networks_are_weights_files_for_the_licensee(self, tmp_path: Path) -> None:
        images, method = blobs(6), replace(METHOD, authorised=("cnn-w4", "cnn-w4"))
        first, second = method.networks(images)
        about = SavedModel(architecture="cnn-w4", class_names=images.class_names, size=images.size)
        save_model(tmp_path / "w.safetensors", first, about)
        again, _ = load_model(tmp_path / "w.safetensors")
        x = seeded(2, 3, 8, 8)
        assert torch.equal(again(x), first(x))
        assert not torch.equal(first(x), second(x))


@pytest.fixture
def space(runtime: Runtime) -> FeatureSpace:
    learner = Learner(architecture="vgg11-w8", epochs=20, batch_size=16)
    return train_space(blobs(60), learner, number=0, job=Job(runtime=runtime))


class TestFeatureSpace:
    def test_whitened_features_have_mean_zero_and_covariance_one(self) -> None:
        rows = seeded(500, 6) @ seeded(6, 6, seed=1) + 3
        rows = torch.cat((rows, rows[:, :1], torch.full((500, 1), 2.0)), 1)  # one twice, one constant
        z = Whitening.fit(rows)(rows)
        assert z.shape[1] <= 6
        assert torch.allclose(z.mean(0), torch.zeros(z.shape[1]), atol=1e-3)
        assert torch.allclose(z.T @ z / len(z), torch.eye(z.shape[1]), atol=1e-2)

    def test_repel_is_flat_at_the_originals_and_steep_beside_them(self, space: FeatureSpace) -> None:
        x = blobs(12).pixels.float() / 255
        for moved, flat in ((x, True), (x + 0.03 * (seeded(*x.shape) - 0.5), False)):
            moved = moved.clone().requires_grad_()
            loss = space.repel(moved, x)
            gradient = torch.autograd.grad(loss, moved)[0]
            assert bool((gradient == 0).all()) is flat
            assert (value_of(loss.detach()) == pytest.approx(1)) is flat
        assert value_of(space.repel(x.roll(1, 0), x)) < 0.7

    def test_permute_is_one_at_home_and_zero_at_the_target(self, space: FeatureSpace) -> None:
        images = blobs(60)
        x, targets = images.pixels.float() / 255, (images.labels + 1) % 3
        assert value_of(space.permute(x, images.labels, targets)) == pytest.approx(1, abs=0.1)
        assert value_of(space.permute(x, targets, images.labels)) < 0.2

    def test_surrogate_asks_for_the_target(self, space: FeatureSpace) -> None:
        images = blobs(60)
        x = images.pixels.float() / 255
        assert (
            value_of(space.surrogate(x, images.labels))
            < value_of(space.surrogate(x, (images.labels + 1) % 3)) - 1
        )


class TestUndistillation:
    def test_only_answers_that_are_sure_count(self) -> None:
        unsure, sure = torch.tensor([[0.1, 0.0, 0.0]]), torch.tensor([[9.0, 3.0, 0.0]])
        swapped, label = torch.tensor([[9.0, 0.0, 3.0]]), torch.tensor([0])
        assert value_of(undistillation(unsure, swapped, label)) == 0
        assert value_of(undistillation(sure, sure, label)) == pytest.approx(0, abs=1e-6)
        said, meant = ((one[:, 1:] / 4).softmax(1) for one in (swapped, sure))
        expected = -(meant * (meant / said).log()).sum()
        assert value_of(undistillation(sure, swapped, label)) == pytest.approx(value_of(expected), rel=1e-5)
        wrong = torch.tensor([[2.0, 3.0, 0.0]])
        assert value_of(undistillation(sure, wrong, label)) == pytest.approx(1, abs=1e-6)
        far = torch.tensor([[99.0, 0.0, 90.0]])
        assert value_of(undistillation(sure, far, label)) == -1  # and no less


class TestGenerator:
    @pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 5), (12, 9)])
    def test_noise_of_an_image_depends_on_it_and_its_label_alone(self, size: tuple[int, int]) -> None:
        model, x, labels = UNet(classes=3, size=size), seeded(4, 3, *size), torch.tensor([0, 1, 2, 0])
        noise = model(x, labels)
        assert noise.shape == x.shape
        assert value_of(noise.abs().max()) < 1
        assert torch.allclose(model(x[1:2], labels[1:2]), noise[1:2], atol=1e-5)
        if min(size) > 1:  # of one value, group norm leaves little
            assert not torch.allclose(model(x, (labels + 1) % 3), noise, atol=1e-3)
            assert not torch.allclose(model(1 - x, labels), noise, atol=1e-3)


def test_points_are_of_the_training_and_denser_early(runtime: Runtime) -> None:
    images, learner = blobs(32), Learner(architecture="vgg11-w4", epochs=4, batch_size=8)
    model = create_model("vgg11-w4", classes=3, size=(8, 8))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    steps: list[int] = []
    job = Job(runtime=runtime, progress=lambda stage, done, total: steps.append(done // 8))
    points = follow(model, learner, images, images, count=5, name="x", job=job)
    assert len(points) == 5
    assert steps == list(range(1, 17))
    counter = next(name for name in start if name.endswith("num_batches_tracked"))
    tracked = [int(point.state[counter]) for point in points]
    assert tracked == [0, 1, 4, 9, 16]
    assert [point.late for point in points] == [False, False, False, False, True]
    assert all(torch.equal(points[0].state[name], start[name]) for name in start)
    assert all(torch.equal(points[-1].state[name], value) for name, value in model.state_dict().items())
    assert all(point.scale > 0 for point in points)


def objective(
    images: ImageSet, space: FeatureSpace, runtime: Runtime, **settings: Any
) -> tuple[Objective, list[Point]]:
    model = initial_weights(KEY, "cnn-w4", classes=3, size=images.size)
    job = Job(runtime=runtime)
    points = follow(
        model,
        Learner(architecture="cnn-w4", epochs=4, batch_size=16),
        images,
        images,
        count=4,
        name="x",
        job=job,
    )
    choices: dict[str, Any] = {
        "matching": "residual",
        "distance": "surrogate",
        "distance_weight": 1.0,
        "undistil": 0.0,
    }
    made = Objective(
        **{**choices, **settings},
        networks=[model],
        spaces=[space],
        targets=derangement(KEY, 3),
    )
    return made, points


def test_a_step_leaves_networks_points_and_encoders_alone(space: FeatureSpace, runtime: Runtime) -> None:
    images = blobs(16)
    made, points = objective(images, space, runtime, undistil=1.0)
    x = images.pixels.float() / 255
    states = [point.state for point in points] + [made.networks[0].state_dict(), space.model.state_dict()]
    before = [{name: value.clone() for name, value in state.items()} for state in states]
    seen = (x + 0.02).requires_grad_()
    for point in points:
        loss, _ = made(seen, x, images.labels, points=[point], weight=1.0)
        loss.backward()  # type: ignore[no-untyped-call]
    for state, then in zip(states, before, strict=True):
        assert all(torch.equal(state[name], then[name]) for name in then)


def judge(method: UGE, images: ImageSet, runtime: Runtime) -> Callable[[ImageSet], dict[str, float]]:
    """Return what tells the objective's parts of changed images, apart from any run that made them."""
    job = Job(runtime=runtime)
    made = method._objective(images, job)
    (points,) = method._follow(images, images, "judge", job)
    x = images.pixels.float() / 255

    def parts(changed: ImageSet) -> dict[str, float]:
        y = changed.pixels.float() / 255
        found = [made(y, x, images.labels, points=[point], weight=1.0)[1] for point in points]
        return {name: sum(one[name] for one in found) / len(found) for name in found[0]}

    return parts


@pytest.mark.parametrize(
    ("parameters", "distance"),
    [("direct", "repel"), ("direct", "permute"), ("direct", "surrogate"), ("generator", "permute")],
)
def test_each_loss_is_really_lowered(runtime: Runtime, parameters: str, distance: str) -> None:
    images = blobs(48, size=(12, 12))
    method = replace(
        METHOD,
        epsilon=24,
        parameters=parameters,
        distance=distance,
        encoders=("vgg11-w8",),
        encoder_epochs=10,
        weighting="paper",
        undistil=0.0,
        refreshes=0,
        passes=24,
        batch_size=24,
        step_size=3.0,
    )
    runs = {
        "noise": RandomNoise(epsilon=24),
        "far": replace(method, distance_weight=1e6),
        "matched": replace(method, distance_weight=0.0),
    }
    parts = judge(method, images, runtime)
    found = {name: parts(run.protect(images, Job(runtime=runtime))) for name, run in runs.items()}
    assert found["far"]["distance"] < 0.9 * found["noise"]["distance"]
    assert found["far"]["distance"] < 0.9 * found["matched"]["distance"]
    for loss in ("residual", "cosine"):
        assert found["matched"][loss] < 0.8 * found["noise"][loss]
        assert found["matched"][loss] < found["far"][loss]


def test_a_step_shows_the_same_view_of_both_and_late_ones_whole_values(runtime: Runtime) -> None:
    images = blobs(8)
    batches = Batches(images, runtime)
    index = torch.arange(8)
    for done, whole in ((0.1, False), (0.9, True)):
        shown: list[Tensor] = []

        def spy(
            seen: Tensor, originals: Tensor, labels: Tensor, **rest: Any
        ) -> tuple[Tensor, dict[str, float]]:
            shown.extend((seen.detach() * 255, originals * 255))
            return seen.square().sum(), {}

        noise = Stored(images, epsilon=8 / 255, step_size=1 / 255, job=Job(runtime=runtime))
        before = noise.noise.clone()
        randomness = torch.Generator().manual_seed(0)
        METHOD._descend(noise, index, batches[index], spy, [], done, 1.0, randomness)  # type: ignore[arg-type]
        seen, originals = shown
        assert value_of((seen - originals).abs().max()) <= 8 + 1e-4
        assert not torch.allclose(originals, images.pixels.float())  # a view
        assert torch.allclose(seen, seen.round(), atol=1e-3) is whole
        # The loss is lower the darker an image is: noise falls where a pixel was in view.
        assert bool((noise.noise <= before).all())
        assert value_of((noise.noise < before).float().mean()) > 0.5


def test_weight_of_the_matching_follows_the_match(runtime: Runtime) -> None:
    def weight(**settings: Any) -> float:
        job = Job(runtime=runtime)
        replace(METHOD, **settings).protect(blobs(12), job)
        return float(job.facts["matching_weight"])

    assert weight(tolerance=1e-6) > 1.2
    assert weight(tolerance=1e6) < 1
    assert weight(tolerance=1e-6, weighting="paper") == 1


def test_few_large_mismatches_weigh_as_much_as_many_small_ones() -> None:
    for values, rises in (([0.0] * 9 + [4.0], True), ([0.2] * 10, False)):
        state = {"weight": 1.0, "level": 0.3}
        for value in values * 30:
            replace(METHOD, tolerance=0.3)._steer(state, value)
        assert (state["weight"] > 1) is rises


def test_interrupted_it_goes_on_where_it_was_with_every_part(runtime: Runtime, tmp_path: Path) -> None:
    images = blobs(12)
    method = replace(
        METHOD,
        authorised=("cnn-w4", "vgg11-w4"),
        parameters="generator",
        encoders=("simclr:cnn-w4",),
        distance="permute",
    )

    def run(name: str, progress: Any) -> Tensor:
        (tmp_path / name).mkdir(exist_ok=True)
        job = Job(runtime=runtime, workspace=tmp_path / name, checkpoint_seconds=0, progress=progress)
        return method.protect(images, job).pixels

    whole: list[str] = []
    expected = run("whole", lambda stage, done, total: whole.append(stage))
    stages = list(dict.fromkeys(whole))
    assert len(stages) == 8  # an encoder, two networks twice, two rounds, the last pass
    for stop in range(1, len(whole) + 1, 4):
        name = f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            run(name, stop_after(stop))
        again: list[str] = []
        assert torch.equal(run(name, lambda stage, done, total: again.append(stage)), expected)
        assert len(again) <= len(whole) - stop + 2  # what a report or an epoch had not yet saved


def test_what_cannot_work_is_refused() -> None:
    for settings, message in {
        ("parameters", "free"): "Unknown parameters 'free'; expected direct or generator",
        ("distance", "clip"): "Unknown distance 'clip'; expected repel or permute or surrogate",
        ("points", 1): "uge needs points of at least 2, got 1",
        ("authorised", ()): "uge needs authorised as a tuple of at least one architecture",
        ("encoders", "cnn"): "uge needs encoders as a tuple",
        ("tolerance", 0.0): "uge needs a positive tolerance and step_size",
    }.items():
        with pytest.raises(UsageError, match=message):
            replace(METHOD, **dict([settings]))
