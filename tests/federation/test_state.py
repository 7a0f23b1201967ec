"""Error feedback: nothing that training found is lost, whatever becomes of the replies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federation.common import Update, network, same_bits
from tests.federation.test_codecs import TABLE

from privet.errors import InputError, UsageError
from privet.federation import DHQ, Schema, SenderState, decode

FEEDBACK = [name for name, codec in TABLE.items() if codec.feedback]


def values_of(update: Update, schema: Schema) -> np.ndarray:
    return schema.flatten(update)[0]


@pytest.mark.parametrize("name", FEEDBACK)
@settings(max_examples=12, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(1, 5)), min_size=1, max_size=6))
def test_what_is_not_told_is_kept(name: str, steps: list[tuple[bool, bool, int]]) -> None:
    """u + e_old = decoded + e_new to an ulp, over lost replies, restarts and short absences."""
    schema = Schema.of(network())
    state, number, accepted = SenderState(), 0, None
    arrived = np.zeros(schema.size)
    found = np.zeros(schema.size)
    for step, (lost, restart, gap) in enumerate(steps):
        number += gap
        update = network(seed=step)
        state.begin(round=number, accepted=accepted)
        before = np.zeros(schema.size, np.float32) if state.residual is None else state.residual.copy()
        told = values_of(decode(TABLE[name].encode(update, state=state), schema), schema)
        added = values_of(update, schema)
        assert state.residual is not None
        ulp = np.spacing(np.maximum(np.abs(added + before), np.abs(state.residual)))
        left = added.astype(float) + before - (told.astype(float) + state.residual)
        assert (np.abs(left) <= ulp).all()
        if restart:
            arrays = {key: array.copy() for key, array in state.arrays().items()}
            state = SenderState().restore(arrays)
        if not lost:
            accepted = number
            arrived += told
        found += added
    state.begin(round=number + 1, accepted=accepted)
    assert state.residual is not None
    scale = np.abs(found).max()
    assert np.abs(found - arrived - state.residual).max() <= 1e-6 * scale


def test_a_lost_reply_is_taken_back_to_the_last_bit() -> None:
    update, schema = network(), Schema.of(network())
    for name in FEEDBACK:
        state = SenderState()
        state.begin(round=1, accepted=None)
        TABLE[name].encode(update, state=state)
        state.begin(round=2, accepted=None)  # it never arrived
        assert state.residual is not None and same_bits(state.residual, values_of(update, schema))
        state.begin(round=3, accepted=None)  # said again, it changes nothing
        assert same_bits(state.residual, values_of(update, schema))


def test_an_accepted_reply_is_not_taken_back() -> None:
    state = SenderState()
    state.begin(round=4, accepted=None)
    DHQ().encode(network(), state=state)
    assert state.residual is not None
    before = state.residual.copy()
    state.begin(round=9, accepted=4)
    assert same_bits(state.residual, before)


@pytest.mark.parametrize(("gap", "share"), [(1, 1.0), (5, 1.0), (6, 0.9), (8, 0.9**3)])
def test_long_absence_lets_the_residual_fade(gap: int, share: float) -> None:
    state = SenderState()
    state.begin(round=10, accepted=None)
    DHQ().encode(network(), state=state)
    assert state.residual is not None
    residual = state.residual.copy()
    state.begin(round=10 + gap, accepted=10)
    values = values_of(network(seed=1), Schema.of(network()))
    carried = state.carry(values.copy())
    assert carried == pytest.approx(values + share * residual, rel=1e-6, abs=1e-12)


def test_an_overgrown_residual_is_clipped() -> None:
    values = np.ones(400, np.float32)
    state = SenderState(residual=np.full(400, 50, np.float32))
    assert state.carry(values.copy()) == pytest.approx(np.full(400, 11.0))  # ten times the update's norm
    state = SenderState(residual=np.full(400, 50, np.float32))
    assert state.carry(np.zeros(400, np.float32)) == pytest.approx(np.full(400, 50.0))


@pytest.mark.parametrize("residual", [np.ones(3, np.float32), np.full(400, np.nan, np.float32)])
def test_a_residual_of_another_model_or_damaged_is_dropped(residual: np.ndarray) -> None:
    state = SenderState(residual=residual)
    assert np.array_equal(state.carry(np.ones(400, np.float32)), np.ones(400))
    assert state.residual is None


def test_sums_beyond_float32_are_refused() -> None:
    state = SenderState(residual=np.full(400, 3e38, np.float32))
    with pytest.raises(InputError, match="finite together with what earlier messages left out"):
        DHQ().encode({"w": np.full(400, 3e38, np.float32)}, state=state)


def test_round_and_base_are_written() -> None:
    from privet.federation.wire import unpack

    state = SenderState()
    state.begin(round=7, base=6, accepted=None)
    header, _ = unpack(DHQ().encode(network(), state=state))
    assert (header.round, header.base) == (7, 6)
    assert state.sent == 7
    for wrong in (-1, 2**32):
        with pytest.raises(UsageError, match="round and base"):
            state.begin(round=wrong, accepted=None)


def test_nonsense_is_no_state() -> None:
    for arrays in ({}, {"numbers": np.zeros(2)}, {"numbers": np.array(["a", "b", "c"])}):
        with pytest.raises(InputError, match="arrays of a sender's state"):
            SenderState().restore(arrays)
    with pytest.raises(UsageError, match="decay"):
        SenderState(decay=1.5)
