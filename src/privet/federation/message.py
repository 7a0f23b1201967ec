"""Any codec's message: read it, and say what is in it."""

from __future__ import annotations

from privet.errors import CodecError
from privet.federation.base import Codec, Decoded
from privet.federation.dense import read_dense
from privet.federation.dhq import DHQ
from privet.federation.eden import EDEN
from privet.federation.fp16 import FP16
from privet.federation.int8 import Int8
from privet.federation.qsgd import QSGD
from privet.federation.schema import Schema, Update, finite
from privet.federation.sign import ScaledSign
from privet.federation.stc import STC
from privet.federation.terngrad import TernGrad
from privet.federation.topk import TopK
from privet.federation.wire import Header, Section, unpack

CODECS: dict[str, type[Codec]] = {
    codec.name: codec for codec in (DHQ, FP16, Int8, QSGD, TernGrad, ScaledSign, TopK, STC, EDEN)
}
_BY_NUMBER = {codec.number: codec for codec in CODECS.values()}


def decode(blob: bytes, schema: Schema) -> Update:
    """Return the update of a message: arrays by name, floats as float32, integers in their dtype.

    The bytes are taken to be hostile. Whatever they are, this returns finite arrays of the schema's
    shapes or raises one error, and takes no more memory than a few times the schema's size.

    Raises:
        CodecError: the message is damaged, malformed, or of another model.
    """
    return decode_headed(blob, schema)[1]


def decode_headed(blob: bytes, schema: Schema) -> tuple[Header, Update]:
    """Return a message's header and its update, on the terms of `decode`.

    Raises:
        CodecError: as for `decode`.
    """
    header, decoded, plain = read(blob, schema)
    return header, schema.unflatten(decoded.dense(schema.size), plain)


def read(blob: bytes, schema: Schema) -> tuple[Header, Decoded, Update]:
    """Return a message's header, what it tells of the compressed values, and the dense tensors.

    Raises:
        CodecError: as for `decode`.
    """
    if len(blob) > schema.most_bytes:
        raise CodecError(f"Expected a message of at most {schema.most_bytes:,} bytes, got {len(blob):,}.")
    header, sections = unpack(blob)
    if header.schema != schema.hash:
        raise CodecError("The message was made for a model with other tensors.")
    codec = codec_of(header)
    plain: Update = {}
    has_dense = any(tensor.dense and tensor.size for tensor in schema.tensors)
    if has_dense != (Section.DENSE in sections):
        raise CodecError("Expected dense tensors where the model has some, and nowhere else.")
    plain = read_dense(sections.pop(Section.DENSE, b""), schema)
    decoded = codec._decompress(sections, schema)
    if not finite(decoded.values):
        raise CodecError("Expected finite values.")
    return header, decoded, plain


def codec_of(header: Header) -> type[Codec]:
    """Return the codec that made a message.

    Raises:
        CodecError: there is none of this number.
    """
    if header.codec not in _BY_NUMBER:
        raise CodecError(
            f"Expected a codec of {', '.join(map(str, sorted(_BY_NUMBER)))}, got number {header.codec}."
        )
    return _BY_NUMBER[header.codec]
