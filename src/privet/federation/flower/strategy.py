"""The server's half: a wrapper around any of Flower's strategies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from logging import INFO, WARNING, getLogger

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from privet.errors import CodecError, UsageError
from privet.federation.base import Codec
from privet.federation.budget import Budget
from privet.federation.flower.download import Download
from privet.federation.flower.grids import Shown
from privet.federation.flower.link import (
    KEY,
    LAW,
    Arrays,
    Request,
    arrays_of,
    difference,
    moved,
    only_arrays,
    packed,
    receipt_bytes,
    record_of,
    reply_bytes,
    request_bytes,
    restored,
    schema_of,
    unpack,
)
from privet.federation.flower.mod import FAILED, NEED_MODEL, USUAL
from privet.federation.law import Law
from privet.federation.message import decode_headed
from privet.federation.sampling import Sampler
from privet.federation.schema import Update, finite

log = getLogger("flwr")

Watch = Callable[[int, str, Arrays, Update], None]


@dataclass(kw_only=True)
class Round:
    """What happened in a round.

    Attributes:
        round: from 1, as Flower counts.
        chosen: names of the nodes that were asked to train.
        accepted: those whose updates were taken, with the bytes of the update's message.
        refused: those whose updates were not, with the reason.
        down: bytes that Flower moved to the nodes, for training and evaluation.
        up: bytes that it moved back.
        laws: of the accepted updates' values, by name.
    """

    round: int
    chosen: list[str] = field(default_factory=list)
    accepted: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    down: int = 0
    up: int = 0
    laws: dict[str, Law] = field(default_factory=dict)


@dataclass(kw_only=True)
class Node:
    """What the server knows of a node.

    Attributes:
        name: stable over restarts, as far as the node's configuration says one.
        first: digest of the first model, if it made one itself.
        held: version of the model that it holds, or None.
        accepted: its last round that was taken, or -1.
    """

    name: str
    first: str = ""
    held: int | None = None
    accepted: int = -1


class CodecStrategy(Strategy):
    """Compresses what goes down and up, whatever strategy it wraps, and lets no client's reply end the run.

    It must be the outermost wrapper, around Flower's own for differential privacy, too:

        strategy = CodecStrategy(FedAvg())

    The wrapped strategy sees ordinary replies: its own model plus what each client's training changed. A reply that is
    corrupt, truncated, not finite, too large, stale or missing is left out of the round, and the log says so.

    Args:
        inner: the strategy that averages.
        codec: for the way down; None sends whole models.
        budget: of one difference on the way down, as for `Codec.encode`.
        sampler: draws the clients of each round by their names; None leaves that to `inner`. With a sampler,
            `inner` must be ready to train all nodes that it sees (Flower's default). Where some clients are
            likelier than others to be drawn, their weight in the average is divided by their chance.
        nodes: how many to wait for before the first round.
        watch: called for each update that is taken, with the round, the client's name, the model that it started
            from, and the update.
        classes: names of the classes in the order of their labels, which are told to nodes (`classes_of`); not told
            if there are none.

    Raises:
        UsageError: a budget that the codec does not have.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        codec: Codec | None = USUAL,
        budget: Budget | str | None = None,
        sampler: Sampler | None = None,
        nodes: int = 2,
        watch: Watch | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.inner = inner
        self.sampler = sampler
        self.nodes = nodes
        self.watch = watch
        self.classes = list(classes)
        self.download = Download(codec=codec, budget=None if codec is None else codec.allow(budget))
        self.known: dict[int, Node] = {}
        self.rounds: list[Round] = []
        self._asked: dict[int, str] = {}  # nodes of the requests that are on their way
        self._chances: dict[str, float] = {}  # of having been drawn, by name; nothing if all had the same
        self._arrays: ArrayRecord | None = None
        self._before = 0  # rounds that were played before this start

    def go_on(self, arrays: ArrayRecord, *, rounds: list[Round], known: dict[int, Node]) -> None:
        """Go on after earlier rounds; `start` must be given these very arrays."""
        self._arrays, self.rounds, self.known, self._before = arrays, rounds, known, rounds[-1].round

    def summary(self) -> None:
        """Log what it is."""
        way = "whole models" if self.download.codec is None else f"{self.download.codec.name} on the way down"
        log.log(INFO, "\t├──> privet: %s, around %s", way, type(self.inner).__name__)
        self.inner.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy ask the sampled nodes, and compress what it asks."""
        server_round += self._before
        self.rounds.append(Round(round=server_round))
        nodes = self._greet(grid)
        if self.sampler is not None:
            by_name = {self.known[node].name: node for node in nodes}
            nodes = [by_name[name] for name in self.sampler.sample(server_round - 1, by_name)]
            self._chances = self.sampler.chances(server_round - 1, by_name)
            least = getattr(self.inner, "min_available_nodes", 1)
            if len(nodes) < least:
                raise UsageError(
                    f"{type(self.inner).__name__} waits for {least} nodes, but {len(nodes)} are drawn; lower its "
                    "min_available_nodes and min_train_nodes, or draw more."
                )
        messages = self._compressed(
            self.inner.configure_train(server_round, arrays, config, Shown(grid, nodes)), arrays
        )
        self.rounds[-1].chosen = sorted(self._asked.values())
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Open the replies, leave out those that are none, and let the wrapped strategy average the others."""
        server_round += self._before
        taken = {}
        for reply in self._from_nodes(replies):
            node = reply.metadata.src_node_id
            try:
                taken[node] = self._open(reply, server_round)
            except CodecError as error:
                self._refuse(node, str(error))
        for node in _odd_ones({node: reply for node, (reply, *_) in taken.items()}):
            del taken[node]
            self._refuse(node, ODD)
        for node, (_, update, law, size) in taken.items():
            name = self.known[node].name
            self.known[node].held = self.download.version
            self.known[node].accepted = server_round
            self.rounds[-1].accepted[name] = size
            if law is not None:
                self.rounds[-1].laws[name] = law
            if self.watch is not None:
                self.watch(server_round, name, self.download.visible, update)
        self._close(missing=True)
        if not taken:
            return None, None
        # Sums of floats depend on their order.
        ordered = sorted(taken, key=lambda node: self.known[node].name)
        if self._chances:
            for node in ordered:
                _divide(taken[node][0], self._weight, self._chances[self.known[node].name])
        arrays, metrics = self.inner.aggregate_train(server_round, [taken[node][0] for node in ordered])
        if arrays is not None:
            arrays = record_of(restored(arrays_of(arrays), self.download.weights))
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy ask for evaluations, and compress what it asks."""
        server_round += self._before
        shown = Shown(grid, [node for node in grid.get_node_ids() if node in self.known])
        return self._compressed(self.inner.configure_evaluate(server_round, arrays, config, shown), arrays)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Leave out replies that are none, and let the wrapped strategy average the others."""
        server_round += self._before
        taken = {}
        for reply in self._from_nodes(replies):
            node = reply.metadata.src_node_id
            try:
                self._check(reply)
                _metrics(reply, self._weight)
                taken[node] = reply
                self.known[node].held = self.download.version
            except CodecError as error:
                log.log(WARNING, "Evaluation by %s is left out: %s", self.known[node].name, error)
        for node in _odd_ones(taken):
            del taken[node]
            log.log(WARNING, "Evaluation by %s is left out: %s", self.known[node].name, ODD)
        self._close(missing=False)
        ordered = sorted(taken, key=lambda node: self.known[node].name)
        return self.inner.aggregate_evaluate(server_round, [taken[node] for node in ordered])

    def _greet(self, grid: Grid) -> list[int]:
        """Learn the names of nodes that are new, and return all that are there and known."""
        nodes = Shown(grid).wait(1 if self.known else self.nodes)
        record = RecordDict({KEY: Request(greeting=True, classes=self.classes).record()})
        new = [
            Message(record, message_type=MessageType.TRAIN, dst_node_id=node)
            for node in nodes
            if node not in self.known
        ]
        self.rounds[-1].down += sum(map(request_bytes, new))
        names = {node.name for key, node in self.known.items() if key in nodes}
        reason = "no reply"
        for reply in sorted(grid.send_and_receive(new, timeout=GREETING) if new else (), key=_source):
            self._arrived(reply)
            node = reply.metadata.src_node_id
            told = reply.content.config_records.get(KEY, ConfigRecord()) if reply.has_content() else {}
            name = told.get("name")
            if reply.has_error() and reply.error.code == FAILED:
                reason = reply.error.reason or "an error without a reason"
                log.log(WARNING, "Node %s is left out: %s", node, reason)
            elif not isinstance(name, str) or not 0 < len(name) <= 200:
                reason = (reply.error.reason or "an error") if reply.has_error() else "no name"
                log.log(WARNING, "Node %s is left out (%s); its ClientApp needs CodecMod.", node, reason)
            elif name in names:
                log.log(WARNING, "Node %s is left out: another is named %r as well.", node, name)
            else:
                names.add(name)
                self.known[node] = Node(name=name, first=str(told.get("first", "")))
        found = [node for node in nodes if node in self.known]
        if not found:
            raise UsageError(
                f"No node can take part ({reason.rstrip('.')}). A ClientApp that does not know privet needs "
                "mods=[CodecMod()]."
            )
        return found

    def _compressed(self, messages: Iterable[Message], arrays: ArrayRecord) -> list[Message]:
        if arrays is not self._arrays:
            self._arrays = arrays
            self.download.follow(arrays_of(arrays))
        sent = []
        for message in sorted(messages, key=lambda one: self.known[one.metadata.dst_node_id].name):
            node = self.known[message.metadata.dst_node_id]
            if node.first == self.download.first:
                node.held = 0
            node.first = ""  # from now on it is known what the node holds
            start, record = self.download.record(node.held)
            request = Request(
                round=self.rounds[-1].round,
                version=self.download.version,
                start=start,
                accepted=node.accepted,
                classes=[] if packed(record) else self.classes,
            )
            key, _ = only_arrays(message.content)
            content = RecordDict({**message.content, key: record, KEY: request.record()})
            to = message.metadata
            sent.append(
                Message(
                    content,
                    message_type=to.message_type,
                    dst_node_id=to.dst_node_id,
                    ttl=to.ttl,
                    group_id=to.group_id,
                )
            )
            self._asked[to.dst_node_id] = node.name
        self.rounds[-1].down += sum(map(request_bytes, sent))
        return sent

    def _open(self, reply: Message, server_round: int) -> tuple[Message, Update, Law | None, int]:
        """Return a client's reply as the wrapped strategy expects it, the update, its law and its bytes."""
        self._check(reply)
        key, record = only_arrays(reply.content)
        visible = self.download.visible
        size = sum(len(array.data) for array in record.values())
        if packed(record):
            schema = schema_of(visible)
            blobs = unpack(record)
            if len(blobs) != 1:
                raise CodecError(f"Expected one message of a codec, got {len(blobs)}.")
            header, update = decode_headed(blobs[0], schema)
            if (header.round, header.base) != (server_round, self.download.version):
                raise CodecError(
                    f"Expected an update of round {server_round} to version {self.download.version}, got one of "
                    f"round {header.round} to version {header.base}."
                )
        else:
            update = difference(arrays_of(record, visible), visible)
        arrays = moved(self.download.weights, update)
        floats = [array for array in arrays.values() if array.dtype.kind == "f"]
        if not all(finite(array) and float(np.abs(array).max(initial=0)) <= LARGEST for array in floats):
            raise CodecError(f"Expected a model of finite weights up to {LARGEST:g}.")
        law = _take_law(_metrics(reply, self._weight))
        reply.content[key] = record_of(arrays)
        return reply, update, law, size

    def _from_nodes(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Yield the nodes' replies; for a node that is gone, Flower itself answers."""
        for reply in replies:
            self._arrived(reply)
            if reply.metadata.src_node_id in self.known:
                yield reply
            elif reply.has_error():
                log.log(WARNING, "Flower says: %s", reply.error.reason)

    def _arrived(self, reply: Message) -> None:
        self.rounds[-1].up += reply_bytes(reply)
        self.rounds[-1].down += receipt_bytes(reply)

    def _check(self, reply: Message) -> None:
        node = reply.metadata.src_node_id
        if node not in self._asked:
            raise CodecError("Expected one reply of a node that was asked.")
        del self._asked[node]
        if reply.has_error():
            if reply.error.reason == NEED_MODEL:
                self.known[node].held = None
            raise CodecError(reply.error.reason or "an error without a reason")

    @property
    def _weight(self) -> str:
        """The metric that clients are weighted by."""
        return getattr(self.inner, "weighted_by_key", "num-examples")

    def _refuse(self, node: int, reason: str) -> None:
        name = self.known[node].name
        self.rounds[-1].refused[name] = reason
        log.log(WARNING, "The update of %s is left out of round %d: %s", name, self.rounds[-1].round, reason)

    def _close(self, *, missing: bool) -> None:
        for node in list(self._asked) if missing else ():
            self._refuse(node, "no reply")
        self._asked.clear()


LARGEST = 1e18  # whose squares are finite: servers' optimisers take them, and differences of two models
GREETING = 120.0  # seconds that nodes have for an answer to the greeting
ODD = "its metrics have other names than most, or other lengths"


def _source(message: Message) -> int:
    return int(message.metadata.src_node_id)


def _metrics(reply: Message, weight: str) -> MetricRecord:
    """Return a reply's metrics, if they are fit for an average.

    Raises:
        CodecError: they are not.
    """
    records = list(reply.content.metric_records.values())
    if len(records) != 1:
        raise CodecError(f"Expected one MetricRecord, got {len(records)}.")
    for name, value in records[0].items():
        if not np.isfinite(value).all():
            raise CodecError(f"Expected finite metrics, got {name} = {value}.")
    share = records[0].get(weight)
    if not isinstance(share, int | float) or share <= 0:
        raise CodecError(f"Expected the metric {weight} above 0, got {share}.")
    return records[0]


def _divide(reply: Message, weight: str, chance: float) -> None:
    """Let a reply that was the likelier to come count for the less: averages expect what all clients would make.

    (Horvitz and Thompson, 1952.)
    """
    (metrics,) = reply.content.metric_records.values()
    share = metrics[weight]
    assert isinstance(share, int | float)  # `_metrics` has seen to it
    metrics[weight] = share / chance


def _odd_ones(replies: dict[int, Message]) -> list[int]:
    """Return the nodes whose records have other names, or lists of other lengths, than those of most.

    A number and a list of one are not the same: averages add up the one, and go through the other.
    """

    def shape(reply: Message) -> tuple[object, ...]:
        records = reply.content.metric_records.items()
        lengths = (
            (key, name, len(value) if isinstance(value, list) else -1)
            for key, record in records
            for name, value in record.items()
        )
        return (*sorted(reply.content.array_records), *sorted(lengths))

    shapes = {node: shape(reply) for node, reply in replies.items()}
    usual = Counter(shapes.values()).most_common(1)
    return [node for node, found in shapes.items() if found != usual[0][0]]


def _take_law(metrics: MetricRecord) -> Law | None:
    """Take what a node says of its values' distribution out of its metrics; only the report depends on it."""
    told = {name: metrics.pop(name) for name in list(metrics) if name.startswith(LAW)}
    return Law.told({name.removeprefix(LAW): value for name, value in told.items()})
