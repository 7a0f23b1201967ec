"""A federation of a few numbers: what a client learns is known in advance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from numpy.typing import NDArray

from privet.federation import DHQ, Codec
from privet.federation.flower import CodecMod, CodecStrategy, LocalGrid
from privet.federation.flower.link import arrays_of, record_of

Arrays = dict[str, NDArray[Any]]

READY = {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_evaluate_nodes": 0, "min_available_nodes": 1}


def model() -> Arrays:
    """Return a model with one of each kind: weights, a bias that goes as it is, half floats, a counter, a mask."""
    random = np.random.default_rng(0)
    return {
        "weight": random.normal(size=(40, 30)).astype(np.float32),
        "bias": random.normal(size=40).astype(np.float32),
        "half": random.normal(size=(20, 20)).astype(np.float16),
        "count": np.array(3, np.int64),
        "mask": np.array([True, False, True]),
    }


def learned(arrays: Arrays, round: int, name: str) -> Arrays:
    """Return what training by this client makes of a model."""
    random = np.random.default_rng([round, int(name)])
    changed = {
        key: (array + 0.01 * random.standard_t(3, size=array.shape)).astype(array.dtype)
        for key, array in arrays.items()
        if array.dtype.kind == "f"
    }
    return {**arrays, **changed, **({"count": arrays["count"] + 5} if "count" in arrays else {})}


def reply_of(message: Message, context: Context) -> Message:
    """Answer as an honest client does."""
    config = next(iter(message.content.config_records.values()))
    arrays = arrays_of(message.content["arrays"])  # type: ignore[arg-type]
    changed = learned(arrays, int(str(config["server-round"])), str(context.node_config["partition-id"]))
    metrics = MetricRecord({"num-examples": 10, "train_loss": 0.5})
    return Message(RecordDict({"arrays": record_of(changed), "metrics": metrics}), reply_to=message)


def app(
    answer: Callable[[Message, Context], Message] = reply_of,
    codec: Codec | None = DHQ(),  # noqa: B008
    *,
    mods: Iterable[Any] | None = None,
    change: Callable[[Message], None] | None = None,
) -> ClientApp:
    """Return a ClientApp that answers so; `change` is what the third client makes of its evaluation."""
    client = ClientApp(mods=[CodecMod(codec, budget="5%" if codec else None)] if mods is None else [*mods])
    client.train()(answer)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        arrays = arrays_of(message.content["arrays"])  # type: ignore[arg-type]
        metrics = MetricRecord({"num-examples": 10, "sum": float(arrays["weight"].sum())})
        reply = Message(RecordDict({"metrics": metrics}), reply_to=message)
        if change is not None and context.node_config["partition-id"] == 2:
            change(reply)
        return reply

    return client


def grid(client: ClientApp, count: int = 4) -> LocalGrid:
    """Return so many nodes."""
    return LocalGrid(client, [{"partition-id": number} for number in range(count)])


def strategy(inner: Strategy | None = None, **settings: Any) -> CodecStrategy:
    """Return a wrapped strategy that asks all nodes, unless `inner` is another."""
    return CodecStrategy(inner or FedAvg(**READY), **{"budget": "5%", **settings})


def play(wrapper: Strategy, nodes: Any, rounds: int = 3, begin: Arrays | None = None) -> Arrays:
    """Play some rounds, and return the model."""
    result = wrapper.start(grid=nodes, initial_arrays=record_of(begin or model()), num_rounds=rounds)
    return arrays_of(result.arrays)


def held(nodes: LocalGrid, node: int) -> Arrays:
    """Return the model that a node holds."""
    record = nodes.contexts[node].state["privet.model"]
    assert isinstance(record, ArrayRecord)
    return arrays_of(record)
