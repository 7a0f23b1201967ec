"""What every codec is: bytes for an update, and what those bytes are decoded to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from privet.errors import CodecError, UsageError
from privet.federation.budget import Budget
from privet.federation.dense import write_dense
from privet.federation.schema import Schema, Tensor, Values
from privet.federation.state import Index, SenderState
from privet.federation.wire import Header, Reader, Section, Sections, frame_bytes, pack
from privet.seeds import derive


@dataclass(frozen=True)
class Decoded:
    """What a message tells of the compressed values: `values` at the positions `index`, or all if that is None."""

    values: Values
    index: Index | None = None

    def dense(self, size: int) -> Values:
        """Return all values; those that were not told are 0."""
        if self.index is None:
            return self.values
        whole = np.zeros(size, np.float32)
        whole[self.index] = self.values
        return whole


class Codec(ABC):
    """Turns updates into bytes. `encode` is final; a codec compresses one vector and reads it back.

    Attributes:
        name: the name that `create_codec` takes.
        number: the same on the wire.
        feedback: whether what a message leaves out is added to the next update.
        chooses: whether it sends a share of the values, which a budget may set; others send every value.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    feedback: ClassVar[bool] = False
    chooses: ClassVar[bool] = False

    def allow(self, budget: Budget | str | None) -> Budget | None:
        """Return a budget as `encode` takes it.

        Raises:
            UsageError: it is none, or of a kind that this codec does not have.
        """
        allowed = Budget.parse(budget) if isinstance(budget, str) else budget
        if allowed is not None and allowed.fraction is not None and not self.chooses:
            raise UsageError(f"{self.name} sends every value; give its budget in bytes, or none.")
        return allowed

    @final
    def encode(
        self,
        update: Mapping[str, NDArray[Any]],
        *,
        schema: Schema | None = None,
        budget: Budget | str | None = None,
        state: SenderState | None = None,
    ) -> bytes:
        """Return the message of an update.

        Args:
            update: arrays by name: what the model changed by. Compressed ones are rounded to float32.
            schema: of the model, or None to take it from the update.
            budget: "1%" of the values or "64KiB" in all, or None for the codec's usual size.
            state: of this sender; it gains what the message leaves out. None sends without memory.

        Raises:
            InputError: the update does not fit the schema, or has values that are not finite.
            UsageError: the budget is too small, or of a kind that this codec does not have.
        """
        schema = schema or Schema.of(update)
        allowed = self.allow(budget)
        values, plain = schema.flatten(update)
        if self.feedback and state is not None:
            values = state.carry(values)
        sections: Sections = {}
        if any(tensor.dense and tensor.size for tensor in schema.tensors):
            sections[Section.DENSE] = write_dense(plain, schema)
        decoded = None
        if schema.size:
            seed = derive(state.seed, "codec", state.round) if state else derive(0, "codec")
            more, decoded = self._fitting(values, schema, allowed, sections, seed)
            sections |= more
        header = Header(
            codec=self.number,
            schema=schema.hash,
            round=state.round if state else 0,
            base=state.base if state else 0,
        )
        if allowed is not None and allowed.bytes is not None and frame_bytes(sections) > allowed.bytes:
            raise UsageError(
                f"{self.name} needs {frame_bytes(sections):,} bytes for this update, got a budget of {allowed.bytes:,}."
            )
        if self.feedback and state is not None and decoded is not None:
            state.settle(values, decoded.index, decoded.values)
        return pack(header, sections)

    def _fitting(
        self, values: Values, schema: Schema, budget: Budget | None, others: Sections, seed: int
    ) -> tuple[Sections, Decoded]:
        """Return what `_compress` makes within the budget; codecs that have no choice of size make what they make."""
        return self._compress(values, schema, seed)

    @abstractmethod
    def _compress(self, values: Values, schema: Schema, seed: int) -> tuple[Sections, Decoded]:
        """Return the sections that hold these values, and what they are decoded to, to the last bit."""

    @classmethod
    @abstractmethod
    def _decompress(cls, sections: Sections, schema: Schema) -> Decoded:
        """Return what these sections hold.

        Raises:
            CodecError: they hold nothing of this schema.
        """


def values_only(sections: Sections, schema: Schema) -> Reader:
    """Return a reader of the only section of a codec that sends every value; it is absent if there is none.

    Raises:
        CodecError: there are other sections.
    """
    if set(sections) != ({Section.VALUES} if schema.size else set()):
        raise CodecError("Expected values and nothing else.")
    return Reader(sections.get(Section.VALUES, b""))


def tensor_by_tensor(sections: Sections, schema: Schema, read: Callable[[Reader, Tensor], Values]) -> Decoded:
    """Return what `read` takes off the only section for each compressed tensor, one after the other.

    Raises:
        CodecError: there are other sections, or bytes are left; and as `read`.
    """
    reader = values_only(sections, schema)
    parts = [read(reader, tensor) for tensor in schema.compressed]
    reader.end()
    return Decoded(np.concatenate([np.zeros(0, np.float32), *parts]))
