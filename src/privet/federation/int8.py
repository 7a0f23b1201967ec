"""Every value as one of 255 steps: what most people mean by a quantised update."""

from __future__ import annotations

from dataclasses import dataclass

from privet.federation.base import Codec, Decoded, tensor_by_tensor
from privet.federation.dense import read_bytes, write_bytes
from privet.federation.schema import Schema, Values
from privet.federation.wire import Section, Sections


@dataclass(frozen=True)
class Int8(Codec):
    """Every value rounded to a whole number of steps, -127 to 127; each tensor has its own step."""

    name = "int8"
    number = 3

    def _compress(self, values: Values, schema: Schema, seed: int) -> tuple[Sections, Decoded]:
        data = b"".join(write_bytes(part) for part in schema.parts(values))
        return {Section.VALUES: data}, self._decompress({Section.VALUES: data}, schema)

    @classmethod
    def _decompress(cls, sections: Sections, schema: Schema) -> Decoded:
        return tensor_by_tensor(
            sections, schema, lambda reader, tensor: read_bytes(reader, tensor.size, tensor.name)
        )
