"""What every codec must pass. Adding a codec is adding a row to TABLE."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.federation.common import BOTH, Update, network, numba, refused_or_sound, same_bits, signed

from privet.errors import CodecError, InputError, UsageError
from privet.federation import (
    CODECS,
    DHQ,
    EDEN,
    FP16,
    QSGD,
    STC,
    Codec,
    DeadZone,
    Int8,
    Lloyd,
    MeanSplit,
    ScaledSign,
    Schema,
    SenderState,
    TernGrad,
    TopK,
    decode,
)
from privet.federation.schema import FLOATS, INTEGERS

TABLE: dict[str, Codec] = {
    "dhq": DHQ(),
    "dhq, depth 0": DHQ(quantiser=MeanSplit(0)),
    "dhq, depth 6": DHQ(quantiser=MeanSplit(6)),
    "dhq, lloyd": DHQ(quantiser=Lloyd(2)),
    "dhq, dead zone": DHQ(quantiser=DeadZone()),
    "dhq, rice": DHQ(context=False),
    "fp16": FP16(),
    "int8": Int8(),
    "qsgd": QSGD(),
    "qsgd, 1 level": QSGD(levels=1, bucket=64),
    "terngrad": TernGrad(),
    "sign": ScaledSign(),
    "topk": TopK(),
    "stc": STC(),
    "eden": EDEN(),
    "eden, 4 bits": EDEN(bits=4),
}
every = pytest.mark.parametrize("name", TABLE)


def test_every_codec_is_in_the_table() -> None:
    assert {type(codec) for codec in TABLE.values()} == set(CODECS.values())
    assert len({codec.number for codec in CODECS.values()}) == len(CODECS)


@every
def test_what_is_decoded_is_what_the_encoder_thinks(name: str) -> None:
    codec, update = TABLE[name], network()
    schema = Schema.of(update)
    values, _ = schema.flatten(update)
    blobs = []
    for used in BOTH:
        with numba(used):
            state = SenderState(seed=5)
            blob = codec.encode(update, state=state)
            assert blob == codec.encode(update, state=SenderState(seed=5))
            decoded = decode(blob, schema)
            told, _ = schema.flatten({key: value.astype(update[key].dtype) for key, value in decoded.items()})
            _, expected = codec._fitting(values.copy(), schema, None, {}, _seed(codec, state))
            assert same_bits(told, expected.dense(schema.size))
            if codec.feedback:
                assert state.residual is not None and same_bits(state.residual, values - told)
            else:
                assert state.residual is None
            blobs.append((blob, told.tobytes()))
    assert blobs[0] == blobs[1]  # Numba and numpy
    assert list(decoded) == sorted(update)
    assert decoded["norm.num_batches_tracked"] == 12 and decoded["norm.num_batches_tracked"].dtype == np.int64
    largest = np.abs(update["conv.bias"]).max()
    assert np.abs(decoded["conv.bias"] - update["conv.bias"]).max() <= largest / 200


def _seed(codec: Codec, state: SenderState) -> int:
    from privet.seeds import derive

    return derive(state.seed, "codec", state.round)


@every
def test_a_message_that_is_cut_anywhere_is_refused(name: str) -> None:
    update = {key: network()[key] for key in ("conv.bias", "wide.bias", "norm.num_batches_tracked")}
    blob, schema = TABLE[name].encode(update), Schema.of(update)
    assert not refused_or_sound(blob, schema)
    for length in range(len(blob)):
        with pytest.raises(CodecError):
            decode(blob[:length], schema)
        if 4 <= length:  # with the right checksum, so that the parts themselves must notice
            with pytest.raises(CodecError):
                decode(signed(blob[:length]), schema)
    for more in (blob + b"\0", signed(blob[:-4] + b"\0" + blob[-4:])):
        with pytest.raises(CodecError):
            decode(more, schema)


@every
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(data=st.data())
def test_damaged_messages_are_refused_or_sound(name: str, data: st.DataObject) -> None:
    update = network()
    schema = Schema.of(update)
    blob = bytearray(_blob(name))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(blob) - 5))
        kind = data.draw(st.sampled_from(["set", "flip", "cut", "insert", "repeat"]))
        if kind == "set":
            blob[at] = data.draw(st.integers(0, 255))
        elif kind == "flip":
            blob[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del blob[at : at + data.draw(st.integers(1, 8))]
        elif kind == "insert":
            blob[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            blob[at:at] = blob[at : at + 8]
    outcomes = []
    for used in BOTH:
        with numba(used):
            outcomes.append(refused_or_sound(signed(bytes(blob)), schema))
    assert outcomes[0] == outcomes[1]


_BLOBS: dict[str, bytes] = {}


def _blob(name: str) -> bytes:
    if name not in _BLOBS:
        _BLOBS[name] = TABLE[name].encode(network())
    return _BLOBS[name]


ARRAYS = st.one_of(
    hnp.arrays(
        st.sampled_from(FLOATS + INTEGERS),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
    ),
    hnp.arrays(
        st.sampled_from(FLOATS),
        st.sampled_from([(256,), (300,), (16, 17), (3, 100), (100, 3), (4, 8, 3, 3)]),
        elements=st.floats(-1000, 1000, width=16) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-20]),
    ),
)


@every
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(arrays=st.lists(ARRAYS, max_size=4), state=st.booleans())
def test_any_arrays_come_back_or_are_refused(name: str, arrays: list[np.ndarray], state: bool) -> None:
    update = {f"t{at}": array for at, array in enumerate(arrays)}
    schema = Schema.of(update)
    with np.errstate(over="ignore"):
        good = all(array.dtype.kind != "f" or np.isfinite(array.astype(np.float32)).all() for array in arrays)
    sender = SenderState() if state else None
    blobs = []
    for used in BOTH:
        with numba(used):
            if not good:
                with pytest.raises(InputError, match="Expected finite float32 values, but t"):
                    TABLE[name].encode(update, state=sender)
                assert sender is None or (sender.sent is None and sender.residual is None)
                continue
            blobs.append(TABLE[name].encode(update, state=SenderState() if state else None))
            assert not refused_or_sound(blobs[-1], schema)
            decoded = decode(blobs[-1], schema)
            for key, array in update.items():
                if array.dtype.kind not in "f":
                    assert np.array_equal(decoded[key], array)
    assert len(set(blobs)) <= 1


@every
def test_nothing_of_value(name: str) -> None:
    """All zeros, one value, ties, and the edges of float32."""
    for values in (
        np.zeros(300),
        np.eye(20)[3:17].ravel() * 1e-30,
        np.full(300, -2.5),
        np.full(300, 3.4e38),
        np.full(300, 1e-45),
        np.geomspace(1e-38, 1e38, 300),
    ):
        update: Update = {"w": values.astype(np.float32)}
        decoded = decode(TABLE[name].encode(update), Schema.of(update))["w"]
        assert np.isfinite(decoded).all()
        if not values.any():
            assert not decoded.any()


@every
def test_messages_are_for_one_model(name: str) -> None:
    update = network()
    blob = TABLE[name].encode(update)
    others = (
        Schema.of(update, dense=["fc.weight"]),
        Schema.of({key + "x": update[key] for key in update}),
        Schema.of(update | {"fc.weight": update["fc.weight"].T}),
        Schema.of({**update, "wide.bias": update["wide.bias"].astype(np.float64)}),
    )
    for schema in others:
        with pytest.raises(CodecError, match="made for a model with other tensors"):
            decode(blob, schema)
    backwards = {key: update[key] for key in reversed(update)}
    assert Schema.of(backwards) == Schema.of(update) and TABLE[name].encode(backwards) == blob


@pytest.mark.parametrize(
    "name", [name for name, codec in TABLE.items() if name.split(",")[0] in ("qsgd", "terngrad", "eden")]
)
def test_random_rounding_is_right_on_average(name: str) -> None:
    codec = TABLE[name]
    if isinstance(codec, TernGrad):
        codec = TernGrad(clip=1e9)  # clipping is meant to bias
    draws = np.random.default_rng(0)
    update: Update = {"w": draws.standard_normal(1024).astype(np.float32)}
    schema = Schema.of(update)
    count = 400
    told = [
        decode(codec.encode(update, state=SenderState(seed=seed)), schema)["w"].astype(float)
        for seed in range(count)
    ]
    mean, spread = np.mean(told, axis=0), np.std(told, axis=0)
    assert float(np.dot(mean, update["w"]) / np.dot(update["w"], update["w"])) == pytest.approx(1, abs=0.02)
    error = float(np.sqrt(np.mean((mean - update["w"]) ** 2)))
    assert error == pytest.approx(float(np.sqrt(np.mean(spread**2))) / count**0.5, rel=0.15)


def test_eden_s_error_is_the_one_of_its_levels() -> None:
    """Unbiased, e / (1 - e) of the levels' own error e: 0.363, 0.1175, 0.0345, 0.0095 for 1 to 4 bits."""
    values = np.random.default_rng(1).laplace(size=1 << 16).astype(np.float32)
    update: Update = {"w": values}
    for bits, error in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
        told = decode(EDEN(bits=bits).encode(update), Schema.of(update))["w"]
        nmse = float(np.sum((told - values) ** 2) / np.sum(values**2))
        assert nmse == pytest.approx(error / (1 - error), rel=0.03)


def test_stc_is_what_it_says() -> None:
    update: Update = {"w": np.arange(-500, 500).astype(np.float32)}
    told = decode(STC().encode(update, budget="2%"), Schema.of(update))["w"]
    kept = np.argsort(-np.abs(update["w"]), kind="stable")[:20]
    expected = np.zeros(1000, np.float32)
    expected[kept] = np.sign(update["w"][kept]) * np.abs(update["w"][kept]).mean()
    assert np.array_equal(told, expected)


@pytest.mark.parametrize("name", ["dhq", "dhq, dead zone", "dhq, rice", "topk", "stc"])
def test_a_budget_of_bytes_is_kept_and_used(name: str) -> None:
    update = network(scale=4)
    for budget, bytes_ in (("900B", 900), ("2KiB", 2048), ("10 kB", 10000)):
        size = len(TABLE[name].encode(update, budget=budget, state=SenderState()))
        assert 0.97 * bytes_ <= size <= bytes_ or size == len(TABLE[name].encode(update, budget="100%"))
    assert TABLE[name].encode(update, budget="1MiB") == TABLE[name].encode(update, budget="100%")
    with pytest.raises(UsageError, match=r"needs \d+ bytes for this update, got a budget of 40"):
        TABLE[name].encode(update, budget="40B")


@pytest.mark.parametrize("name", ["dhq", "dhq, dead zone", "dhq, rice", "topk", "stc"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_budget_into_which_no_value_fits(name: str, dense: bool) -> None:
    """It is refused, and the smallest that is not tells a value, with much or little that goes as it is."""
    update = (
        network(scale=4)
        if dense
        else {"w": np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)}
    )
    schema = Schema.of(update)
    told = 0
    for budget in range(20, 500, 6):
        try:
            values, _ = schema.flatten(decode(TABLE[name].encode(update, budget=f"{budget}B"), schema))
        except UsageError as error:
            assert not told, "a larger budget than one that sufficed"
            assert f"got a budget of {budget}" in str(error)
            continue
        told += 1
        assert np.count_nonzero(values)
    assert told
    nothing = {key: np.zeros_like(array) for key, array in update.items()}
    assert len(TABLE[name].encode(nothing, schema=schema, budget="500B"))  # there is nothing to tell


def test_codecs_without_a_choice_say_so() -> None:
    with pytest.raises(UsageError, match="int8 sends every value; give its budget in bytes, or none"):
        Int8().encode(network(), budget="1%")
    with pytest.raises(UsageError, match=r"fp16 needs [\d,]+ bytes for this update, got a budget of 100"):
        FP16().encode(network(), budget="100B")
    assert len(Int8().encode(network(), budget="1MiB"))


@pytest.mark.parametrize(
    "wrong", ["", "1", "0%", "101%", "-1%", "1%%", "5 apples", "0B", "1TiB", "kB", "1e3B"]
)
def test_budgets_that_make_no_sense(wrong: str) -> None:
    with pytest.raises(UsageError, match="budget"):
        DHQ().encode(network(), budget=wrong)


def test_updates_that_do_not_fit() -> None:
    update = network()
    schema = Schema.of(update)
    with pytest.raises(InputError, match="Expected an update of conv.bias, .*, got fc.weight"):
        DHQ().encode({"fc.weight": update["fc.weight"]}, schema=schema)
    with pytest.raises(InputError, match=r"Expected fc.weight as float32\[30, 50\], got float64\[30, 50\]"):
        DHQ().encode({**update, "fc.weight": update["fc.weight"].astype(float)}, schema=schema)
    with pytest.raises(InputError, match="Expected x as one of float16, .*, got complex128"):
        Schema.of({"x": np.zeros(3, complex)})
    with pytest.raises(InputError, match="but conv.bias has others"):
        DHQ().encode({**update, "conv.bias": np.full(8, np.inf, np.float32)}, schema=schema)
