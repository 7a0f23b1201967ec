"""The client's half: a mod that unpacks the model and packs what came of training."""

from __future__ import annotations

from dataclasses import asdict

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from privet.errors import CodecError, PrivetError
from privet.federation.base import Codec
from privet.federation.dhq import DHQ
from privet.federation.flower.link import (
    KEY,
    LAW,
    Arrays,
    Request,
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
from privet.federation.law import law
from privet.federation.message import decode_headed
from privet.federation.quantise import DeadZone
from privet.federation.state import SenderState
from privet.seeds import derive

MODEL, SENDER, VERSION = "privet.model", "privet.sender", "privet.version"  # in the node's state
FAILED = 6  # Flower's code for a mod that cannot go on
# Of DHQ's levels uniform ones brought federations furthest, byte for byte (benchmarks/results/federate-small.md).
USUAL = DHQ(quantiser=DeadZone())
NEED_MODEL = "privet: this node needs the whole model"


class CodecMod:
    """Sends what training changed as one message of a codec, and receives the model likewise.

    The ClientApp sees ordinary arrays. It must be the outermost mod, so that clipping and noise come
    before compression:

        app = ClientApp(mods=[CodecMod(), LocalDpMod(...)])

    A server without `CodecStrategy` gets whole models, as if this mod were not there.

    Args:
        codec: for what is sent, usually DHQ with uniform levels; None sends whole models, for comparison.
        budget: "1%" of the values, "64KiB" in all, or None for the codec's usual size.

    Raises:
        UsageError: a budget that this codec does not have.
    """

    def __init__(self, codec: Codec | None = USUAL, *, budget: str | None = None) -> None:
        self.codec = codec
        self.budget = None if codec is None else codec.allow(budget)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Unpack a request, let the ClientApp answer, and pack its reply."""
        if not message.has_content() or KEY not in message.content.config_records:
            return call_next(message, context)
        try:
            request = Request.of(message.content.config_records[KEY])
            if request.greeting:
                record = ConfigRecord({"name": name_of(context)})
                return Message(RecordDict({KEY: record}), reply_to=message)
            key, record_sent = only_arrays(message.content)
            model = _receive(record_sent, request, context.state)
            content = {name: record for name, record in message.content.items() if name != KEY}
            message.content = RecordDict({**content, key: record_of(model)})
            reply = call_next(message, context)
            if reply.has_error() or not message.metadata.message_type.startswith("train"):
                return reply
            self._pack(reply, model, request, context)
        except PrivetError as error:
            return Message(Error(FAILED, str(error)), reply_to=message)
        return reply

    def _pack(self, reply: Message, model: Arrays, request: Request, context: Context) -> None:
        if self.codec is None:
            return
        key, record = only_arrays(reply.content)
        sender = SenderState(seed=derive(0, "node", name_of(context)))
        if SENDER in context.state.array_records:
            sender.restore(arrays_of(context.state.array_records[SENDER]))
        sender.begin(
            round=request.round,
            base=request.version,
            accepted=None if request.accepted < 0 else request.accepted,
        )
        schema = schema_of(model)
        blob = self.codec.encode(
            difference(arrays_of(record), model), schema=schema, budget=self.budget, state=sender
        )
        reply.content[key] = pack([blob])
        if sender.told is not None and len(sender.told[0]):
            told = asdict(law(*sender.told, schema))
            for metrics in reply.content.metric_records.values():  # a record of its own would cost more
                for name, value in told.items():
                    metrics[f"{LAW}{name}"] = value
        context.state[SENDER] = record_of(sender.arrays())


def name_of(context: Context) -> str:
    """Return a node's name: its `name` or `partition-id` in the node's configuration, else its id."""
    config = context.node_config
    return str(config.get("name", config.get("partition-id", context.node_id)))


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
    state[MODEL] = record_of(model)
    state[VERSION] = ConfigRecord({"version": request.version})
    return model
