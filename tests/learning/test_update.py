"""The record of an update: whole, checked, or refused with one kind of error."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from privet.errors import InputError
from privet.files import sha256
from privet.learning import Treatment, Update, load_update, save_update
from privet.models import create_model


def update_of(**facts: Any) -> Update:
    model = create_model("lenet-strided-sigmoid-w2", classes=3, size=(8, 8))
    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 2])
    loss = F.cross_entropy(model(images), labels)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    known: dict[str, Any] = {"architecture": "lenet-strided-sigmoid-w2", "classes": 3, "size": (8, 8)}
    return Update.of(model, gradient, **{**known, "batch_size": len(images), **facts})


FULL: dict[str, Any] = {
    "kind": "delta",
    "images": 4,
    "local_steps": 3,
    "learning_rate": 0.1,
    "labels": (0, 1, 2, 2),
    "grey": True,
    "treatment": Treatment(
        clip=1.0, noise="gaussian", noise_scale=0.5, sparse=True, steps={"fc.bias": 0.25}, stochastic=True
    ),
    "notes": {"round": 3},
}


@pytest.mark.parametrize("facts", [{}, FULL], ids=["plain", "full"])
def test_a_record_comes_back(tmp_path: Path, facts: dict[str, Any]) -> None:
    before = update_of(**facts)
    save_update(tmp_path / "record", before)
    after = load_update(tmp_path / "record")
    for field in fields(Update):
        one, other = getattr(before, field.name), getattr(after, field.name)
        if field.name in ("weights", "values", "statistics"):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
        else:
            assert one == other, field.name


def test_tensors_may_share_memory(tmp_path: Path) -> None:
    one = update_of()
    save_update(tmp_path / "record", replace(one, values=one.weights))
    again = load_update(tmp_path / "record")
    assert all(torch.equal(again.values[name], value) for name, value in one.weights.items())


@pytest.mark.parametrize("note", [Path("photos"), torch.zeros(2), math.nan])
def test_notes_that_are_no_json_are_refused(tmp_path: Path, note: Any) -> None:
    with pytest.raises(InputError, match="Expected the notes of an update to be JSON values: "):
        save_update(tmp_path / "record", update_of(notes={"from": note}))
    assert not (tmp_path / "record").exists()


def test_the_example_in_the_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from privet.learning import update as module

    assert module.__doc__
    lines = [line[4:] for line in module.__doc__.splitlines() if line.startswith("    ")]
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {
        "model": create_model("lenet-sigmoid", classes=10, size=(32, 32)),
        "images": torch.rand(2, 3, 32, 32),
        "labels": torch.tensor([1, 2]),
        "F": F,
        "torch": torch,
        "Update": Update,
        "save_update": save_update,
        "Path": Path,
    }
    exec("\n".join(lines), scope)
    assert load_update(tmp_path / "update").batch_size == 2


def test_a_delta_becomes_the_mean_gradient() -> None:
    gradient = update_of()
    delta = replace(
        gradient,
        values={name: -0.1 * 3 * value for name, value in gradient.values.items()},
        kind="delta",
        local_steps=3,
        learning_rate=0.1,
        treatment=Treatment(clip=0.3, noise="laplace", noise_scale=0.6, steps={"fc.bias": 0.9}),
    )
    values, treatment = delta.as_gradient()
    for name, value in values.items():
        torch.testing.assert_close(value, gradient.values[name])
    assert treatment.clip == pytest.approx(1)
    assert treatment.noise_scale == pytest.approx(2)
    assert treatment.steps["fc.bias"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"classes": 0}, "classes between 1 and"),
        ({"size": (8, 0)}, "size between 1 and"),
        ({"size": (8, 8, 8)}, "height and width"),
        ({"batch_size": 0, "images": 1}, "batch_size between 1 and"),
        ({"images": 1}, "A batch of 2 cannot come from 1 images"),
        ({"kind": "weights"}, "kind to be gradient or delta"),
        ({"mode": "test"}, "mode to be train or eval"),
        ({"channels": 2}, "channels to be 1 or 3"),
        ({"local_steps": 2}, "Record several steps as a delta"),
        ({"kind": "delta"}, "set learning_rate"),
        ({"kind": "delta", "learning_rate": 0.0}, "learning_rate to be finite and above 0"),
        ({"labels": (0,)}, "a label from 0 to 2 for each of 2 images"),
        ({"labels": (0, 3)}, "a label from 0 to 2 for each of 2 images"),
        ({"treatment": Treatment(steps={"fc.gain": 1.0})}, "'fc.gain', which was not sent"),
        ({"statistics": {"fc.mean": torch.zeros(1)}}, "'fc.mean', which is not among the weights"),
    ],
)
def test_what_cannot_be_is_refused(facts: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        update_of(**facts)


def test_wrong_tensors_are_refused() -> None:
    update = update_of()
    bias = update.values["fc.bias"]
    for value, words in (
        (bias * torch.nan, "NaN or infinity in 'fc.bias'"),
        (bias[:1], r"of shape \(3,\) for 'fc.bias', got \(1,\)"),
        (bias.double(), "one floating-point type"),
    ):
        with pytest.raises(InputError, match=words):
            replace(update, values={**update.values, "fc.bias": value})
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64):
        with pytest.raises(InputError, match=f"holds {dtype} in 'fc.bias'; expected floats of 16 to 64 bits"):
            replace(update, weights={**update.weights, "fc.bias": bias.to(dtype)})
    with pytest.raises(InputError, match="NaN or infinity in 'deep'"):
        replace(update, weights={**update.weights, "deep": torch.full([1] * 70, torch.nan)})
    with pytest.raises(InputError, match="nothing was sent"):
        replace(update, values={})
    model = create_model("lenet-strided-sigmoid-w2", classes=3, size=(8, 8))
    with pytest.raises(InputError, match="a value for each of 8 parameters, got 1"):
        Update.of(model, [bias], architecture="x", classes=3, size=(8, 8), batch_size=1)
    for wrong, words in (
        ({"noise": "gaussian"}, "together"),
        ({"noise": "uniform", "noise_scale": 1.0}, "gaussian or laplace"),
        ({"clip": -1.0}, "treatment.clip"),
    ):
        with pytest.raises(InputError, match=words):
            Treatment(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "record"
    save_update(folder, update_of(**FULL))
    return folder


def damaged(record: Path, name: str, data: bytes) -> None:
    """Loading this in place of a file gives a record that passes all checks, or one typed error."""
    before = (record / name).read_bytes()
    (record / name).write_bytes(data)
    try:
        load_update(record)
    except InputError as error:
        assert str(record) in str(error)
    finally:
        (record / name).write_bytes(before)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(["update.json", "update.safetensors"]))
def test_damaged_files_end_in_one_error(record: Path, data: st.DataObject, name: str) -> None:
    whole = (record / name).read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged(record, name, whole[:place])
    else:
        other = data.draw(st.binary(max_size=4))
        damaged(record, name, whole[:place] + other + whole[place + 1 :])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), value=JSON)
def test_any_json_value_anywhere_is_checked(record: Path, data: st.DataObject, value: Any) -> None:
    whole = json.loads((record / "update.json").read_text())
    part = whole["treatment"] if data.draw(st.booleans()) else whole
    part[data.draw(st.sampled_from([*part, "another"]))] = value
    damaged(record, "update.json", json.dumps(whole).encode())


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"format": "privet-update-2"}', "1e999"])
def test_what_is_no_record(record: Path, text: str) -> None:
    before = (record / "update.json").read_bytes()
    (record / "update.json").write_text(text)
    with pytest.raises(InputError):
        load_update(record)
    (record / "update.json").write_bytes(before)


SIDES = st.sampled_from([0, 1, 2, 2**31, 2**63 - 1, 2**63, 2**64 - 1])


@settings(max_examples=150, deadline=None)
@given(shape=st.lists(SIDES, max_size=70), kind=st.sampled_from(["F32", "BOOL", "F8_E4M3", "F4"]))
@example(shape=[0, 2**63], kind="F32")
def test_any_shape_in_a_header_is_checked(record: Path, shape: list[int], kind: str) -> None:
    """Whoever writes a record also writes the hash that it must have."""
    header = {"values/fc.bias": {"dtype": kind, "shape": shape, "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text
    before = (record / "update.json").read_bytes()
    (record / "update.json").write_text(json.dumps({**json.loads(before), "tensors": sha256(data)}))
    damaged(record, "update.safetensors", data)
    (record / "update.json").write_bytes(before)


def test_tensors_of_another_record_are_refused(record: Path, tmp_path: Path) -> None:
    save_update(tmp_path / "other", update_of())
    (tmp_path / "other" / "update.json").write_bytes((record / "update.json").read_bytes())
    with pytest.raises(InputError, match="is not the file that update.json describes"):
        load_update(tmp_path / "other")
    (tmp_path / "other" / "update.safetensors").unlink()
    with pytest.raises(InputError, match="Cannot read"):
        load_update(tmp_path / "other")
