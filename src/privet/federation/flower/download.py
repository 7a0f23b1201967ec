"""The way down: versions of the model that the nodes hold, and the differences that lead from one to the next."""

from __future__ import annotations

from dataclasses import dataclass, field

from flwr.app import ArrayRecord

from privet.federation.base import Codec
from privet.federation.budget import Budget
from privet.federation.flower.link import Arrays, difference, digest, moved, pack, record_of, schema_of
from privet.federation.message import decode
from privet.federation.state import SenderState


@dataclass(kw_only=True)
class Download:
    """What goes down to the nodes.

    The server's model w moves every round; what the nodes hold, v, follows it by compressed differences. Each
    is made of w − v, so what one leaves out comes with the next, and nothing is lost.

    Attributes:
        codec: for the differences; None sends whole models, so that v = w.
        budget: of one difference, as for `Codec.encode`.
        weights: w; empty before the first round.
        visible: v.
        version: of v.
        first: digest of the model of version 0.
        blobs: differences by the version that each starts from; the last ones, as many as are shorter than a model.
    """

    codec: Codec | None
    budget: Budget | None
    weights: Arrays = field(default_factory=dict)
    visible: Arrays = field(default_factory=dict)
    version: int = 0
    first: str = ""
    blobs: dict[int, bytes] = field(default_factory=dict)
    _records: dict[int, ArrayRecord] = field(default_factory=dict, repr=False)

    def follow(self, weights: Arrays) -> None:
        """Let v follow a new w.

        Raises:
            InputError: w is not finite.
            UsageError: the codec cannot keep the budget.
        """
        if not self.visible or self.codec is None:
            self.version += bool(self.visible)
            self.first = self.first or digest(weights)
            self.weights = self.visible = weights
        else:
            self.weights = weights
            schema = schema_of(self.visible)
            sender = SenderState(round=self.version, base=self.version)
            blob = self.codec.encode(
                difference(weights, self.visible), schema=schema, budget=self.budget, state=sender
            )
            self.visible = moved(self.visible, decode(blob, schema))
            self.blobs[self.version] = blob
            self.version += 1
            while sum(map(len, self.blobs.values())) >= self._size:
                del self.blobs[min(self.blobs)]
        self._records.clear()

    @property
    def _size(self) -> int:
        return sum(array.nbytes for array in self.visible.values())

    def record(self, held: int | None) -> tuple[int, ArrayRecord]:
        """Return what brings a node to this version, and the version that it starts from.

        Args:
            held: the version that the node holds, or None; it gets the whole model if it holds none, or if
                that is no longer than the differences that it missed.
        """
        start = self.version if held is None else held
        chain = [self.blobs[number] for number in range(start, self.version) if number in self.blobs]
        if held is None or len(chain) < self.version - start:
            start, chain = -1, []
        if start not in self._records:
            self._records[start] = record_of(self.visible) if start < 0 else pack(chain)
        return self.version if start < 0 else start, self._records[start]
