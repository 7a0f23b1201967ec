from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import PartialState
from tests.conftest import blobs, stop_after
from tests.images.test_write import tree

from privet.errors import InputError, OutputError, UsageError
from privet.learning import Learned, Learner, Runtime, accuracy, learn, schedule, study
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


@pytest.mark.parametrize("architecture", ["cnn-w4", "simclr:cnn-w4"])
def test_a_network_that_draws_for_itself_resumes_to_the_same_weights(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    def dropping(*given: Any, **how: Any) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Dropout(0.2), create_model(*given, **how))

    monkeypatch.setattr("privet.learning.train.create_model", dropping)
    train, test, learner = blobs(24), blobs(9), replace(TINY, architecture=architecture)
    whole, other = (learn(train, test, learner, runtime=runtime, seed=seed) for seed in (0, 1))
    with pytest.raises(KeyboardInterrupt):
        learn(train, test, learner, runtime=runtime, checkpoint=tmp_path / "c", progress=stop_after(5))
    resumed = learn(train, test, learner, runtime=runtime, checkpoint=tmp_path / "c")
    assert same(resumed, whole)
    assert resumed.history == whole.history
    assert not same(other, whole)


def test_draws_for_a_block_follow_from_its_seed_and_disturb_no_others(runtime: Runtime) -> None:
    before = torch.get_rng_state()
    draws = []
    for seed in (1, 1, 2):
        with runtime.drawing(seed):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "another seed came"),
        ({"learner": replace(TINY, architecture="cnn-w8", radius=2.0)}, "another architecture, radius came"),
        ({"learner": replace(TINY, architecture="simclr:cnn-w4")}, "another architecture, "),
        ({"train": blobs(24, seed=1)}, "another train came"),
        ({"test": blobs(9, seed=1)}, "another test came"),
        ({"answers": torch.zeros(24, 3)}, "another answers came"),
    ],
)
def test_another_training_s_checkpoint_is_refused(
    runtime: Runtime, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    given: dict[str, Any] = {"train": blobs(24), "test": blobs(9), "learner": TINY}
    given |= {"runtime": runtime, "checkpoint": tmp_path / "c"}
    with pytest.raises(KeyboardInterrupt):
        learn(**given, progress=stop_after(5))
    with pytest.raises(OutputError, match=rf"/c holds how far a training with {words}.* delete the file"):
        learn(**{**given, **change})
    assert len(learn(**given).history) == 3


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


@pytest.mark.parametrize(
    ("name", "adamw"),
    [
        ("vit-w32", True),
        ("simclr:vit", True),
        ("timm:vit_tiny_patch16_224", True),
        ("timm:deit_tiny_patch16_224", True),
        ("timm:swinv2_tiny_window8_256", True),
        ("transformers:/networks/dino", True),
        ("resnet18-imagenet", False),
        ("timm:convnext_tiny", False),
    ],
)
def test_transformers_train_with_adamw(name: str, adamw: bool) -> None:
    assert Learner(architecture=name).adamw is adamw
    assert Learner(architecture=name, optimiser="sgd").adamw is False


def test_a_record_names_no_place(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for prefix in ("", "simclr:"):
        learner = Learner(architecture=f"{prefix}transformers:{tmp_path}")
        name = learner.record()["architecture"]
        assert re.fullmatch(rf"{prefix}transformers:[0-9a-f]{{64}}", name)
    with pytest.raises(InputError, match="There is no weights file"):
        replace(TINY, weights=tmp_path / "absent").record()


def test_places_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="Unknown device 'tpu'; expected auto, cpu or cuda"):
        Runtime.find("tpu")
    with pytest.raises(UsageError, match="Unknown precision 'int8'; expected one of auto, bf16, float32"):
        Runtime.find("cpu", "int8")
    assert Runtime.find("cpu", "float32") == Runtime(device=torch.device("cpu"), precision="float32")


def test_a_process_may_ask_for_another_device_later(monkeypatch: pytest.MonkeyPatch) -> None:
    Runtime.find("cpu", "float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("cuda", "cpu", "cuda"):
        assert Runtime.find(device, "float32").device.type == device
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    assert Runtime.find("cpu", "float32").world == 2
    with pytest.raises(UsageError, match="2 processes began on cpu. Ask for one device throughout"):
        Runtime.find("cuda", "float32")


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
    with pytest.raises(
        OutputError, match="holds a finished run with other settings: seed was 0 and is 1 now"
    ):
        study(train, test, TINY, tmp_path / "out", runtime=runtime, seed=1)


def test_a_study_of_a_pretrained_network_keeps_its_folder_out_of_the_record(
    runtime: Runtime, tmp_path: Path, make_folder: Make
) -> None:
    from tests.models.test_transformers_vision import folder_of

    folder, images = folder_of("vit", tmp_path / "vit"), make_folder(blobs(12, size=(16, 16)))
    learner = replace(TINY, architecture=f"transformers:{folder}", epochs=1)
    learned = study(images, images, learner, tmp_path / "out", runtime=runtime)
    assert str(folder) not in (tmp_path / "out/run.json").read_text()
    model, about = load_model(tmp_path / "out/learner.safetensors")
    assert str(folder) not in json.dumps(about.notes)
    assert same(Learned(model=model, history=()), learned)


def test_a_learner_that_diverged_is_refused(runtime: Runtime, tmp_path: Path, make_folder: Make) -> None:
    folder, learner = make_folder(blobs(24)), replace(TINY, learning_rate=1e30)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"cnn-w4 has diverged: .* learning rate below 1e\+30"):
            study(folder, folder, learner, tmp_path / "out", runtime=runtime)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".privet"]
    assert len(learn(blobs(24), blobs(9), learner, runtime=runtime).history) == 3  # one of an audit's many


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
