"""What every protection must pass. Adding a method is adding a row to TABLE."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import blobs, stop_after
from tests.images.test_write import tree
from torch import Tensor

from privet.errors import BudgetError, InputError, OutputError, UsageError
from privet.images import ImageSet, compare_all, open_images
from privet.learning import Runtime
from privet.learning import chunks as module
from privet.protection import (
    AR,
    CUDA,
    EM,
    LSP,
    METHODS,
    OPS,
    PIL,
    REM,
    SEM,
    TAP,
    TUE,
    UCL,
    UGE,
    Bounded,
    Job,
    KeyedEM,
    Lock,
    Protection,
    RandomNoise,
    base,
)
from privet.protection.base import Perturb
from privet.protection.publication import publish

Make = Callable[..., Path]

SMALL = {"surrogate": "cnn-w4", "train_steps": 3, "batch_size": 8, "noise_steps": 2}
KEY = bytes(range(32))
UNGENERALIZABLE = {
    "key": KEY,
    "authorised": ("cnn-w4",),
    "encoders": ("vgg11-w4",),
    "encoder_epochs": 1,
    "train_epochs": 1,
    "points": 2,
    "refreshes": 1,
    "passes": 1,
    "batch_size": 8,
}
CONTRASTIVE = {"surrogate": "cnn-w4", "class_steps": 2, "train_steps": 2, "batch_size": 8, "noise_steps": 2}

TABLE: dict[str, Protection] = {
    "em": EM(max_rounds=2, **SMALL),
    "em class-wise": EM(mode="class", max_rounds=2, **SMALL),
    "em with views": EM(views=1, max_rounds=2, **SMALL),
    "sem": SEM(views=2, attack_steps=2, **SMALL),
    "sem, warm": SEM(views=2, attack_steps=2, warm_start=True, train_noise_steps=1, train_views=1, **SMALL),
    "rem": REM(views=2, attack_steps=2, **SMALL),
    "tap": TAP(surrogate="cnn-w4", epochs=2, batch_size=8, noise_steps=3, restarts=2),
    "pil": PIL(epochs=2, batch_size=8, noise_steps=3),
    "pil with views": PIL(epochs=2, batch_size=8, noise_steps=3, views=2),
    "ucl": UCL(class_rounds=1, rounds=1, **CONTRASTIVE),
    "ucl class-wise": UCL(class_rounds=2, rounds=0, **CONTRASTIVE),
    "tue": TUE(rounds=2, **CONTRASTIVE),
    # One descent: of a few groups, several might all come back to where they were.
    "keyed-em": KeyedEM(key=KEY, grey=True, max_rounds=1, **{**SMALL, "noise_steps": 1}),
    "lock": Lock(key=KEY, max_rounds=2, **SMALL),
    "uge": UGE(**UNGENERALIZABLE),
    "lsp": LSP(patch=4),
    "ar": AR(),
    "ops": OPS(),
    "cuda": CUDA(),
    "random": RandomNoise(),
    "random, l2": RandomNoise(norm="l2", epsilon=1.0),
    "random, l0": RandomNoise(norm="l0", epsilon=2),
}
BUDGETS = {"linf": [1, 3, 8, 127], "l2": [1.0, 3.0], "l0": [1, 2], "none": [None]}


def job(runtime: Runtime, workspace: Path | None = None, **options: object) -> Job:
    return Job(runtime=runtime, workspace=workspace, checkpoint_seconds=0, **options)  # type: ignore[arg-type]


def difference(before: ImageSet, after: ImageSet) -> Tensor:
    return after.pixels.short() - before.pixels.short()


def test_every_method_has_a_row() -> None:
    assert {method.name for method in TABLE.values()} == set(METHODS)


@pytest.mark.parametrize("method", TABLE.values(), ids=TABLE)
class TestEvery:
    @settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        data=st.data(),
        height=st.integers(4, 12),
        width=st.integers(4, 12),
        count=st.integers(3, 9),
        grey=st.booleans(),
        seed=st.integers(0, 5),
    )
    def test_budget_holds_on_the_files_read_back(
        self,
        method: Protection,
        data: st.DataObject,
        height: int,
        width: int,
        count: int,
        grey: bool,
        seed: int,
        runtime: Runtime,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        folder = tmp_path_factory.mktemp("run")
        images = blobs(count, size=(height, width), grey=grey, seed=seed)
        norm = method.budget.norm
        if (epsilon := data.draw(st.sampled_from(BUDGETS[norm]))) is not None:
            method = replace(method, epsilon=epsilon)  # type: ignore[call-arg]
        publish(images, method, folder / "out", runtime=runtime, seed=seed)
        again = open_images(folder / "out", size=images.size)
        pixels = dict(zip(again.names, again.pixels, strict=True))
        for name, original in zip(images.names, images.pixels, strict=True):
            change = (pixels[name].short() - original.short()).abs().numpy()
            measured = {
                "linf": change.max(),
                "l2": np.linalg.norm(change / 255) * 32 / np.sqrt(height * width),
                "l0": (change > 0).any(0).sum(),
                "none": 0,
            }
            assert change.max() > 0
            assert measured[norm] <= (epsilon or 0) * (1 + 1e-9)
        assert bool(again.grey.all()) is grey

    def test_labels_names_and_originals_are_left_alone(self, method: Protection, runtime: Runtime) -> None:
        images = blobs(5)
        before = images.pixels.clone()
        protected = method.protect(images, job(runtime))
        assert torch.equal(images.pixels, before)
        assert torch.equal(protected.labels, images.labels)
        assert protected.names == images.names

    def test_one_seed_is_one_result(self, method: Protection, runtime: Runtime) -> None:
        images = blobs(9)
        first, second, other = (method.protect(images, job(runtime, seed=seed)).pixels for seed in (0, 0, 1))
        assert torch.equal(first, second)
        assert torch.equal(first, other) is isinstance(method, OPS)  # which draws nothing at random

    def test_every_image_is_perturbed_whatever_the_batch(
        self, method: Protection, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "CHUNK", 4)
        images = blobs(11)  # batches of 8 leave three out, chunks of 4 leave a short one
        changed = difference(images, method.protect(images, job(runtime))).abs().amax((1, 2, 3))
        assert bool((changed > 0).all())

    def test_the_order_of_files_changes_nothing(
        self, method: Protection, runtime: Runtime, make_folder: Make, tmp_path: Path
    ) -> None:
        images = blobs(9)
        folder = make_folder(images)
        rows = [
            f"{name}.png,{images.class_names[int(label)]}"
            for name, label in zip(images.names, images.labels, strict=True)
        ]
        results = []
        for number, order in enumerate((rows, rows[::-1])):
            (folder / "t.csv").write_text("\n".join(["path,label", *order]))
            publish(
                open_images(folder / "t.csv", workers=1 + number),
                method,
                tmp_path / str(number),
                runtime=runtime,
                workers=1 + number,
            )
            results.append(tree(tmp_path / str(number)))
        assert results[0] == results[1]

    def test_interrupted_anywhere_it_ends_with_the_same_bytes(
        self, method: Protection, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "CHUNK", 4)
        images = blobs(10)
        publish(images, method, tmp_path / "whole", runtime=runtime, checkpoint_seconds=0)
        expected = tree(tmp_path / "whole")
        reports = 1
        while True:
            try:
                publish(
                    images,
                    method,
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

    def test_one_class_is_refused_where_noise_tells_classes_apart(
        self, method: Protection, runtime: Runtime
    ) -> None:
        images = ImageSet.from_arrays(torch.full((2, 3, 4, 4), 250, dtype=torch.uint8), torch.tensor([0, 0]))
        if isinstance(method, RandomNoise) or method.name == "ucl":
            assert not torch.equal(images.pixels, method.protect(images, job(runtime)).pixels)
            return
        with pytest.raises(InputError, match=f"{method.name} needs at least 2 classes"):
            method.protect(images, job(runtime))

    def test_images_of_one_colour(self, method: Protection, runtime: Runtime) -> None:
        images = ImageSet.from_arrays(torch.full((4, 3, 4, 4), 250, dtype=torch.uint8), torch.arange(4) // 2)
        protected = method.protect(images, job(runtime))
        changes = compare_all(images.pixels, protected.pixels, ssim=False)
        assert not any(method.budget.excess(one, (4, 4), seen=(4, 4)) for one in changes)
        assert not torch.equal(images.pixels, protected.pixels)

    def test_nothing_to_protect_is_an_error(self, method: Protection, runtime: Runtime) -> None:
        with pytest.raises(InputError, match="There is no image to protect"):
            method.protect(blobs(0), job(runtime))

    def test_settings_are_json(self, method: Protection) -> None:
        assert json.loads(json.dumps(method.settings())) == method.settings()

    def test_presets_can_be_built(self, method: Protection) -> None:
        for preset in ("paper", "cpu"):
            assert type(method).preset(preset).name == method.name
        if isinstance(method, Bounded):
            assert type(method).preset("cpu", epsilon=4).epsilon == 4
        with pytest.raises(UsageError, match="Unknown preset 'huge'"):
            type(method).preset("huge")
        with pytest.raises(UsageError, match="has no setting 'colour'; it has "):
            type(method).preset("cpu", colour=1)


SURROGATES = {  # a lock's surrogate finds no second set of the same patterns
    name: method for name, method in TABLE.items() if hasattr(method, "surrogate") and name != "lock"
}


@pytest.mark.parametrize("method", SURROGATES.values(), ids=SURROGATES)
class TestThoseWithASurrogate:
    def test_the_surrogate_protects_further_images_without_training(
        self, method: Protection, runtime: Runtime, tmp_path: Path
    ) -> None:
        publish(blobs(9), method, tmp_path / "first", runtime=runtime)
        surrogate = tmp_path / "first/surrogate.safetensors"
        stages = set()
        further = publish(
            blobs(6, seed=1),
            method,
            tmp_path / "second",
            runtime=runtime,
            surrogate=surrogate,
            progress=lambda stage, done, total: stages.add(stage),
        )
        assert further.written.ok == 6
        assert stages == {"perturbing", "writing"}
        again, before = open_images(tmp_path / "second"), blobs(6, seed=1)
        order = [before.names.index(name) for name in again.names]
        noise = again.pixels.short() - before.pixels[order].short()
        assert int(noise.abs().max()) == 8  # all of the budget, not what one round adds
        if getattr(method, "mode", "sample") == "class":
            assert float((noise[0] == noise[1]).float().mean()) > 0.9  # the rest was clipped at white

    def test_further_images_may_lack_a_class(
        self, method: Protection, runtime: Runtime, tmp_path: Path
    ) -> None:
        publish(blobs(9), method, tmp_path / "first", runtime=runtime)
        further = blobs(6, seed=1)
        surrogate = Job(runtime=runtime, surrogate=tmp_path / "first/surrogate.safetensors")
        expected = method.protect(further, surrogate)
        assert (further.labels > 0).any() and (further.labels == 0).any()
        turned = replace(further, labels=2 - further.labels, class_names=("2", "1", "0"))
        assert torch.equal(method.protect(turned, surrogate).pixels, expected.pixels)
        some = further.subset(torch.nonzero(further.labels > 0)[:, 0])
        fewer = replace(some, labels=some.labels - 1, class_names=("1", "2"))
        found = method.protect(fewer, surrogate)
        assert torch.equal(found.labels, fewer.labels) and found.class_names == ("1", "2")

    def test_a_surrogate_of_other_classes_is_refused(
        self, method: Protection, runtime: Runtime, tmp_path: Path
    ) -> None:
        publish(blobs(6, classes=2), method, tmp_path / "first", runtime=runtime)
        with pytest.raises(
            InputError, match=r"was trained on the classes \['0', '1'\], but these images have \['2'\], too"
        ):
            publish(
                blobs(9),
                method,
                tmp_path / "second",
                runtime=runtime,
                surrogate=tmp_path / "first/surrogate.safetensors",
            )

    def test_a_surrogate_of_another_kind_is_refused(
        self, method: Protection, runtime: Runtime, tmp_path: Path
    ) -> None:
        other = TABLE["em" if isinstance(method, UCL) else "ucl"]
        publish(blobs(9), other, tmp_path / "first", runtime=runtime)
        surrogate = tmp_path / "first/surrogate.safetensors"
        with pytest.raises(
            InputError, match="learned with.* labels .*; this method needs one that learned with"
        ):
            publish(blobs(6), method, tmp_path / "second", runtime=runtime, surrogate=surrogate)
        with pytest.raises(
            UsageError, match=f"{method.name} needs a surrogate without 'simclr:', got 'simclr:cnn'"
        ):
            replace(method, surrogate="simclr:cnn")  # type: ignore[call-arg]

    def test_a_broken_surrogate_is_one_error(
        self, method: Protection, runtime: Runtime, tmp_path: Path
    ) -> None:
        (tmp_path / "x.safetensors").write_bytes(b"not weights")
        with pytest.raises(InputError, match="is not a whole safetensors file"):
            publish(blobs(6), method, tmp_path / "out", runtime=runtime, surrogate=tmp_path / "x.safetensors")


def test_a_surrogate_for_a_method_without_one_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ops protects with no earlier run's surrogate: leave it out"):
        publish(blobs(6), OPS(), tmp_path / "out", runtime=runtime, surrogate=tmp_path / "absent")


@dataclass(frozen=True, kw_only=True)
class Rogue(Bounded):
    """A method that respects nothing."""

    value: str = "50"  # settings that are numbers must be finite
    channels: int = 3

    name: ClassVar[str] = "rogue"

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            noise = torch.full((len(index), self.channels, *images.size), float(self.value))
            return noise + torch.arange(self.channels).view(1, -1, 1, 1)

        return perturb


def test_no_method_can_leave_the_budget(runtime: Runtime) -> None:
    for grey in (False, True):
        images = blobs(4, grey=grey)
        change = difference(images, Rogue(value="50").protect(images, job(runtime)))
        assert int(change.abs().max()) == 8
        tied = difference(images, Rogue(value="1.3", epsilon=2).protect(images, job(runtime)))
        assert torch.equal(tied[:, 0], tied[:, 2]) is grey


@pytest.mark.parametrize(
    ("value", "colour", "grey"), [("0.2", [0, 1, 2], 1), ("0.7", [1, 2, 3], 2), ("7.2", [7, 8, 8], 8)]
)
def test_a_grey_file_gets_the_mean_of_the_channels_and_others_each_its_own(
    runtime: Runtime, value: str, colour: list[int], grey: int
) -> None:
    images = blobs(4, grey=True)
    mixed = replace(images, grey=torch.tensor([False, True, True, False]))
    change = difference(mixed, Rogue(value=value).protect(mixed, job(runtime)))  # value, value + 1, value + 2
    expected = torch.tensor([colour, [grey] * 3, [grey] * 3, colour])
    assert torch.equal(change, expected.view(4, 3, 1, 1).expand_as(change))


def test_pixels_end_at_black_and_white(runtime: Runtime) -> None:
    for shade, value in ((255, "50"), (3, "-50")):
        pixels = torch.full((4, 3, 8, 8), shade, dtype=torch.uint8)
        images = ImageSet.from_arrays(pixels, torch.arange(4) % 2)
        end = Rogue(value=value).protect(images, job(runtime)).pixels
        assert end.unique().tolist() == [255 if shade > 3 else 0]


@pytest.mark.parametrize("broken", [{"value": "nan"}, {"value": "inf"}, {"channels": 2}])
def test_nonsense_from_a_method_is_one_error(runtime: Runtime, broken: dict[str, object]) -> None:
    with pytest.raises(BudgetError, match="rogue returned a perturbation of shape"):
        Rogue(**broken).protect(blobs(4), job(runtime))  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [0, 3])
def test_bytes_that_are_tampered_with_are_found(
    runtime: Runtime, tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CHUNK", 3)
    images = blobs(4)
    RandomNoise().protect(images, job(runtime, tmp_path))
    array = np.load(tmp_path / "changed.npy", mmap_mode="r+")
    array[place, 0, 0, 0] = int(images.pixels[place, 0, 0, 0]) - 9
    array.flush()
    with pytest.raises(BudgetError, match=r"random changed \S+ by 9/255; the budget is 8/255"):
        RandomNoise().protect(images, job(runtime, tmp_path))


@pytest.mark.parametrize("epsilon", [0, 128, 2.5])
def test_an_impossible_budget_is_refused(epsilon: float) -> None:
    with pytest.raises(
        UsageError, match=r"Expected epsilon as a whole number from 1 to 127 \(in 1/255\), got"
    ):
        RandomNoise(epsilon=epsilon)  # type: ignore[arg-type]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="sem needs views of at least 1, got 0"):
        SEM(views=0)
    with pytest.raises(UsageError, match="Unknown mode 'pixel'; expected sample or class"):
        EM(mode="pixel")
    with pytest.raises(UsageError, match="em needs max_rounds of at least 1, got 0"):
        EM(max_rounds=0)
    with pytest.raises(UsageError, match="Expected a radius of 0 to 255"):
        REM(radius=256)
    with pytest.raises(UsageError, match="rem needs attack_steps as a number of at least 0, got -1"):
        REM(attack_steps=-1)


@pytest.mark.parametrize("name", ["em class-wise", "ucl class-wise"])
def test_class_wise_noise_is_one_pattern_a_class(runtime: Runtime, name: str) -> None:
    images = ImageSet.from_arrays(
        torch.randint(40, 200, (9, 3, 8, 8), dtype=torch.uint8), torch.arange(9) % 3
    )
    change = difference(images, TABLE[name].protect(images, job(runtime)))
    for label in range(3):
        members = change[images.labels == label]
        assert bool((members == members[0]).all())
    assert not torch.equal(change[0], change[1])


def test_noise_of_each_image_is_its_own(runtime: Runtime) -> None:
    """Noise that is looked up by position must follow its image, not its class or its place."""
    images = blobs(12)
    method = EM(max_rounds=3, **SMALL)
    change = difference(images, method.protect(images, job(runtime)))
    assert len({bytes(one.numpy().tobytes()) for one in change}) == len(images)
    captured: dict[str, Tensor] = {}

    def spy(index: Tensor, randomness: torch.Generator) -> Tensor:
        delta = perturb(index, randomness)
        for name, one in zip((images.names[i] for i in index.tolist()), delta, strict=True):
            captured[name] = one
        return delta

    perturb = method._perturb(images, job(runtime))
    whole = spy(torch.arange(12), torch.Generator())
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    assert torch.equal(perturb(shuffled, torch.Generator()), whole[shuffled])


def test_random_noise_uses_the_whole_budget(runtime: Runtime) -> None:
    images = ImageSet.from_arrays(
        torch.full((40, 3, 8, 8), 128, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64)
    )
    change = difference(images, RandomNoise(epsilon=5).protect(images, job(runtime)))
    assert sorted(change.unique().tolist()) == [-5, 5]
    assert abs(float(change.float().mean())) < 0.2


def test_rem_attacks_the_views_and_sem_does_not(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """REM's inner attack is what most implementations leave out; count its passes."""
    from privet.learning import attack

    counts = {}
    plain = attack.input_gradient
    for name in ("sem", "rem"):
        calls = 0

        def counted(*arguments: object, **options: object) -> Tensor:
            nonlocal calls
            calls += 1
            return plain(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(attack, "input_gradient", counted)  # the attacks' passes, not the noise's
        TABLE[name].protect(blobs(8), job(runtime))
        counts[name] = calls
    steps, noise_steps, attack_steps = 3, 2, 2
    assert counts["sem"] == steps * attack_steps
    assert counts["rem"] == steps * attack_steps + (steps + 1) * noise_steps * attack_steps


def test_another_run_s_folder_is_left_alone(runtime: Runtime, tmp_path: Path) -> None:
    images = blobs(4)
    publish(images, RandomNoise(), tmp_path / "out", runtime=runtime)
    before = tree(tmp_path / "out")
    assert publish(images, RandomNoise(), tmp_path / "out", runtime=runtime).written.ok == 4
    assert tree(tmp_path / "out") == before
    with pytest.raises(
        OutputError,
        match=r"holds a finished run with other settings: budget.amount was 8.* and is 3.* now; seed was 0 and is 1 now; settings.epsilon was",
    ):
        publish(images, RandomNoise(epsilon=3), tmp_path / "out", runtime=runtime, seed=1)
    assert tree(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match="holds other files. Choose an empty or a new folder"):
        publish(images, RandomNoise(), tmp_path / "mine", runtime=runtime)


def test_a_finished_run_mends_what_was_deleted(runtime: Runtime, tmp_path: Path) -> None:
    images = blobs(4)
    publish(images, RandomNoise(), tmp_path / "out", runtime=runtime)
    before = tree(tmp_path / "out")
    (tmp_path / "out/0/0000.png").unlink()
    publish(images, RandomNoise(), tmp_path / "out", runtime=runtime)
    assert tree(tmp_path / "out") == before
