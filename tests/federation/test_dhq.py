"""The parts of DHQ against slow versions that are obviously right, and its size against what is possible."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federation.common import BOTH, Update, network, numba

from privet.errors import CodecError, UsageError
from privet.federation import DHQ, STC, DeadZone, Lloyd, MeanSplit, Schema, decode, inspect
from privet.federation.context import read_context, write_context
from privet.federation.quantise import fit
from privet.federation.rans import (
    LOWEST,
    SCALE,
    choose_weights,
    frequencies,
    lanes_for,
    read_rans,
    write_rans,
)
from privet.federation.rice import pack as pack_bits
from privet.federation.rice import read_rice, write_rice, write_unary
from privet.federation.selection import FLOOR, largest, select
from privet.federation.wire import Reader, Section, crc32c, pack, unpack


def entropy(counts: np.ndarray) -> float:
    """Return the bits of symbols with these counts if each is coded alone and ideally."""
    counts = counts[counts > 0].astype(float)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def independent_bits(blob: bytes, schema: Schema) -> float:
    found = inspect(blob, schema).independent
    assert found is not None
    return found


def test_independent_bits_are_an_entropy() -> None:
    update: Update = {
        "w": (heavy(4000) * np.where(np.arange(4000) % 3, 1, -1)).astype(np.float32).reshape(40, 100)
    }
    schema = Schema.of(update)
    blob = DHQ().encode(update, budget="20%")
    told = decode(blob, schema)["w"].ravel()
    kept = np.count_nonzero(told)
    signed_levels = np.unique(told[told != 0], return_counts=True)[1]
    assert independent_bits(blob, schema) == pytest.approx(
        entropy(np.array([kept, 4000 - kept])) + entropy(signed_levels)
    )


def shuffled(size: int = 2_000_000) -> Update:
    values = np.random.default_rng(3).standard_normal(size)
    return {"w": (np.sign(values) * np.abs(values) ** 3).astype(np.float32).reshape(500, -1)}


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("budget", ["1%", "20%"])
def test_without_structure_it_is_as_short_as_entropy_allows(budget: str, context: bool) -> None:
    update = shuffled()
    schema = Schema.of(update)
    blob = DHQ(context=context).encode(update, budget=budget)
    assert 8 * len(blob) <= 1.01 * independent_bits(blob, schema)


def test_with_structure_it_is_much_shorter() -> None:
    update = network(scale=16)
    schema = Schema.of(update)
    sizes = {context: len(DHQ(context=context).encode(update)) for context in (True, False)}
    blob = DHQ().encode(update)
    assert 8 * len(blob) < 0.85 * independent_bits(blob, schema)
    assert sizes[True] < 0.85 * sizes[False]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40) | st.integers(0, 2**30), max_size=40), max_size=5))
def test_rice_brings_numbers_back(groups: list[list[int]]) -> None:
    numbers = np.array(list(itertools.chain(*groups)), np.int64)
    sizes = [len(group) for group in groups]
    blobs = set()
    for used in BOTH:
        with numba(used):
            data = write_rice(numbers, sizes)
            reader = Reader(data)
            assert np.array_equal(read_rice(reader, sizes, int(numbers.sum()), "numbers"), numbers)
            reader.end()
            blobs.add(data)
            if numbers.sum():
                with pytest.raises(CodecError, match="numbers"):
                    read_rice(Reader(data), sizes, int(numbers.sum()) - 1, "numbers")
    assert len(blobs) == 1


def test_rice_whose_numbers_would_leave_64_bits() -> None:
    """A quotient that is sound with few remainder bits is none with many; shifted, it would wrap around."""
    numbers = np.array([1 << 24, 1 << 24])
    widths = np.array([0, 40])
    data = bytes([0, 40, 0]) + write_unary(numbers) + pack_bits(np.zeros(2, np.int64), widths)
    with pytest.raises(CodecError, match="add up to at most"):
        read_rice(Reader(data), [1, 1], 1 << 40, "numbers")


def test_rice_chooses_the_best_parameter() -> None:
    draws = np.random.default_rng(0)
    for chance in (0.6, 0.3, 0.05, 0.01, 0.0003):
        numbers = draws.geometric(chance, 5000).astype(np.int64) - 1
        best = min(bits + 1 + float((numbers >> bits).mean()) for bits in range(20))
        assert 8 * len(write_rice(numbers, [5000])) <= best * 5000 + 8 * 6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 128), st.integers(0, 2**32 - 1))
def test_rans_brings_symbols_back(count: int, alphabet: int, seed: int) -> None:
    draws = np.random.default_rng(seed)
    symbols = np.minimum(draws.geometric(draws.uniform(0.05, 0.95), count) - 1, alphabet - 1).astype(np.uint8)
    fresh = draws.random(count) < 0.1
    successor = (1 + np.arange(alphabet) % 2).astype(np.uint8)
    part = -(-count // max(1, lanes_for(count)))
    first = fresh | (np.arange(count) % max(1, part) == 0)
    contexts = np.where(first, 0, successor[np.roll(symbols, 1)]).astype(np.uint8)
    seen = np.zeros((3, alphabet), np.int64)
    np.add.at(seen, (contexts, symbols), 1)
    table = frequencies(choose_weights(seen))
    assert all(row.sum() in (0, 1 << SCALE) for row in table)
    blobs = set()
    for used in BOTH:
        with numba(used):
            data = write_rans(symbols, contexts, table)
            reader = Reader(data)
            assert np.array_equal(
                read_rans(reader, np.where(fresh, 0, -1).astype(np.int8), successor, table), symbols
            )
            reader.end()
            blobs.add(data)
    assert len(blobs) == 1


def test_rans_is_the_textbook_s() -> None:
    """One lane, against the definition with whole numbers of any length."""
    symbols = np.random.default_rng(0).choice(3, 700, p=[0.7, 0.2, 0.1]).astype(np.uint8)
    table = frequencies(choose_weights(np.bincount(symbols)[None]))
    starts = [0, int(table[0, 0]), int(table[0, :2].sum())]
    state, words = LOWEST, []
    for symbol in symbols[::-1].tolist():
        frequency = int(table[0, symbol])
        if state >= frequency << (32 - SCALE):
            words.append(state & 0xFFFF)
            state >>= 16
        state = (state // frequency << SCALE) + state % frequency + starts[symbol]
    expected = state.to_bytes(4, "little") + b"".join(word.to_bytes(2, "little") for word in words[::-1])
    assert write_rans(symbols, np.zeros(700, np.uint8), table).endswith(expected)
    assert 16 * len(words) <= entropy(np.bincount(symbols)) * 1.001 + 32


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=128).filter(any))
def test_weights_come_close_to_shares(counts: list[int]) -> None:
    seen = np.array([counts])
    table = frequencies(choose_weights(seen))
    assert table.sum() == 1 << SCALE
    assert ((table > 0) == (seen > 0)).all()
    ideal = entropy(seen[0])
    used = seen[0] > 0
    taken = float((seen[0][used] * (SCALE - np.log2(table[0][used]))).sum())
    assert taken <= 1.02 * ideal + 0.01 * seen.sum()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.003, 0.1, 0.5, 1.0]))
def test_positions_by_row_and_column_come_back(seed: int, density: float) -> None:
    schema = Schema.of(network(seed=1))
    draws = np.random.default_rng(seed)
    index = np.flatnonzero(draws.random(schema.size) < density * draws.random(schema.size))
    blobs = set()
    for used in BOTH:
        with numba(used):
            data = write_context(index, schema)
            reader = Reader(data)
            assert np.array_equal(read_context(reader, schema), index)
            reader.end()
            blobs.add(data)
    assert len(blobs) == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -3.0, 1e-45, 1e38]), max_size=300),
    st.integers(0, 320),
)
def test_exactly_so_many_are_kept_and_ties_go_to_lower_positions(numbers: list[float], count: int) -> None:
    values = np.array(numbers, np.float32)
    order = sorted((at for at in range(len(values)) if values[at]), key=lambda at: (-abs(values[at]), at))
    for used in BOTH:
        with numba(used):
            assert largest(values, count).tolist() == sorted(order[:count])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4000))
def test_selection_is_global_with_a_floor_for_each_tensor(seed: int, count: int) -> None:
    draws = np.random.default_rng(seed)
    update = network(seed=seed)
    for name in update:
        if draws.random() < 0.4:
            update[name] = (update[name] * 1e-6).astype(update[name].dtype)
    schema = Schema.of(update)
    count = min(count, schema.size)
    values, _ = schema.flatten(update)
    chosen = [_select(values, schema, count, used) for used in BOTH]
    assert np.array_equal(*chosen)
    assert len(chosen[0]) == len(np.unique(chosen[0])) == count
    # The slow way: each tensor's largest are promised a place, then all compete for what is left.
    kept = set(np.argsort(-np.abs(values), kind="stable")[:count].tolist())
    promised: set[int] = set()
    floors = [count * tensor.size // (FLOOR * schema.size) for tensor in schema.compressed]
    settled = [False] * len(floors)
    while True:
        short = [
            at
            for at, (start, end) in enumerate(itertools.pairwise(schema.offsets))
            if not settled[at] and sum(start <= index < end for index in kept) < floors[at]
        ]
        if not short:
            break
        for at in short:
            settled[at] = True
            start, end = schema.offsets[at : at + 2]
            promised |= set(
                (start + np.argsort(-np.abs(values[start:end]), kind="stable")[: floors[at]]).tolist()
            )
        open_ = [
            index
            for at, (start, end) in enumerate(itertools.pairwise(schema.offsets))
            if not settled[at]
            for index in range(start, end)
        ]
        open_.sort(key=lambda index: (-abs(values[index]), index))
        kept = promised | set(open_[: count - len(promised)])
    assert set(chosen[0].tolist()) == kept


def _select(values: np.ndarray, schema: Schema, count: int, used: bool) -> np.ndarray:
    with numba(used):
        return select(values, schema, count)


def heavy(count: int = 20_000) -> np.ndarray:
    return (0.1 + np.random.default_rng(0).pareto(3, count)).astype(np.float32)


def error(quantiser: object, magnitudes: np.ndarray) -> tuple[float, int]:
    levels, values, exponent = fit(quantiser, magnitudes)  # type: ignore[arg-type]
    told = np.ldexp(values, exponent)[levels]
    return float(((told - magnitudes) ** 2).sum()), len(values)


def test_the_hierarchy_splits_at_the_mean() -> None:
    magnitudes = heavy(3000)
    sets = [magnitudes]
    for depth in range(5):
        levels, values, exponent = fit(MeanSplit(depth), magnitudes)
        expected = [float(each.mean(dtype=float)) for each in sets]
        assert np.ldexp(values, exponent) == pytest.approx(expected, rel=2**-11)
        assert np.bincount(levels).tolist() == [len(each) for each in sets]
        sets = [
            half
            for each in sets
            for half in (each[each <= each.mean(dtype=float)], each[each > each.mean(dtype=float)])
        ]


def test_depth_zero_is_stc_s_magnitude() -> None:
    update: Update = {"w": (heavy(5000) * np.where(np.arange(5000) % 3, 1, -1)).astype(np.float32)}
    schema = Schema.of(update)
    ours = decode(DHQ(quantiser=MeanSplit(0)).encode(update), schema)["w"]
    stc = decode(STC().encode(update), schema)["w"]
    assert np.array_equal(np.sign(ours), np.sign(stc))
    assert ours == pytest.approx(stc, rel=2**-11)


def test_more_levels_err_less_and_lloyd_least() -> None:
    magnitudes = heavy()
    errors = [error(MeanSplit(depth), magnitudes)[0] for depth in range(5)]
    assert errors == sorted(errors, reverse=True)
    for depth in (1, 2, 3):
        assert error(Lloyd(depth), magnitudes)[0] < errors[depth]
        assert error(Lloyd(depth), magnitudes)[1] <= 2**depth
    assert error(DeadZone(), magnitudes)[1] <= 64


def test_exponential_tails_lose_more_than_half_of_their_variance_in_one_split() -> None:
    magnitudes = np.random.default_rng(0).exponential(size=200_000).astype(np.float32)
    left = error(MeanSplit(1), magnitudes)[0] / float(((magnitudes - magnitudes.mean()) ** 2).sum())
    assert left == pytest.approx(1 - 0.58, abs=0.01)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(2.0**-149, 2.0**127, width=32), min_size=1, max_size=60),
    st.sampled_from([MeanSplit(0), MeanSplit(3), MeanSplit(6), Lloyd(2), DeadZone(), DeadZone(5.0)]),
)
def test_levels_are_ascending_and_float16(numbers: list[float], quantiser: object) -> None:
    levels, values, exponent = fit(quantiser, np.array(numbers, np.float32))  # type: ignore[arg-type]
    assert (np.diff(values) > 0).all() and values[0] > 0 and 1 <= values[-1] < 2
    assert np.array_equal(values.astype(np.float16).astype(np.float32), values)
    assert -149 <= exponent <= 127 and len(values) <= 64 and levels.max() < len(values)
    order = np.argsort(numbers, kind="stable")
    assert (np.diff(levels[order].astype(int)) >= 0).all()


@pytest.mark.parametrize("bits", [0x7C00, 0x7E00, 0xFC00, 0x0000, 0x4000])  # infinity, NaN, -infinity, 0, 2
def test_levels_that_are_no_numbers_are_refused(bits: int) -> None:
    update: Update = {"w": heavy(5000)}
    header, sections = unpack(DHQ().encode(update, budget="20%"))
    levels = sections[Section.LEVELS]
    assert levels[0] == 4  # then an exponent of two bytes, and four float16 numbers
    for at in (3, 5, 7, 9):
        damaged = levels[:at] + bits.to_bytes(2, "little") + levels[at + 2 :]
        with pytest.raises(CodecError, match="Expected levels above 0 and ascending"):
            decode(pack(header, sections | {Section.LEVELS: damaged}), Schema.of(update))


@pytest.mark.parametrize(
    "make", [lambda: MeanSplit(7), lambda: MeanSplit(-1), lambda: Lloyd(2, 0), lambda: DeadZone(0)]
)
def test_settings_that_cannot_work(make: object) -> None:
    with pytest.raises(UsageError, match="Expected a d"):
        make()  # type: ignore[operator]


def test_positions_take_whichever_way_is_shorter() -> None:
    update = network(scale=4)
    _, sections = unpack(DHQ().encode(update))
    assert Section.CONTEXT in sections
    update["fc.weight"] = np.random.default_rng(0).permutation(update["fc.weight"].ravel()).reshape(120, 200)
    _, sections = unpack(DHQ().encode({"fc.weight": update["fc.weight"]}))
    assert Section.RICE in sections


@settings(max_examples=40, deadline=None)
@given(
    st.binary(max_size=40_000)
    | st.integers(16_000, 40_000).map(lambda count: bytes(range(256)) * (count // 256))
)
def test_the_checksum_is_crc_32c(data: bytes) -> None:
    state = 0xFFFFFFFF
    for byte in data[:2000]:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    found = []
    for used in BOTH:
        with numba(used):
            assert crc32c(data[:2000]) == state ^ 0xFFFFFFFF
            found.append(crc32c(data))
    assert found[0] == found[1]
    assert crc32c(b"123456789") == 0xE3069283  # the published check value


@pytest.mark.parametrize("alive", [0, 1, 3])
def test_values_that_are_nearly_all_zero(alive: int) -> None:
    update = {name: np.zeros((40, 30), np.float32) for name in ("first", "second")}
    update["first"].flat[:alive] = 0.5
    told = decode(DHQ().encode(update, budget="50%"), Schema.of(update))
    assert np.count_nonzero(told["first"]) == alive and not told["second"].any()
