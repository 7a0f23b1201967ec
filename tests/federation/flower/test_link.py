"""What the two ends say to each other: nothing is lost, and damage is one error."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tests.federation.flower.apps import model

from privet.errors import CodecError
from privet.federation.flower.link import (
    KEY,
    STYPE,
    arrays_of,
    difference,
    moved,
    only_arrays,
    pack,
    packed,
    record_of,
    schema_of,
    unpack,
)

KINDS = ("float16", "float32", "float64", "int8", "uint8", "int64", "bool")


@given(blobs=st.lists(st.binary(max_size=50), max_size=5))
def test_messages_come_out_as_they_went_in(blobs: list[bytes]) -> None:
    record = pack(blobs)
    assert packed(record) and unpack(record) == blobs


@given(blobs=st.lists(st.binary(max_size=20), min_size=1, max_size=3), cut=st.integers(1, 10))
def test_truncated(blobs: list[bytes], cut: int) -> None:
    data = pack(blobs)[KEY].data
    record = ArrayRecord({KEY: Array("uint8", (1,), STYPE, data[: max(0, len(data) - cut)])})
    whole = blobs
    while len(whole) and sum(len(blob) + 4 for blob in whole) > max(0, len(data) - cut):
        whole = whole[:-1]
    if sum(len(blob) + 4 for blob in whole) == max(0, len(data) - cut):
        assert unpack(record) == whole  # cut between two messages; how many there must be is known
    else:
        with pytest.raises(CodecError):
            unpack(record)


@settings(deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_a_difference_leads_there(data: st.DataObject, kind: str) -> None:
    shape = data.draw(arrays.array_shapes(min_dims=0, max_dims=2, max_side=4))
    elements = {"min_value": -100, "max_value": 100} if "float" in kind else None
    old, new = ({"x": data.draw(arrays.arrays(kind, shape, elements=elements))} for _ in range(2))
    found = moved(old, difference(new, old))["x"]
    assert found.dtype == new["x"].dtype and found.shape == new["x"].shape
    if "float" in kind:
        assert np.allclose(found, new["x"], rtol=1e-6, atol=0.2 if kind == "float16" else 1e-4)
    else:
        assert np.array_equal(found, new["x"])


def test_models_that_do_not_fit() -> None:
    base = model()
    for other, words in (
        ({**base, "more": base["bias"]}, "Expected arrays"),
        ({**base, "bias": base["bias"][:-1]}, "Expected bias as float32"),
        ({**base, "bias": base["bias"].astype(np.float64)}, "Expected bias as float32"),
    ):
        with pytest.raises(CodecError, match=words):
            difference(other, base)
    with pytest.raises(CodecError, match="one ArrayRecord, got 2"):
        only_arrays(RecordDict({"a": record_of(base), "b": record_of(base)}))


def test_arrays_keep_order_shape_and_dtype() -> None:
    base = model()
    found = arrays_of(record_of(base))
    assert list(found) == list(base)
    assert all(found[name].shape == base[name].shape for name in base)
    kinds = {tensor.name: tensor.dtype for tensor in schema_of(base).tensors}
    assert kinds == {
        "weight": "float32",
        "bias": "float32",
        "half": "float32",
        "count": "int64",
        "mask": "bool",
    }


def test_beyond_what_a_float_holds() -> None:
    """No warning, and nothing that looks like a number."""
    far = {"x": np.array([1e300, -1e300]), "y": np.array([6e4], np.float16)}
    assert np.isinf(difference(far, {"x": -far["x"], "y": -far["y"]})["x"]).all()
    assert np.isinf(moved(far, {"x": np.zeros(2, np.float32), "y": np.array([6e4], np.float32)})["y"]).all()
