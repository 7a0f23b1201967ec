"""Noise that a keyed stem takes away: exactly on the files, and without a trace of the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import blobs

from privet.errors import InputError, OutputError, UsageError
from privet.images import open_images
from privet.learning import Job, Runtime
from privet.protection import KeyedEM, publish

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
METHOD = KeyedEM(key=KEY, surrogate="cnn-w4", train_steps=3, batch_size=8, noise_steps=2, max_rounds=2)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(4, 13), st.integers(4, 13)),
    group=st.sampled_from([2, 4, 6, 16]),
    tile=st.integers(3, 9),
    epsilon=st.integers(1, 20),
    grey=st.sampled_from([(False, False), (False, True), (True, True)]),
)
def test_through_the_stem_the_files_are_the_originals_and_without_it_they_are_not(
    size: tuple[int, int],
    group: int,
    tile: int,
    epsilon: int,
    grey: tuple[bool, bool],
    runtime: Runtime,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    images = blobs(5, size=size, grey=grey[0])
    images.pixels[:2] = (images.pixels[:2].int() * 3 - 200).clamp(0, 255)  # with black and white
    method = replace(METHOD, group=group, tile=tile, epsilon=epsilon, grey=grey[1])
    if group > tile * tile:
        return
    out = tmp_path_factory.mktemp("run")
    publish(images, method, out, runtime=runtime)
    again = open_images(out, size=size)
    before = images.subset([images.names.index(name) for name in again.names]).pixels
    assert torch.equal(method.stem(again.pixels), method.stem(before))
    change = again.pixels.int() - before.int()
    assert 0 < int(change.abs().max()) <= epsilon
    other = replace(method, key=OTHER).stem
    assert not torch.equal(other(again.pixels), other(before))


def test_descents_use_the_whole_budget_of_a_group(runtime: Runtime) -> None:
    """Rounding at each step would leave the noise where it is: a step is shorter than 1/255."""
    images = blobs(6)
    method = replace(METHOD, max_rounds=6, step_size=0.4, noise_steps=20)
    change = method.protect(images, Job(runtime=runtime)).pixels.int() - images.pixels.int()
    assert float((change.abs() == 8).float().mean()) > 0.5


def test_the_key_is_nowhere(runtime: Runtime, tmp_path: Path) -> None:
    publish(blobs(6), METHOD, tmp_path / "out", runtime=runtime)
    text = repr(METHOD) + json.dumps(METHOD.settings())
    for secret in (KEY.hex(), repr(KEY)[2:-1]):
        assert secret not in text
        for path in (tmp_path / "out").rglob("*"):
            assert path.is_dir() or secret.encode() not in path.read_bytes()
    assert METHOD.settings()["key_commitment"] != replace(METHOD, key=OTHER).settings()["key_commitment"]


def test_a_run_with_another_key_does_not_go_on_with_this_one(runtime: Runtime, tmp_path: Path) -> None:
    publish(blobs(6), METHOD, tmp_path / "out", runtime=runtime)
    with pytest.raises(OutputError, match="settings"):
        publish(blobs(6), replace(METHOD, key=OTHER), tmp_path / "out", runtime=runtime)


def test_what_cannot_work_is_refused(
    runtime: Runtime, tmp_path: Path, make_folder: Callable[..., Path]
) -> None:
    with pytest.raises(
        UsageError, match="keyed-em needs a vendor's key: protect with 'privet license protect'"
    ):
        publish(blobs(6), replace(METHOD, key=b""), tmp_path / "out", runtime=runtime)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="at least 16 bytes, got 4"):
        METHOD.preset("cpu", key=b"1234").settings()
    with pytest.raises(UsageError, match="give keyed-em the setting grey=true"):
        METHOD.protect(blobs(6, grey=True), Job(runtime=runtime))
    folder = make_folder(blobs(6))
    with pytest.raises(InputError, match="must have one size of at most 224 px"):
        METHOD.protect(open_images(folder, size=16), Job(runtime=runtime))
