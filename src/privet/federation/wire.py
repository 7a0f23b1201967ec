"""Bytes in and out: varints, a reader that never passes its end, CRC-32C, and the frame of every message.

docs/codec-format.md is the specification; all numbers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from privet.errors import CodecError
from privet.federation.fast import fast, jit

Bytes = NDArray[np.uint8]

MAGIC = b"PVUP"
VERSION = 1
_HEADER = struct.Struct("<4sBB8sII")  # magic, version, codec, schema hash, round, base version
_CRC = struct.Struct("<I")
FRAME_BYTES = _HEADER.size + _CRC.size
VARINT_BYTES = 10  # of 7 bits: enough for 64


class Reader:
    """Takes fields off a payload; whatever is missing, too long or left over is a CodecError."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> bytes:
        """Return the next `count` bytes."""
        if count < 0 or count > self.left:
            raise CodecError(f"Expected {count:,} bytes of {what}, but only {self.left:,} are left.")
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self, what: str, *, most: int = 255) -> int:
        """Return the next byte, at most `most`."""
        value = self.take(1, what)[0]
        if value > most:
            raise CodecError(f"Expected {what} of at most {most}, got {value}.")
        return value

    def varint(self, what: str, *, most: int) -> int:
        """Return the next varint, at most `most`, in its only valid form: the shortest."""
        value = 0
        for position in range(VARINT_BYTES):
            byte = self.byte(what)
            value |= (byte & 127) << (7 * position)
            if byte < 128:
                if byte == 0 and position:
                    raise CodecError(f"Expected {what} in its shortest form.")
                if value > most:
                    raise CodecError(f"Expected {what} of at most {most:,}, got {value:,}.")
                return value
        raise CodecError(f"Expected {what} of at most {VARINT_BYTES} bytes.")

    def scale(self) -> np.float32:
        """Return the next float32, which is finite and not negative."""
        scale: np.float32 = np.frombuffer(self.take(4, "scale"), "<f4")[0]
        if not np.isfinite(scale) or np.signbit(scale):
            raise CodecError(f"Expected a finite scale of 0 or more, got {scale}.")
        return scale

    def end(self) -> None:
        """Check that everything was read."""
        if self.left:
            raise CodecError(f"Expected the end of the message, but {self.left:,} bytes are left.")


def varint(value: int) -> bytes:
    """Return a number of 0 or more as seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class Section(IntEnum):
    """What a part of a message holds; docs/codec-format.md says how."""

    DENSE = 1
    LEVELS = 2
    RICE = 3
    CONTEXT = 4
    SYMBOLS = 5
    VALUES = 6


Sections = dict[Section, bytes]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the frame says of a message.

    Attributes:
        codec: number of the codec that made it.
        schema: 8 bytes that tell models apart (`Schema.hash`).
        round: of the federation, from 0.
        base: version of the model that the update is a difference to.
    """

    codec: int
    schema: bytes
    round: int = 0
    base: int = 0


def frame_bytes(sections: Sections) -> int:
    """Return the length of the message that these sections make."""
    return FRAME_BYTES + 1 + sum(1 + len(varint(len(body))) + len(body) for body in sections.values())


def pack(header: Header, sections: Sections) -> bytes:
    """Return the message: header, table of sections, sections, CRC-32C of it all."""
    front = _HEADER.pack(MAGIC, VERSION, header.codec, header.schema, header.round, header.base)
    table = bytes([len(sections)]) + b"".join(
        bytes([kind]) + varint(len(sections[kind])) for kind in sorted(sections)
    )
    data = front + table + b"".join(sections[kind] for kind in sorted(sections))
    return data + _CRC.pack(crc32c(data))


def unpack(blob: bytes) -> tuple[Header, Sections]:
    """Return header and sections of a message.

    Raises:
        CodecError: no message, another format version, or damaged.
    """
    if len(blob) < FRAME_BYTES + 1:
        raise CodecError(f"Expected a message of at least {FRAME_BYTES + 1} bytes, got {len(blob)}.")
    magic, version, codec, schema, number, base = _HEADER.unpack_from(blob)
    if magic != MAGIC:
        raise CodecError(f"Expected a message that begins with {MAGIC!r}, got {bytes(magic)!r}.")
    if version != VERSION:
        raise CodecError(f"Expected format version {VERSION}, got {version}; update the older side.")
    (expected,) = _CRC.unpack_from(blob, len(blob) - _CRC.size)
    if crc32c(blob[: -_CRC.size]) != expected:
        raise CodecError("The message's checksum does not match: it is damaged or cut off.")
    reader = Reader(blob[_HEADER.size : -_CRC.size])
    kinds: list[tuple[Section, int]] = []
    for _ in range(reader.byte("number of sections", most=len(Section))):
        kind = reader.byte("kind of section", most=max(Section))
        if kind < 1 or (kinds and kind <= kinds[-1][0]):
            raise CodecError("Expected sections of known kinds in ascending order.")
        kinds.append((Section(kind), reader.varint("length of a section", most=len(blob))))
    sections = {kind: reader.take(length, kind.name.lower()) for kind, length in kinds}
    reader.end()
    return Header(codec=codec, schema=schema, round=number, base=base), sections


def _table() -> NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1).astype(np.uint32)
    return table


_TABLE = _table()
_LANES = 256


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of `data`."""
    values = np.frombuffer(data, np.uint8)
    if fast():
        return int(_crc(values, _TABLE, np.uint32(0xFFFFFFFF))) ^ 0xFFFFFFFF
    state = 0xFFFFFFFF
    table: list[int] = _TABLE.tolist()
    length = len(data) // _LANES
    if length >= 64:  # all lanes at once; then, as a CRC is linear, push each one's through the next
        parts = values[: length * _LANES].reshape(_LANES, length)
        lanes = np.zeros(_LANES, np.uint32)
        for column in range(length):
            lanes = _TABLE[(lanes ^ parts[:, column]) & 255] ^ (lanes >> np.uint32(8))
        push = _zeros(length)
        for lane in lanes.tolist():
            state = (
                push[0][state & 255]
                ^ push[1][state >> 8 & 255]
                ^ push[2][state >> 16 & 255]
                ^ push[3][state >> 24]
                ^ lane
            )
        data = data[length * _LANES :]
    for byte in data:
        state = table[(state ^ byte) & 255] ^ state >> 8
    return state ^ 0xFFFFFFFF


def _zeros(count: int) -> list[list[int]]:
    """Return what `count` zero bytes make of a state, as a table for each of its four bytes."""
    powers = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(count):
        powers = _TABLE[powers & 255] ^ (powers >> np.uint32(8))
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1 == 1  # (bytes, bits)
    return [
        np.bitwise_xor.reduce(np.where(bits, powers[None, 8 * part : 8 * part + 8], 0), axis=1).tolist()
        for part in range(4)
    ]


@jit
def _crc(values: Bytes, table: NDArray[np.uint32], state: np.uint32) -> np.uint32:
    for value in values:
        state = table[(state ^ value) & np.uint32(255)] ^ (state >> np.uint32(8))
    return state
