"""A sealed file: bytes that only a passphrase opens (scrypt and ChaCha20-Poly1305, both of `cryptography`).

Layout: MAGIC (8), version (1), log2 of scrypt's cost (1), salt (16), nonce (12), length of the ciphertext
(8, little-endian), ciphertext, SHA-256 of all before (32). The checksum needs no secret: it tells a torn or
damaged file from a wrong passphrase. The header is authenticated together with the content.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from privet.errors import (
    BundleError,
    InputError,
    MissingExtraError,
    PassphraseError,
    UsageError,
    VersionError,
)
from privet.files import write_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

MAGIC = b"PRIVETS\n"
VERSION = 1
HEADER = struct.Struct("<8sBB16s12sQ")
CHECKSUM = 32
WORK = 17  # log2 of scrypt's cost: 128 MiB and less than a second
MOST_WORK = 20  # what a stranger's file may ask for: 1 GiB
LARGEST = 1 << 34  # bytes


def write_sealed(path: Path, content: bytes, passphrase: str, *, work: int = WORK) -> None:
    """Write a sealed file of mode 0600, atomically."""
    write_bytes(path, seal(content, passphrase, work=work), private=True)


def read_sealed(path: Path, passphrase: str) -> bytes:
    """Return what a sealed file holds.

    Raises:
        InputError: it cannot be read.
        BundleError: it is damaged.
        VersionError: another version's.
        PassphraseError: the passphrase does not open it.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise BundleError(f"{path} is larger than any file that privet seals.")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.") from error
    return unseal(data, passphrase, name=str(path))


def seal(content: bytes, passphrase: str, *, work: int = WORK) -> bytes:
    """Return `content` sealed.

    Args:
        content: anything.
        passphrase: not empty; compared by Unicode's form NFC.
        work: log2 of scrypt's cost; each step doubles time and memory, for the owner and the guesser.

    Raises:
        UsageError: no passphrase.
        MissingExtraError: `cryptography` is not installed.
    """
    salt, nonce = os.urandom(16), os.urandom(12)
    # ChaCha20-Poly1305 adds a tag of 16 bytes.
    header = HEADER.pack(MAGIC, VERSION, work, salt, nonce, len(content) + 16)
    data = header + _cipher(passphrase, salt, work).encrypt(nonce, content, header)
    return data + hashlib.sha256(data).digest()


def unseal(data: bytes, passphrase: str, *, name: str = "The file") -> bytes:
    """Return what was sealed.

    Raises:
        BundleError: truncated, damaged, or not sealed by privet.
        VersionError: another version's.
        PassphraseError: the passphrase does not open it.
        UsageError: no passphrase.
    """
    if len(data) < HEADER.size + CHECKSUM:
        raise BundleError(f"{name} is too short for a sealed file; get it again.")
    magic, version, work, salt, nonce, length = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise BundleError(f"{name} is not a file that privet sealed.")
    if version != VERSION:
        raise VersionError(f"{name} has format {version}; this privet knows {VERSION}. Install a newer one.")
    if len(data) != HEADER.size + length + CHECKSUM:
        raise BundleError(
            f"{name} is truncated or torn: expected {HEADER.size + length + CHECKSUM} bytes, got {len(data)}."
        )
    if not hmac.compare_digest(hashlib.sha256(data[:-CHECKSUM]).digest(), data[-CHECKSUM:]):
        raise BundleError(f"{name} is damaged: its checksum does not fit. Get it again.")
    if not 1 <= work <= MOST_WORK:
        raise BundleError(f"{name} asks for a scrypt cost of 2^{work}; expected at most 2^{MOST_WORK}.")
    cipher = _cipher(passphrase, salt, work)
    from cryptography.exceptions import InvalidTag

    try:
        return cipher.decrypt(nonce, data[HEADER.size : -CHECKSUM], data[: HEADER.size])
    except InvalidTag:
        raise PassphraseError(f"The passphrase does not open {name}.") from None


def _cipher(passphrase: str, salt: bytes, work: int) -> ChaCha20Poly1305:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
    except ImportError as error:
        raise MissingExtraError("Licensing", "licensing") from error
    if not passphrase:
        raise UsageError("Expected a passphrase, got an empty one.")
    words = unicodedata.normalize("NFC", passphrase).encode("utf-8", "surrogateescape")
    return ChaCha20Poly1305(Scrypt(salt=salt, length=32, n=1 << work, r=8, p=1).derive(words))
