"""A lock: patterns found from pairs, taken off again, and the whole workflow with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privet.errors import InputError, LicenceError, UsageError, WrongLicenceError
from privet.images import ImageSet, align, open_images, write_images
from privet.learning import Job, Learner, Runtime, learn, publish_changed
from privet.licensing import (
    Unlock,
    Vendor,
    issue,
    load_licence,
    protect,
    read_licence,
    release,
    train,
    verify,
)
from privet.models import create_model
from privet.protection import UGE, Lock, publish
from privet.seeds import generator
from tests.conftest import blobs
from tests.licensing.conftest import EASY, OURS, THEIRS

KEY = bytes(range(32))
METHOD = Lock(key=KEY, surrogate="cnn-w4", train_steps=3, batch_size=8, max_rounds=2)
SMALL = {"surrogate": "cnn-w4", "train_steps": 3, "batch_size": 8, "max_rounds": 2}


def locked(images: ImageSet, epsilon: int, seed: int) -> tuple[ImageSet, torch.Tensor]:
    shape = (images.classes, *images.pixels.shape[1:])
    patterns = torch.randint(-epsilon, epsilon + 1, shape, generator=generator(seed, "patterns"))
    moved = images.pixels.int() + patterns[images.labels]
    return images.with_pixels(moved.clamp(0, 255).to(torch.uint8)), patterns


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 9),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    epsilon=st.integers(1, 60),
    extreme=st.booleans(),
    seed=st.integers(0, 99),
)
def test_unlocking_gives_the_originals_but_for_what_clipping_took(
    count: int, size: tuple[int, int], epsilon: int, extreme: bool, seed: int
) -> None:
    pixels = torch.randint(0, 256, (count, 3, *size), generator=generator(seed, "pixels"), dtype=torch.uint8)
    if extreme:
        pixels = (pixels > 127).to(torch.uint8) * 255
    labels = torch.arange(count) % 2
    images = ImageSet.from_arrays(pixels, labels, names=[f"{label}/{i}" for i, label in enumerate(labels)])
    protected, patterns = locked(images, epsilon, seed)
    unlock = Unlock.between(images, protected)
    opened = unlock.apply_to(protected)
    error = (opened.pixels.int() - images.pixels.int()).abs()
    clipped = ((images.pixels.int() + patterns[images.labels]) != protected.pixels.int()) | (
        (protected.pixels == 0) | (protected.pixels == 255)
    )
    assert not error[~clipped].any()
    assert int(error.max()) <= (epsilon + 1) // 2


def test_a_change_that_differs_within_a_class_is_no_lock() -> None:
    images = blobs(9)
    protected, _ = locked(images, 8, 0)
    spoilt = protected.pixels.clone()
    spoilt[4, 0, 0, 0] -= 1
    with pytest.raises(LicenceError, match="images of '1' were not changed by one pattern"):
        Unlock.between(images, protected.with_pixels(spoilt))


def test_a_class_without_images_needs_no_pattern() -> None:
    images = blobs(9)
    protected, _ = locked(images, 8, 0)
    unlock = Unlock.between(images, protected)
    more = {"class_names": (*images.class_names, "none of these")}
    opened = unlock.apply_to(replace(protected, **more))
    assert torch.equal(opened.pixels, unlock.apply_to(protected).pixels)
    assert set(Unlock.between(replace(images, **more), replace(protected, **more)).patterns) == {
        "0",
        "1",
        "2",
    }
    nothing = images.subset([])
    assert len(unlock.apply_to(nothing)) == 0


def test_what_does_not_fit_is_refused(runtime: Runtime) -> None:
    images = blobs(6)
    unlock = Unlock.between(images, locked(images, 8, 0)[0])
    with pytest.raises(InputError, match="opens the classes .*, got 'cat'"):
        unlock(images.pixels, "cat")
    with pytest.raises(InputError, match=r"Expected stored images \(3, 8, 8\) in uint8, got torch.float32"):
        unlock(images.pixels.float(), "0")
    with pytest.raises(InputError, match="got torch.uint8"):
        unlock(images.pixels[..., :4], "0")
    with pytest.raises(InputError, match="patterns in int16"):
        Unlock(patterns={"0": torch.zeros(3, 8, 8)})
    with pytest.raises(InputError, match="patterns in int16"):
        Unlock(patterns={})
    with pytest.raises(UsageError, match="leave mode at 'class'"):
        Lock(key=KEY, mode="sample")
    with pytest.raises(UsageError, match="lock needs a vendor's key"):
        Lock().settings()
    with pytest.raises(UsageError, match="lock protects with no earlier run's surrogate"):
        METHOD.protect(images, Job(runtime=runtime, surrogate=Path("surrogate.safetensors")))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(grey=st.sampled_from(["none", "some", "all"]), epsilon=st.integers(1, 16))
def test_what_the_method_writes_can_be_unlocked(
    grey: str, epsilon: int, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    parts = [blobs(6, grey=False), blobs(6, grey=True, seed=1)]
    images = parts[0] if grey == "none" else parts[1]
    if grey == "some":
        pixels = torch.cat([part.pixels for part in parts])
        names = [f"{name}-{number}" for number, part in enumerate(parts) for name in part.names]
        labels = torch.cat([part.labels for part in parts])
        images = ImageSet.from_arrays(pixels, labels, names=names)
        images = replace(images, grey=torch.cat([part.grey for part in parts]))
    publish(images, replace(METHOD, epsilon=epsilon), folder / "out", runtime=runtime)
    protected = align(open_images(folder / "out"), images.class_names)
    again = Unlock.between(images, protected).apply_to(protected)
    before = images.subset([images.names.index(name) for name in again.names]).pixels.int()
    inside = (protected.pixels > 0) & (protected.pixels < 255)
    assert torch.equal(again.pixels.int()[inside], before[inside])
    change = (protected.pixels.int() - before).abs()
    assert set(change[inside].tolist()) <= {0, epsilon}  # all of the budget, where a descent moved at all
    assert float((change[inside] == epsilon).float().mean()) > 0.9


def test_the_patterns_follow_from_the_key(runtime: Runtime) -> None:
    images, job = blobs(9), Job(runtime=runtime)
    one, again = METHOD.protect(images, job), METHOD.protect(images, job)
    other = replace(METHOD, key=bytes(32)).protect(images, job)
    assert torch.equal(one.pixels, again.pixels)
    share = (one.pixels != other.pixels).float().mean()
    assert share > 0.25, share  # of random signs half agree
    assert "key" not in METHOD.settings() and KEY.hex() not in str(METHOD.settings()) + repr(METHOD)


def test_a_licensee_learns_what_the_originals_teach(
    tmp_path: Path, runtime: Runtime, make_folder: Callable[..., Path]
) -> None:
    images = blobs(12)
    images.pixels.clamp_(20, 235)  # so that nothing clips
    clean = make_folder(images)
    vendor = Vendor.create(tmp_path / "vendor", OURS, work=EASY)
    opened = open_images(clean)
    protect(
        opened, vendor, "cats", tmp_path / "out", method="lock", preset="cpu", settings=SMALL, runtime=runtime
    )
    recipe = {"architecture": "cnn-w4", "epochs": 2, "batch_size": 6}
    with pytest.raises(UsageError, match="needs the originals"):
        release(tmp_path / "out", vendor, "cats", OURS, recipe=recipe, work=EASY)
    manifest = release(tmp_path / "out", vendor, "cats", OURS, clean=clean, recipe=recipe, work=EASY)
    assert set(manifest.commitments) == {"lock", "recipe"} and manifest.method == "lock"
    issue(vendor, "cats", OURS, licensee="Ada", passphrase=THEIRS, out=tmp_path / "ada", work=EASY)
    licence = read_licence(tmp_path / "ada", THEIRS)
    assert verify(tmp_path / "out", licence=licence).images == 12
    trained = train(tmp_path / "out", clean, licence, tmp_path / "net", runtime=runtime)
    protected = open_images(tmp_path / "out")
    order = [opened.names.index(name) for name in protected.names]
    assert not torch.equal(protected.pixels, opened.subset(order).pixels)
    expected = learn(opened.subset(order), opened, Learner(**recipe), runtime=runtime)  # type: ignore[arg-type]
    for a, b in zip(trained.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = {**licence.tensors, "lock/0": licence.tensors["lock/0"] + 1}
    with pytest.raises(WrongLicenceError, match="commits to"):
        verify(tmp_path / "out", licence=replace(licence, tensors=other))


def test_a_method_without_a_key_makes_no_release(tmp_path: Path, runtime: Runtime) -> None:
    vendor = Vendor.create(tmp_path / "vendor", OURS, work=EASY)
    with pytest.raises(
        UsageError, match="Unknown method 'em' for a release; expected one of keyed-em, lock, uge"
    ):
        protect(blobs(3), vendor, "cats", tmp_path / "out", method="em", preset="cpu", runtime=runtime)


def test_a_lock_of_ones_own_making_is_found(tmp_path: Path, runtime: Runtime) -> None:
    images = blobs(9)
    write_images(images, images, tmp_path / "clean", workers=1)
    publish_changed(
        images,
        lambda: locked(images, 8, 3)[0],
        tmp_path / "out",
        job=Job(runtime=runtime),
        record={"method": "ours"},
        workers=1,
    )
    vendor = Vendor.create(tmp_path / "vendor", OURS, work=EASY)
    manifest = release(
        tmp_path / "out", vendor, "dogs", OURS, lock=True, clean=tmp_path / "clean", recipe={}, work=EASY
    )
    assert set(manifest.commitments) == {"lock", "recipe"}


def test_keyed_initial_weights_go_into_the_licence(
    tmp_path: Path, runtime: Runtime, make_folder: Callable[..., Path]
) -> None:
    clean = make_folder(blobs(9))
    vendor = Vendor.create(tmp_path / "vendor", OURS, work=EASY)
    small = {
        "authorised": ("cnn-w4", "mobilenetv2-w4"),
        "encoders": ("cnn-w4",),
        "encoder_epochs": 1,
        "train_epochs": 1,
    }
    small |= {"points": 2, "refreshes": 0, "passes": 1, "batch_size": 4}
    opened = open_images(clean)
    protect(
        opened, vendor, "cats", tmp_path / "out", method="uge", preset="cpu", settings=small, runtime=runtime
    )
    files = [tmp_path / "vendor" / f"cats.weights{number}.safetensors" for number in ("", "-2")]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    manifest = release(tmp_path / "out", vendor, "cats", OURS, recipe={"epochs": 1}, work=EASY)
    assert set(manifest.commitments) == {"weights", "recipe"} and manifest.method == "uge"
    licence = read_licence(tmp_path / "vendor/cats.licence", OURS)
    assert licence.terms.recipe["architecture"] == "cnn-w4"
    network = create_model("cnn-w4", classes=3, size=(8, 8))
    load_licence(network, tmp_path / "vendor/cats.licence", OURS)
    expected = UGE(key=vendor.stem_key("cats"), **small).networks(opened)[0]  # type: ignore[arg-type]
    for one, other in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
