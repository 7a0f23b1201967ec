"""Rounds on Flower: what arrives, what is kept, and who is left out."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    QFedAvg,
)
from tests.federation.flower.apps import READY, app, grid, held, learned, model, play, reply_of, strategy

from privet.errors import UsageError
from privet.federation import CODECS, DHQ, Codec, Cyclic, Exponential, Int8, Static, Uniform, Weighted
from privet.federation.flower import CodecMod, CodecStrategy, LocalGrid
from privet.federation.flower.grids import Shown
from privet.federation.flower.link import KEY, Arrays, arrays_of, content_bytes, pack, record_of, unpack
from privet.federation.wire import pack as frame
from privet.federation.wire import unpack as unframe

Answer = Callable[[Message, Context], Message]


def same(one: Arrays, other: Arrays) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


def close(one: Arrays, other: Arrays) -> bool:
    """Say whether two models agree up to rounding; Flower alone makes floats of a mask, and averages them."""
    return all(
        np.allclose(one[name], other[name], atol=2e-2 if name == "half" else 1e-5)
        for name in one
        if name != "mask"
    )


def averaged(names: list[str], rounds: int) -> Arrays:
    """Return what plain averaging of these clients makes of the model."""
    now = model()
    for number in range(1, rounds + 1):
        after = [learned(now, number, name) for name in names]
        now = {
            key: np.mean([one[key].astype(np.float64) for one in after], 0).astype(now[key].dtype)
            if now[key].dtype.kind == "f"
            else after[0][key]
            for key in now
        }
    return now


def test_without_codecs_it_is_what_flower_computes() -> None:
    wrapped = play(strategy(codec=None), grid(app(codec=None)))
    assert close(wrapped, averaged(["0", "1", "2", "3"], 3))
    plain = FedAvg(**{**READY, "min_train_nodes": 4})
    bare = play(plain, grid(app(mods=[])))
    assert close(wrapped, bare)
    assert [array.dtype for array in wrapped.values()] == [array.dtype for array in model().values()]
    assert list(wrapped) == list(model())


def test_the_mod_alone_changes_nothing() -> None:
    with_mod, without = (play(FedAvg(**READY), grid(app(mods=mods))) for mods in ([CodecMod()], []))
    assert close(with_mod, without)


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_goes_both_ways(name: str) -> None:
    codec = CODECS[name]()
    budget = "5%" if name in ("dhq", "topk", "stc") else None
    client = app(mods=[CodecMod(codec, budget=budget)])
    nodes = grid(client)
    wrapper = strategy(codec=codec, budget=budget)
    play(wrapper, nodes)
    assert not any(one.refused for one in wrapper.rounds)
    assert all(len(one.accepted) == 4 for one in wrapper.rounds)


def test_all_nodes_hold_the_same_model_to_the_last_bit() -> None:
    nodes, wrapper = grid(app()), strategy()
    play(wrapper, nodes, rounds=4)
    models = [held(nodes, node) for node in (1, 2, 3, 4)]
    assert all(same(models[0], other) for other in models[1:])
    server = wrapper.download  # it has moved on once more, to the last round's result
    assert server.version == 4
    assert unpack(server.record(3)[1]) == [server.blobs[3]]
    assert not same(server.visible, server.weights)


def test_nothing_is_lost_on_the_way_down() -> None:
    """What the nodes hold follows the server's model: differences that stand still are told in the end."""
    wrapper = strategy()
    wrapper.download.follow(model())
    goal = learned(model(), 1, "7")
    for _ in range(60):
        wrapper.download.follow(goal)
    assert np.abs(wrapper.download.visible["weight"] - goal["weight"]).max() < 1e-4
    assert wrapper.download.visible["count"] == goal["count"]


def test_updates_move_the_servers_own_model() -> None:
    """Not the one that the nodes hold: what these were not told yet would be lost."""
    models, updates = [model()], [[]]

    def after(number: int, record: ArrayRecord) -> None:
        if number:
            models.append(arrays_of(record))
            updates.append([])

    def watch(number: int, name: str, base: Arrays, update: Arrays) -> None:
        updates[-1].append(update["weight"])

    wrapper = strategy(watch=watch)
    wrapper.start(grid=grid(app()), initial_arrays=record_of(model()), num_rounds=4, evaluate_fn=after)
    for before, now, told in zip(models, models[1:], updates, strict=False):
        assert len(told) == 4
        assert np.allclose(now["weight"], before["weight"] + np.mean(told, 0), atol=1e-6)


def test_nothing_is_lost_on_the_way_up() -> None:
    """What the server takes, and what the node still holds back, are together all that training found."""
    found: dict[str, np.ndarray] = {}

    def answer(message: Message, context: Context) -> Message:
        reply = reply_of(message, context)
        before, after = (arrays_of(one.content["arrays"])["weight"] for one in (message, reply))  # type: ignore[arg-type]
        name = str(context.node_config["partition-id"])
        found[name] = found.get(name, 0) + (after - before)
        return reply

    taken: dict[str, np.ndarray] = {}

    def watch(number: int, name: str, base: Arrays, update: Arrays) -> None:
        taken[name] = taken.get(name, 0) + update["weight"]

    class Loses(LocalGrid):
        """Loses the second round's reply of node 2."""

        trained = 0

        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            replies = list(super().send_and_receive(messages))
            self.trained += any(
                KEY in r.content.array_records["arrays"] for r in replies if "arrays" in r.content
            )
            return [r for r in replies if not (self.trained == 2 and r.metadata.src_node_id == 2)]

    nodes = Loses(app(answer), [{"partition-id": number} for number in range(3)])
    wrapper = strategy(watch=watch)
    play(wrapper, nodes, rounds=4)
    assert [list(one.refused.items()) for one in wrapper.rounds] == [[], [("1", "no reply")], [], []]
    for node, name in ((1, "0"), (2, "1"), (3, "2")):
        sender = arrays_of(nodes.contexts[node].state["privet.sender"])  # type: ignore[arg-type]
        shape = model()["weight"].shape
        left = sender["residual"][-np.prod(shape) :].reshape(shape)  # tensors by name: half, weight
        assert np.allclose(taken[name] + left, found[name], atol=1e-5)


def corrupt(blob: bytes) -> bytes:
    return blob[:-3] + bytes(255 - byte for byte in blob[-3:])


def with_blob(change: Callable[[bytes], bytes]) -> Answer:
    """Return an answer that damages the message after the mod has packed it."""

    def mod(message: Message, context: Context, call_next: Answer) -> Message:
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 2 and reply.has_content() and "arrays" in reply.content:
            (blob,) = unpack(reply.content["arrays"])  # type: ignore[arg-type]
            reply.content["arrays"] = pack([change(blob)])
        return reply

    return mod  # type: ignore[return-value]


def with_content(change: Callable[[Message], None]) -> Answer:
    """Return an answer that changes what the third client says, before or instead of the mod."""

    def answer(message: Message, context: Context) -> Message:
        reply = reply_of(message, context)
        if context.node_config["partition-id"] == 2:
            change(reply)
        return reply

    return answer


def poison(value: float) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        arrays = arrays_of(reply.content["arrays"])  # type: ignore[arg-type]
        arrays["weight"][0, 0] = value
        reply.content["arrays"] = record_of(arrays)

    return change


def metrics(**values: Any) -> Callable[[Message], None]:
    return lambda reply: reply.content.update(metrics=MetricRecord(values))


def numbers(value: Any, weight: Any = 10) -> Callable[[Message], None]:
    """Return what keeps the names of a reply's metrics, but not their values."""

    def change(reply: Message) -> None:
        told = reply.content["metrics"]
        reply.content["metrics"] = MetricRecord(
            {name: weight if name == "num-examples" else value for name in told}
        )

    return change


def raw(data: bytes) -> Callable[[Message], None]:
    """Return what puts these bytes where an array's should be."""

    def change(reply: Message) -> None:
        arrays = record_of(model())
        arrays["weight"] = Array("float32", (40, 30), "numpy.ndarray", data)
        reply.content["arrays"] = arrays

    return change


def with_header(text: str, values: bytes = b"") -> bytes:
    """Return a file in numpy's format with this header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + values


def archive() -> bytes:
    file = BytesIO()
    np.savez(file, x=np.zeros((40, 30), np.float32))
    return file.getvalue()


WEIGHT = "{'descr': '<f4', 'fortran_order': False, 'shape': (40, 30)}"
HOSTILE: dict[str, tuple[Callable[[Message], None], str]] = {
    "broken archive": (raw(b"PK\x03\x04junk"), "numpy arrays"),
    "archive": (raw(archive()), "numpy arrays"),
    "no bytes": (raw(b""), "numpy arrays"),
    "huge": (raw(with_header(WEIGHT.replace("40, 30", f"{1 << 50},"))), "Expected weight as float32"),
    "broken header": (raw(with_header("{'descr': '<f4', 'fortran_order': (((((, '''")), "numpy arrays"),
    "deep header": (raw(with_header("[" * 60_000)), "numpy arrays"),
    "other version": (raw(b"\x93NUMPY\x09\x00" + bytes(200)), "numpy arrays"),
    "objects": (raw(with_header(WEIGHT.replace("<f4", "|O"), bytes(9600))), "Expected weight as float32"),
    "other order of bytes": (raw(with_header(WEIGHT.replace("<", ">"), bytes(4800))), "Expected weight as"),
    "values are missing": (raw(with_header(WEIGHT, bytes(4796))), "4,796 bytes for 4,800"),
    "values too many": (raw(with_header(WEIGHT, bytes(4804))), "4,804 bytes for 4,800"),
    "number in a list": (numbers([0.5]), "other lengths"),
    "not finite": (numbers(float("inf")), "finite metrics"),
    "weight in a list": (numbers(0.5, weight=[10]), "above 0"),
}


def raises(reply: Message) -> None:
    raise RuntimeError("out of memory")


def renamed(reply: Message) -> None:
    arrays = arrays_of(reply.content["arrays"])  # type: ignore[arg-type]
    reply.content["arrays"] = record_of({"other" + name: array for name, array in arrays.items()})


STALE: list[bytes] = []


def stale(blob: bytes) -> bytes:
    STALE.append(blob)
    return STALE[0]


def of_another_round(blob: bytes) -> bytes:
    header, sections = unframe(blob)
    return frame(replace(header, round=header.round + 1), sections)


BAD: dict[str, tuple[Any, str]] = {
    "corrupt": (with_blob(corrupt), "checksum"),
    "truncated": (with_blob(lambda blob: blob[:-1]), ""),
    "empty": (with_blob(lambda blob: b""), ""),
    "too long": (with_blob(lambda blob: blob + bytes(10_000_000)), "at most"),
    "stale": (with_blob(stale), "Expected an update of round 2"),
    "another round": (with_blob(of_another_round), "Expected an update of round"),
    "NaN": (with_content(poison(np.nan)), "finite"),
    "infinite": (with_content(poison(np.inf)), "finite"),
    "other names": (with_content(renamed), "Expected arrays"),
    "exception": (with_content(raises), "out of memory"),
    "no metrics": (with_content(lambda reply: reply.content.pop("metrics")), "one MetricRecord"),
    "no arrays": (with_content(lambda reply: reply.content.pop("arrays")), "one ArrayRecord"),
    "NaN loss": (with_content(metrics(**{"num-examples": 10, "train_loss": float("nan")})), "finite metrics"),
    "no weight": (with_content(metrics(train_loss=0.5)), "num-examples"),
    "weight 0": (with_content(metrics(**{"num-examples": 0, "train_loss": 0.5})), "above 0"),
    "weight in a list": (with_content(metrics(**{"num-examples": [1.0], "train_loss": 0.5})), "above 0"),
    "other metrics": (with_content(metrics(**{"num-examples": 10, "fun": 0.5})), "other names"),
    "metrics in a list": (
        with_content(metrics(**{"num-examples": 10, "train_loss": [0.5, 0.5]})),
        "other names",
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("codec", [DHQ(), None])
def test_a_bad_reply_is_left_out_and_the_run_goes_on(kind: str, codec: Codec | None) -> None:
    STALE.clear()
    does, words = BAD[kind]
    damages = does.__name__ == "mod"
    if damages and codec is None:
        return  # there is none to damage
    mod = CodecMod(codec, budget="5%" if codec else None)
    client = app(reply_of if damages else does, mods=[does, mod] if damages else [mod])
    nodes, wrapper = grid(client), strategy(codec=codec, budget="5%" if codec else None)
    result = play(wrapper, nodes, rounds=2)
    late = kind == "stale"  # its first reply is in time
    for one in wrapper.rounds[late:]:
        assert list(one.refused) == ["2"] and words in one.refused["2"], one.refused
        assert list(one.accepted) == ["0", "1", "3"]
    if codec is None:
        assert close(result, averaged(["0", "1", "3"], 2))
    assert all(np.isfinite(array).all() for array in result.values())


@pytest.mark.parametrize("inner", [FedAvg(**READY), FedAvgM(**READY, server_momentum=0.9), FedAdam(**READY)])
def test_a_client_that_counts_for_all_and_swings_cannot_end_a_run(inner: Any) -> None:
    sign = 1.0

    def swing(reply: Message) -> None:
        nonlocal sign
        poison(3e38 * sign)(reply)
        reply.content["metrics"]["num-examples"] = 2**62  # type: ignore[index]
        sign = -sign

    floats = {name: array for name, array in model().items() if array.dtype.kind == "f"}
    wrapper = strategy(inner, codec=None, budget=None)
    result = play(wrapper, grid(app(with_content(swing), None)), begin=floats, rounds=4)
    assert all(np.isfinite(array).all() for array in result.values())
    assert "finite weights up to 1e+18" in wrapper.rounds[0].refused["2"]
    assert all({"0", "1", "3"} <= set(one.accepted) for one in wrapper.rounds)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_bytes_and_numbers_are_left_out_of_training(kind: str) -> None:
    change, words = HOSTILE[kind]
    wrapper = strategy(codec=None, budget=None)
    result = play(wrapper, grid(app(with_content(change), None)), rounds=2)
    for one in wrapper.rounds:
        assert list(one.refused) == ["2"] and words in one.refused["2"], one.refused
    assert close(result, averaged(["0", "1", "3"], 2))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_bytes_and_numbers_are_left_out_of_evaluation(kind: str) -> None:
    taken: list[list[int]] = []

    class Listens(FedAvg):
        def aggregate_evaluate(self, server_round: int, replies: Any) -> MetricRecord | None:
            taken.append([reply.metadata.src_node_id for reply in replies])
            return super().aggregate_evaluate(server_round, replies)

    wrapper = strategy(Listens(min_train_nodes=1, min_available_nodes=1), codec=None, budget=None)
    nodes = grid(app(codec=None, change=HOSTILE[kind][0]))
    result = wrapper.start(grid=nodes, initial_arrays=record_of(model()), num_rounds=2)
    assert taken == [[1, 2, 4], [1, 2, 4]]
    seen = [float(str(one["sum"])) for one in result.evaluate_metrics_clientapp.values()]
    assert len(seen) == 2
    assert seen[-1] == pytest.approx(float(wrapper.download.visible["weight"].sum()), rel=1e-5)


@pytest.mark.parametrize(
    "told",
    [{"kept": [1, 2]}, {"threshold": [1.0]}, {"threshold": 1}, {"mean": 1e39}, {"tail": 0.6}, {"fun": 1.0}],
)
def test_a_law_that_is_none_costs_only_the_law(told: dict[str, Any]) -> None:
    def mod(message: Message, context: Context, call_next: Answer) -> Message:
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 2 and "metrics" in reply.content:
            reply.content["metrics"].update({f"privet.{name}": value for name, value in told.items()})  # type: ignore[union-attr, arg-type]
        return reply

    wrapper = strategy()
    play(wrapper, grid(app(mods=[mod, CodecMod(DHQ(), budget="5%")])), rounds=2)
    for one in wrapper.rounds:
        assert not one.refused and list(one.accepted) == ["0", "1", "2", "3"]
        assert list(one.laws) == ["0", "1", "3"]


def test_a_node_may_not_answer_twice_or_unasked() -> None:
    class Doubles(LocalGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            replies = list(super().send_and_receive(messages))
            return [*replies, *replies]

    nodes = Doubles(app(), [{"partition-id": number} for number in range(3)])
    wrapper = strategy()
    play(wrapper, nodes, rounds=1)
    assert len(wrapper.rounds[0].accepted) == 3
    assert all("one reply" in reason for reason in wrapper.rounds[0].refused.values())


def test_when_all_fail_the_model_stays() -> None:
    wrapper = strategy()
    result = wrapper.start(grid=grid(app(fails)), initial_arrays=record_of(model()), num_rounds=2)
    assert not result.arrays
    assert [len(one.refused) for one in wrapper.rounds] == [4, 4]


def fails(message: Message, context: Context) -> Message:
    raise RuntimeError("no power")


def test_a_node_that_lost_its_state_gets_the_whole_model_again() -> None:
    nodes, wrapper = grid(app(), 2), strategy()

    def forget(number: int, record: ArrayRecord) -> None:
        if number == 1:
            nodes.contexts[1].state = RecordDict()

    wrapper.start(grid=nodes, initial_arrays=record_of(model()), num_rounds=4, evaluate_fn=forget)
    assert [sorted(one.refused) for one in wrapper.rounds] == [[], ["0"], [], []]
    assert same(held(nodes, 1), held(nodes, 2))


def test_nodes_that_come_late_or_stayed_away() -> None:
    nodes = grid(app(), 3)
    late = nodes.contexts.pop(3)
    wrapper = strategy(sampler=None)
    arrays = record_of(model())

    def joins(number: int, record: ArrayRecord) -> None:
        if number == 2:
            nodes.contexts[3] = late

    wrapper.start(grid=nodes, initial_arrays=arrays, num_rounds=4, evaluate_fn=joins)
    assert [len(one.accepted) for one in wrapper.rounds] == [2, 2, 3, 3]
    assert same(held(nodes, 3), held(nodes, 1))
    download = wrapper.download
    for _ in range(100):
        download.follow(learned(download.weights, 1, "1"))
    oldest = min(download.blobs)
    assert download.record(oldest)[0] == oldest
    size = sum(array.nbytes for array in model().values())
    lengths = [len(download.blobs[number]) for number in range(oldest, download.version)]
    assert sum(lengths) < size <= sum(lengths) + max(lengths)
    start, record = download.record(oldest - 1)
    assert start == download.version and list(record) == list(model())


def test_who_makes_the_first_model_is_never_sent_a_whole_one() -> None:
    def first(context: Context) -> Arrays:
        """All nodes make the server's, but for the last, which makes one that differs in a bit of one value."""
        made = model()
        if context.node_config["partition-id"] == 3:
            made["bias"] = np.nextafter(made["bias"], np.float32(9))
        return made

    whole: list[tuple[int, int]] = []

    class Watched(LocalGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            messages = list(messages)
            whole.extend(
                (rounds, message.metadata.dst_node_id)
                for message in messages
                if "weight" in next(iter(message.content.array_records.values()), {})
            )
            return super().send_and_receive(messages)

    rounds = 0
    client = app(mods=[CodecMod(DHQ(), budget="5%", first=first)])
    nodes = Watched(client, [{"partition-id": number} for number in range(4)])
    wrapper = strategy(sampler=Cyclic(schedule=Static(0.5)))

    def count(number: int, record: ArrayRecord) -> None:
        nonlocal rounds
        rounds = number

    wrapper.start(grid=nodes, initial_arrays=record_of(model()), num_rounds=4, evaluate_fn=count)
    assert [node for _, node in whole] == [4]
    assert not any(one.refused for one in wrapper.rounds)
    wrapper.download.follow(wrapper.download.weights)  # the last round's result, for all
    last = {node: held(nodes, node) for node in (1, 2, 3, 4)}
    versions = {node: nodes.contexts[node].state["privet.version"]["version"] for node in last}
    for node, other in ((a, b) for a in last for b in last if versions[a] == versions[b]):
        assert same(last[node], last[other])


def test_clients_train_from_where_they_would_be_had_they_told_all() -> None:
    shown: list[tuple[Arrays, Arrays]] = []

    def answer(message: Message, context: Context) -> Message:
        expected = arrays_of(context.state["privet.model"])  # type: ignore[arg-type]
        if "privet.sender" in context.state:
            left = arrays_of(context.state["privet.sender"])["residual"]  # type: ignore[arg-type]
            for name, rest in zip(("half", "weight"), np.split(left, [400]), strict=True):
                assert np.abs(rest).max() > 1e-3
                expected[name] = expected[name] + rest.reshape(expected[name].shape)
        shown.append((arrays_of(message.content["arrays"]), expected))  # type: ignore[arg-type]
        return reply_of(message, context)

    play(strategy(), grid(app(answer), 2), rounds=3)
    assert len(shown) == 6
    for found, expected in shown:
        assert all(
            np.allclose(found[name], expected[name], atol=1e-3 if name == "half" else 1e-7) for name in found
        )


@pytest.mark.parametrize(
    "inner",
    [
        FedAvg(**READY),
        FedAvgM(**READY, server_momentum=0.5),
        FedAdam(**READY),
        FedYogi(**READY),
        FedProx(**READY, proximal_mu=0.1),
        FedMedian(**READY),
        FedTrimmedAvg(**READY),
        Krum(**READY),
        Bulyan(**READY),
        QFedAvg(client_learning_rate=0.1, q=0.1, **READY),
        DifferentialPrivacyServerSideFixedClipping(FedAvg(**READY), 0.01, 1.0, 4),
    ],
    ids=lambda inner: type(inner).__name__,
)
@pytest.mark.filterwarnings("ignore")
def test_around_any_strategy(inner: Any) -> None:
    wrapper = strategy(inner)
    floats = {
        name: array for name, array in model().items() if array.dtype.kind == "f"
    }  # all that some can do
    result = play(wrapper, grid(app()), begin=floats)
    assert all(np.isfinite(array).all() for array in result.values())
    assert all(len(one.accepted) == 4 for one in wrapper.rounds), wrapper.rounds


def test_evaluation_is_compressed_too() -> None:
    wrapper = strategy(FedAvg(min_train_nodes=1, min_available_nodes=1))
    nodes = grid(app())
    result = wrapper.start(grid=nodes, initial_arrays=record_of(model()), num_rounds=3)
    seen = [float(str(one["sum"])) for one in result.evaluate_metrics_clientapp.values()]
    assert len(seen) == 3
    assert seen[-1] == pytest.approx(float(wrapper.download.visible["weight"].sum()), rel=1e-5)
    assert wrapper.rounds[1].down < wrapper.rounds[0].down / 2


class TestSampling:
    def test_who_is_drawn_takes_part(self) -> None:
        sampler = Cyclic(schedule=Exponential(start=1.0, rate=0.4, floor=0.2), seed=3)
        wrapper, nodes = strategy(sampler=sampler), grid(app(), 10)
        play(wrapper, nodes, rounds=5)
        names = [str(number) for number in range(10)]
        for one in wrapper.rounds:
            assert one.chosen == list(sampler.sample(one.round - 1, names)) == list(one.accepted)

    def test_who_is_drawn_by_images_does_not_count_by_images_once_more(self) -> None:
        sizes = {"0": 30.0, "1": 10.0, "2": 10.0, "3": 10.0, "4": 30.0, "5": 10.0}

        def answer(message: Message, context: Context) -> Message:
            reply = reply_of(message, context)
            told = MetricRecord(
                {"num-examples": int(sizes[str(context.node_config["partition-id"])]), "train_loss": 0.5}
            )
            reply.content["metrics"] = told
            return reply

        for fraction in (0.34, 1.0):
            sampler = Weighted(schedule=Static(fraction), seed=1, weights=sizes)
            wrapper = strategy(sampler=sampler, codec=None, budget=None)
            found = play(wrapper, grid(app(answer, None), 6), rounds=1)["weight"]
            drawn = list(wrapper.rounds[0].accepted)
            after = [learned(model(), 1, name)["weight"] for name in drawn]
            weights = [sizes[name] for name in drawn] if fraction == 1 else None
            assert len(drawn) == round(6 * fraction)
            assert len({sizes[name] for name in drawn}) == 2, "or nothing is tested"
            assert np.allclose(found, np.average(after, 0, weights), atol=1e-6)

    def test_the_same_seed_gives_the_same_bits(self) -> None:
        sampler = Uniform(schedule=Static(0.5), seed=1)
        results = [play(strategy(sampler=sampler), grid(app(), 6), rounds=4) for _ in range(2)]
        assert same(*results)

    def test_a_strategy_that_would_wait_forever(self) -> None:
        wrapper = strategy(
            FedAvg(min_available_nodes=3, min_train_nodes=3), sampler=Uniform(schedule=Static(0.2))
        )
        with pytest.raises(UsageError, match="waits for 3 nodes, but 2 are drawn"):
            play(wrapper, grid(app()))


def test_a_client_without_the_mod() -> None:
    with pytest.raises(UsageError, match=r"mods=\[CodecMod\(\)\]"):
        play(strategy(), grid(app(mods=[])))


def test_two_nodes_of_one_name() -> None:
    nodes = LocalGrid(app(), [{"name": "a"}, {"name": "a"}, {"name": "b"}])
    for number, context in nodes.contexts.items():
        context.node_config["partition-id"] = number
    wrapper = strategy()
    play(wrapper, nodes, rounds=1)
    assert sorted(wrapper.rounds[0].accepted) == ["a", "b"]


def test_another_protocol() -> None:
    nodes, wrapper = grid(app(), 1), strategy(nodes=1)
    content = RecordDict({KEY: ConfigRecord({"greeting": True, "protocol": 2})})
    (reply,) = nodes.send_and_receive([Message(content, message_type="train", dst_node_id=1)])
    assert "speaks protocol 2, this node 1" in str(reply.error.reason)
    content = RecordDict({KEY: ConfigRecord({"hello": 1})})
    (reply,) = nodes.send_and_receive([Message(content, message_type="train", dst_node_id=1)])
    assert "Expected privet's record" in str(reply.error.reason)
    assert wrapper.rounds == []


def test_the_overhead_of_a_message() -> None:
    """Beside the codec's message and the client's own metrics a reply takes less than 800 bytes."""
    sizes = []

    def spy(message: Message, context: Context, call_next: Answer) -> Message:
        reply = call_next(message, context)
        if reply.has_content() and "arrays" in reply.content:
            sizes.append(content_bytes(reply) - len(unpack(reply.content["arrays"])[0]))  # type: ignore[arg-type]
        return reply

    play(strategy(), grid(app(mods=[spy, CodecMod(budget="5%")])))
    assert sizes and max(sizes) < 800


def test_a_part_of_a_grid() -> None:
    whole = grid(app(), 4)
    part = Shown(whole, [2, 3])
    assert list(part.get_node_ids()) == [2, 3]
    assert list(Shown(whole).get_node_ids()) == [1, 2, 3, 4]
    asks = [Message(RecordDict({KEY: ConfigRecord({"greeting": True})}), message_type="train", dst_node_id=2)]
    assert [reply.content[KEY]["name"] for reply in part.send_and_receive(asks)] == ["1"]  # type: ignore[index]
    numbers = part.push_messages(asks)
    assert [reply.content[KEY]["name"] for reply in part.pull_messages(numbers)] == ["1"]  # type: ignore[index]


def test_arrays_that_are_not_numpys() -> None:
    def change(reply: Message) -> None:
        pickled = Array("float32", (2,), "pickle", b"cos")
        reply.content["arrays"] = ArrayRecord({**record_of(model()), "weight": pickled})

    for codec in (DHQ(), None):
        wrapper = CodecStrategy(FedAvg(**READY), codec=None)
        play(wrapper, grid(app(with_content(change), codec)), rounds=1)
        assert "numpy arrays" in wrapper.rounds[0].refused["2"]


def test_budgets_that_cannot_be() -> None:
    for make in (
        lambda: CodecMod(Int8(), budget="1%"),
        lambda: CodecStrategy(FedAvg(**READY), codec=Int8(), budget="1%"),
    ):
        with pytest.raises(UsageError, match="int8 sends every value"):
            make()
    with pytest.raises(UsageError, match="Expected a budget like"):
        CodecMod(budget="some")
