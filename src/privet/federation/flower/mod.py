"""The client's half: a mod that unpacks the model and packs what came of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from privet.errors import CodecError, PrivetError
from privet.federation.base import Codec
from privet.federation.budget import Budget
from privet.federation.dhq import DHQ
from privet.federation.flower.link import (
    KEY,
    LAW,
    Arrays,
    Request,
    arrays_of,
    difference,
    digest,
    moved,
    only_arrays,
    pack,
    packed,
    record_of,
    schema_of,
    unpack,
)
from privet.federation.law import law
from privet.federation.message import decode_headed
from privet.federation.quantise import DeadZone
from privet.federation.state import SenderState
from privet.seeds import derive

First = Callable[[Context], Arrays]
"""Makes the model that a federation begins with."""

MODEL, SENDER, VERSION = "privet.model", "privet.sender", "privet.version"  # in the node's state
CLASSES = "privet.classes"  # likewise
FAILED = 6  # Flower's code for a mod that cannot go on
# Of DHQ's levels uniform ones brought federations furthest, byte for byte (benchmarks/results/federate-small.md).
USUAL = DHQ(quantiser=DeadZone())
NEED_MODEL = "privet: this node needs the whole model"


class CodecMod:
    """Sends what training changed as one message of a codec, and receives the model likewise.

    The ClientApp sees ordinary arrays: to train, the model plus what this node's earlier messages left out, so that it
    does not learn again what the server will hear of anyway (step-ahead error feedback, arXiv 2601.20738). It must
    be the outermost mod, so that clipping and noise come before compression:

        app = ClientApp(mods=[CodecMod(), LocalDpMod(...)])

    A server without `CodecStrategy` gets whole models, as if this mod were not there.

    Args:
        codec: for what is sent, usually DHQ with uniform levels; None sends whole models, for comparison.
        budget: "1%" of the values, "64KiB" in all, or None for the codec's usual size.
        first: makes the model that the federation begins with, if the node can do so itself: from a seed, or
            from a published network. If it is the server's to the last bit, the node never receives
            a whole model.

    Raises:
        UsageError: a budget that this codec does not have.
    """

    def __init__(
        self,
        codec: Codec | None = USUAL,
        *,
        budget: Budget | str | None = None,
        first: First | None = None,
    ) -> None:
        self.codec = codec
        self.first = first
        self.budget = None if codec is None else codec.allow(budget)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Unpack a request, let the ClientApp answer, and pack its reply."""
        if not message.has_content() or KEY not in message.content.config_records:
            return call_next(message, context)
        try:
            request = Request.of(message.content.config_records[KEY])
            if request.classes:
                context.state[CLASSES] = ConfigRecord({"names": request.classes})
            if request.greeting:
                record = ConfigRecord({"name": name_of(context), "first": self._begin(context)})
                return Message(RecordDict({KEY: record}), reply_to=message)
            key, record_sent = only_arrays(message.content)
            model = _receive(record_sent, request, context.state)
            content = {name: record for name, record in message.content.items() if name != KEY}
            trains = self.codec is not None and message.metadata.message_type.startswith("train")
            sender = _sender(request, context) if trains else SenderState()
            start = _ahead(model, sender)
            message.content = RecordDict({**content, key: record_of(start)})
            reply = call_next(message, context)
            if trains and not reply.has_error():
                self._pack(reply, start, sender, context)
        except PrivetError as error:
            return Message(Error(FAILED, str(error)), reply_to=message)
        return reply

    def _begin(self, context: Context) -> str:
        """Make the first model and hold it; return its digest, or nothing if there is none."""
        if self.first is None or VERSION in context.state.config_records:
            return ""
        model = self.first(context)
        _hold(model, 0, context.state)
        return digest(model)

    def _pack(self, reply: Message, start: Arrays, sender: SenderState, context: Context) -> None:
        assert self.codec is not None
        key, record = only_arrays(reply.content)
        schema = schema_of(start)
        blob = self.codec.encode(
            difference(arrays_of(record), start), schema=schema, budget=self.budget, state=sender
        )
        reply.content[key] = pack([blob])
        if sender.told is not None and len(sender.told[0]):
            told = asdict(law(*sender.told, schema))
            for metrics in reply.content.metric_records.values():  # a record of its own would cost more
                for name, value in told.items():
                    metrics[f"{LAW}{name}"] = value
        context.state[SENDER] = record_of(sender.arrays())


def classes_of(context: Context) -> list[str]:
    """Return the names of the classes in the order of the labels, as the server said them.

    Raises:
        CodecError: the node has lost them; the server says them again with the whole model.
    """
    if CLASSES not in context.state.config_records:
        raise CodecError(NEED_MODEL)
    names = context.state.config_records[CLASSES]["names"]
    assert isinstance(names, list)
    return [str(name) for name in names]


def name_of(context: Context) -> str:
    """Return a node's name: its `name` or `partition-id` in the node's configuration, else its id."""
    config = context.node_config
    return str(config.get("name", config.get("partition-id", context.node_id)))


def _sender(request: Request, context: Context) -> SenderState:
    """Return what the node remembers of its messages, at the beginning of this round."""
    sender = SenderState(seed=derive(0, "node", name_of(context)))
    if SENDER in context.state.array_records:
        sender.restore(arrays_of(context.state.array_records[SENDER]))
    sender.begin(
        round=request.round,
        base=request.version,
        accepted=None if request.accepted < 0 else request.accepted,
    )
    return sender


def _ahead(model: Arrays, sender: SenderState) -> Arrays:
    """Return the model plus what the sender's messages left out."""
    schema = schema_of(model)
    left = sender.left(schema.size)
    if left is None:
        return model
    nothing = {tensor.name: np.zeros(tensor.shape, tensor.dtype) for tensor in schema.tensors if tensor.dense}
    return moved(model, schema.unflatten(left, nothing))


def _receive(record: ArrayRecord, request: Request, state: RecordDict) -> Arrays:
    """Return the model of this version, from the whole or from what the node held; the node holds it from now on."""
    if packed(record):
        held = state.config_records[VERSION]["version"] if VERSION in state.config_records else None
        if not isinstance(held, int) or not request.start <= held <= request.version:
            raise CodecError(NEED_MODEL)
        model = arrays_of(state.array_records[MODEL])
        blobs = unpack(record)
        if len(blobs) != request.version - request.start:
            raise CodecError(
                f"Expected {request.version - request.start} differences to the model, got {len(blobs)}."
            )
        schema = schema_of(model)
        for version, blob in enumerate(blobs, request.start):
            if version >= held:
                header, update = decode_headed(blob, schema)
                if header.base != version:
                    raise CodecError(NEED_MODEL)
                model = moved(model, update)
    else:
        model = arrays_of(record)
    _hold(model, request.version, state)
    return model


def _hold(model: Arrays, version: int, state: RecordDict) -> None:
    state[MODEL] = record_of(model)
    state[VERSION] = ConfigRecord({"version": version})
