"""Grids: one that shows a part of another's nodes, and one whose nodes live in this process."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

RAISED = 2  # Flower's code for a ClientApp that raised an exception
PAUSE = 1.0  # seconds between looks for nodes


class Shown(Grid):
    """Shows some of a grid's nodes, so that a strategy asks these and no others.

    Args:
        grid: the grid.
        nodes: those that are shown; None shows all.
    """

    def __init__(self, grid: Grid, nodes: Collection[int] | None = None) -> None:
        self.grid = grid
        self.nodes = nodes

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are shown."""
        return list(self.grid.get_node_ids() if self.nodes is None else self.nodes)

    def wait(self, count: int) -> list[int]:
        """Return the nodes as soon as there are so many."""
        while len(nodes := sorted(self.get_node_ids())) < count:
            time.sleep(PAUSE)
        return nodes

    def set_run(self, run: Any) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        return self.grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self.grid.create_message(*args, **kwargs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.grid.send_and_receive(messages, timeout=timeout)


class LocalGrid(Grid):
    """Nodes in this process, one after another: no Ray, no sockets, and the same bytes in every run.

    Args:
        client: the ClientApp of all nodes.
        nodes: the configuration of each; its position, from 1, is its id.
        run_config: what the apps find in their context.
    """

    def __init__(
        self,
        client: ClientApp,
        nodes: Iterable[Mapping[str, Any]],
        *,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        _identify()
        self.client = client
        self.contexts = {
            number: Context(1, number, dict(config), RecordDict(), dict(run_config or {}))
            for number, config in enumerate(nodes, 1)
        }
        self._run: Any = None
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, *args: Any, **kwargs: Any
    ) -> Message:
        return Message(content, message_type=message_type, dst_node_id=dst_node_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages at once."""
        numbers = []
        for message in messages:
            numbers.append(str(len(self._replies)))
            self._replies[numbers[-1]] = self._deliver(message)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies."""
        return [self._replies[number] for number in message_ids]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Deliver messages one after another, and return the replies in the same order."""
        return [self._deliver(message) for message in messages]

    def _deliver(self, message: Message) -> Message:
        try:
            return self.client(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # whatever a ClientApp does, Flower's runtimes answer for it, too
            return Message(Error(RAISED, repr(error)), reply_to=message)


def _identify() -> None:
    """Say who writes messages in this process; Flower's runtimes do so before they start an app."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:  # other versions do not ask
        return
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
