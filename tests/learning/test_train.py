from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.conftest import blobs
from tests.images.test_write import tree

from privet.errors import InputError, OutputError, UsageError
from privet.learning import Learner, Runtime, accuracy, learn, schedule, study
from privet.learning.runtime import multiplies_bf16
from privet.models import create_model, load_model

Make = Callable[..., Path]
TINY = Learner(architecture="cnn-w4", epochs=3, batch_size=8)


def weights(learned: object) -> dict[str, torch.Tensor]:
    return learned.model.state_dict()  # type: ignore[attr-defined,no-any-return]


def same(first: object, second: object) -> bool:
    return all(
        torch.equal(one, other)
        for one, other in zip(weights(first).values(), weights(second).values(), strict=True)
    )


@pytest.mark.parametrize(("architecture", "epochs"), [("resnet8-w8", 12), ("cnn-w8", 12), ("vit-w32", 40)])
def test_a_learner_learns(runtime: Runtime, architecture: str, epochs: int) -> None:
    learner = Learner(architecture=architecture, epochs=epochs, batch_size=32, flip=False)
    learned = learn(blobs(192), blobs(60, seed=1), learner, runtime=runtime)
    assert learned.accuracy > 0.8
    assert learned.best.accuracy >= learned.accuracy
    assert len(learned.history) == epochs
    assert learned.history[-1].loss < learned.history[0].loss


def test_adversarial_training_withstands_what_standard_training_does_not(runtime: Runtime) -> None:
    from privet.learning import pgd

    train, test = blobs(192), blobs(60, seed=1)
    robust = {}
    for radius in (0.0, 24.0):
        learner = Learner(
            architecture="resnet8-w8", epochs=15, batch_size=32, radius=radius, attack_steps=4, flip=False
        )
        model = learn(train, test, learner, runtime=runtime).model
        x = pgd(
            model,
            test.pixels.float() / 255,
            test.labels,
            radius=24 / 255,
            step_size=6 / 255,
            steps=10,
            generator=torch.Generator().manual_seed(0),
            runtime=runtime,
        )
        robust[radius] = float((model(x).argmax(1) == test.labels).float().mean())
    assert robust[24.0] > robust[0.0] + 0.15


def test_one_seed_is_one_learner(runtime: Runtime) -> None:
    first, second, other = (
        learn(blobs(24), blobs(9), TINY, runtime=runtime, seed=seed) for seed in (4, 4, 5)
    )
    assert same(first, second)
    assert first.history == second.history
    assert not same(first, other)


@pytest.mark.parametrize(
    "learner",
    [
        TINY,
        replace(TINY, radius=4.0, attack_steps=2),
        replace(TINY, architecture="vit-w32"),
        replace(TINY, architecture="simclr:cnn-w4"),
        replace(TINY, architecture="simclr:cnn-w4", radius=4.0, attack_steps=2),
        replace(TINY, distort=True, draws=2),
    ],
)
def test_killed_after_any_epoch_it_resumes_to_the_same_weights(
    runtime: Runtime, tmp_path: Path, learner: Learner
) -> None:
    train, test = blobs(24), blobs(9)
    whole = learn(train, test, learner, runtime=runtime)
    steps = 0

    def stop(stage: str, done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if steps in (2, 7):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            learn(train, test, learner, runtime=runtime, checkpoint=tmp_path / "c", progress=stop)
    resumed = learn(train, test, learner, runtime=runtime, checkpoint=tmp_path / "c", progress=stop)
    assert same(resumed, whole)
    assert resumed.history == whole.history
    assert steps < 3 * 3 + 5  # it did not start again


def test_fewer_images_than_a_batch(runtime: Runtime) -> None:
    learned = learn(blobs(5), blobs(3), replace(TINY, batch_size=128), runtime=runtime)
    assert len(learned.history) == 3


def test_accuracy_is_a_share_of_right_answers(runtime: Runtime) -> None:
    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 1.0, 0.0]]).expand(len(x), -1)

    images = blobs(7)  # labels 0 1 2 0 1 2 0
    assert accuracy(Constant(), images, runtime=runtime) == pytest.approx(2 / 7)


def test_schedules() -> None:
    assert schedule("step", 0.2) == 1
    assert schedule("step", 0.5) == pytest.approx(0.1)
    assert schedule("step", 0.9) == pytest.approx(0.01)
    assert schedule("cosine", 0.5) == pytest.approx(0.5)
    assert schedule("cosine", 1.0) == pytest.approx(0)
    for name in ("cosine", "step"):
        assert 0 < schedule(name, 0) < schedule(name, 0.02) < schedule(name, 0.05)


def test_sets_that_do_not_fit_are_refused(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="must have the same classes"):
        learn(blobs(9), blobs(9, classes=2), TINY, runtime=runtime)
    with pytest.raises(InputError, match=r"Training images are \(8, 8\), test images \(9, 9\)"):
        learn(blobs(9), blobs(9, size=(9, 9)), TINY, runtime=runtime)
    with pytest.raises(InputError, match="at least 2 training images and 1 test image, got 1 and 9"):
        learn(blobs(1), blobs(9), TINY, runtime=runtime)


def test_impossible_learners_are_refused() -> None:
    with pytest.raises(UsageError, match="Unknown schedule 'line'; expected cosine or step"):
        Learner(schedule="line")
    with pytest.raises(UsageError, match="at least 1 epoch and batches of 2, got 0 and 128"):
        Learner(epochs=0)
    with pytest.raises(UsageError, match=r"a radius of 0 to 255 \(in 1/255\) and at least 1 step"):
        Learner(radius=-2)
    with pytest.raises(
        UsageError, match="at least 1 draw, and a share of the epochs from 0 to 1; got 0 and 1.0"
    ):
        Learner(draws=0)


def test_places_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="Unknown device 'tpu'; expected auto, cpu or cuda"):
        Runtime.find("tpu")
    with pytest.raises(UsageError, match="Unknown precision 'int8'; expected one of auto, bf16, float32"):
        Runtime.find("cpu", "int8")
    assert Runtime.find("cpu", "float32") == Runtime(device=torch.device("cpu"), precision="float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_error() -> None:
    with pytest.raises(UsageError, match="torch sees none; 'privet doctor' says more"):
        Runtime.find("cuda")


def test_a_study_writes_weights_and_record(runtime: Runtime, tmp_path: Path, make_folder: Make) -> None:
    train, test = make_folder(blobs(24), "train"), make_folder(blobs(9, seed=1), "test")
    learned = study(train, test, TINY, tmp_path / "out", runtime=runtime)
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["facts"]["last"] == learned.accuracy
    assert len(run["facts"]["history"]) == 3
    model, about = load_model(tmp_path / "out/learner.safetensors")
    assert (about.architecture, about.class_names) == ("cnn-w4", ("0", "1", "2"))
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.parameters(), learned.model.parameters(), strict=True)
    )
    before = tree(tmp_path / "out")
    assert study(train, test, TINY, tmp_path / "out", runtime=runtime).history == learned.history
    assert tree(tmp_path / "out") == before
    with pytest.raises(OutputError, match="holds a finished run with another seed"):
        study(train, test, TINY, tmp_path / "out", runtime=runtime, seed=1)


def test_fine_tuning_starts_from_given_weights(runtime: Runtime, tmp_path: Path, make_folder: Make) -> None:
    source = create_model("cnn-w4", classes=9, size=(8, 8), seed=7)
    state = {name.removeprefix("network."): value for name, value in source.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    learner = replace(
        TINY, weights=tmp_path / "w.safetensors", learning_rate=1e-9, weight_decay=0.0, epochs=1
    )
    tuned = learn(blobs(24), blobs(9), learner, runtime=runtime)
    torch.testing.assert_close(weights(tuned)["network.convs.2.weight"], state["convs.2.weight"])
    folder = make_folder(blobs(24))
    with pytest.raises(InputError, match="There is no weights file"):
        study(folder, folder, replace(TINY, weights=tmp_path / "absent"), tmp_path / "out", runtime=runtime)


@pytest.mark.parametrize(
    ("processor", "library", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, True, "float32"),
        ({"avx512_f": True, "avx512_bf16": True}, True, "bf16"),
        ({"neon": True, "bf16": True}, True, "bf16"),
        ({"neon": True, "bf16": True}, False, "float32"),  # as on a Mac: torch has no kernels for it there
        (None, True, "float32"),  # a torch that does not tell
    ],
)
def test_networks_run_in_bf16_only_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, processor: dict[str, bool] | None, library: bool, expected: str
) -> None:
    if processor is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: library)
    assert Runtime.find("cpu").precision == expected
    assert Runtime.find("cpu", "bf16").precision == "bf16"


def test_a_gpu_that_imitates_bf16_gets_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not multiplies_bf16(torch.device("cuda"))


def test_bf16_learns_too() -> None:
    here = Runtime(device=torch.device("cpu"), precision="bf16")
    learner = Learner(architecture="cnn-w8", epochs=12, batch_size=32, flip=False)
    assert learn(blobs(192), blobs(60, seed=1), learner, runtime=here).accuracy > 0.8


def test_compiled_networks_learn_the_same(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: compiled.append(call) or call)
    learner = replace(TINY, radius=4.0, attack_steps=2)
    first, second = (
        learn(blobs(24), blobs(9), learner, runtime=replace(runtime, compile=compile))
        for compile in (True, False)
    )
    assert same(first, second)
    assert len(compiled) == 1
