"""What a vendor keeps: one secret, from which every release's keys follow, and a signing pair.

A vendor's folder has `vendor.key` (both secrets, sealed with a passphrase, mode 0600) and `vendor.pub` (what
everybody may know). Each release and each licensee gets keys of its own by HKDF.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Self

from privet.errors import BundleError, InputError, ManifestError, MissingExtraError, OutputError
from privet.files import write_bytes
from privet.licensing.sealed import WORK, read_sealed, write_sealed
from privet.models.keyed_stem import KeyedStem, key_stream

KEY = "vendor.key"
PUBLIC = "vendor.pub"
SIZE = 32  # bytes of either secret


@dataclass(frozen=True, kw_only=True, eq=False)
class Vendor:
    """A vendor's secrets. Nothing of them is shown by `repr`, and nothing puts them into a message.

    Attributes:
        folder: where they lie.
        public: the 32 bytes of the Ed25519 key that signatures are checked with.
    """

    folder: Path
    public: bytes
    _secret: bytes = field(repr=False)
    _signing: bytes = field(repr=False)

    @classmethod
    def create(cls, folder: Path, passphrase: str, *, work: int = WORK) -> Self:
        """Draw new secrets from the system's generator and write them.

        Where the key file lies without the public key, a killed call left it: then the public key is written.

        Args:
            folder: gets `vendor.key` and `vendor.pub`; must not have the latter.
            passphrase: what opens the key file.
            work: as for `seal`.

        Raises:
            OutputError: there are keys already, or the folder cannot be written.
            PrivetError: as `open`, of a key file without a public key.
        """
        if (folder / PUBLIC).exists():
            raise OutputError(
                f"{folder / PUBLIC} exists. Whoever replaced it could trace no earlier release; choose a new folder."
            )
        if (folder / KEY).exists():
            vendor = cls.open(folder, passphrase)
        else:
            vendor = cls._of(folder, os.urandom(SIZE), os.urandom(SIZE))
            write_sealed(folder / KEY, vendor._secret + vendor._signing, passphrase, work=work)
        write_bytes(folder / PUBLIC, (vendor.public.hex() + "\n").encode())
        return vendor

    @classmethod
    def open(cls, folder: Path, passphrase: str) -> Self:
        """Read a vendor's secrets.

        Raises:
            InputError, BundleError, VersionError, PassphraseError: as `read_sealed`.
        """
        secrets = read_sealed(folder / KEY, passphrase)
        if len(secrets) != 2 * SIZE:
            raise BundleError(f"{folder / KEY} does not hold a vendor's keys.")
        return cls._of(folder, secrets[:SIZE], secrets[SIZE:])

    @classmethod
    def _of(cls, folder: Path, secret: bytes, signing: bytes) -> Self:
        try:
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        except ImportError as error:
            raise MissingExtraError("Licensing", "licensing") from error
        public = Ed25519PrivateKey.from_private_bytes(signing).public_key().public_bytes_raw()
        return cls(folder=folder, public=public, _secret=secret, _signing=signing)

    def sign(self, message: bytes) -> bytes:
        """Return the Ed25519 signature of a message."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self._signing).sign(message)

    def stem(self, release: str, *, group: int = 4, tile: int = 8, grey: bool = False) -> KeyedStem:
        """Return the stem of a release; the arguments are those of `KeyedStem.from_key`."""
        return KeyedStem.from_key(self.stem_key(release), group=group, tile=tile, grey=grey)

    def stem_key(self, release: str) -> bytes:
        """Return the key of a release's stem, and of the noise that the stem takes away."""
        return self._derive("stem", release)

    def salt(self, release: str) -> bytes:
        """Return the 32 bytes that keep a release's commitments from being guessed."""
        return self._derive("salt", release)

    def fingerprint(self, release: str, copy: str) -> bytes:
        """Return the key of a copy's fingerprint."""
        return self._derive("fingerprint", release, copy)

    def copy_name(self, release: str, licensee: str) -> str:
        """Return the name of a licensee's copy, which says nothing of who they are."""
        return self._derive("copy", release, licensee)[:8].hex()

    def _derive(self, *purpose: str) -> bytes:
        # Lengths keep two purposes from ever reading alike.
        return key_stream(self._secret, "".join(f"{len(part)}:{part}" for part in purpose), SIZE)

    def __reduce__(self) -> NoReturn:
        raise TypeError("A vendor's keys are not pickled.")


def read_public(path: Path) -> bytes:
    """Return the key of a `vendor.pub`.

    Raises:
        InputError: it is not one.
    """
    path = path / PUBLIC if path.is_dir() else path
    try:
        key = bytes.fromhex(path.read_text("ascii").strip())
    except OSError as error:
        raise InputError(
            f"Cannot read a vendor's public key from {path}: {error.strerror or error}."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not a vendor's public key.") from error
    if len(key) != SIZE:
        raise InputError(f"{path} is not a vendor's public key: expected {SIZE} bytes, got {len(key)}.")
    return key


def check_signature(public: bytes, signature: bytes, message: bytes, *, name: str) -> None:
    """Raise ManifestError unless the key's owner signed the message."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        raise MissingExtraError("Licensing", "licensing") from error
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise ManifestError(
            f"{name} is not what the vendor {key_id(public)} signed: it was changed, or another signed it."
        ) from None


def key_id(public: bytes) -> str:
    """Return a public key's name: the first 16 digits of its SHA-256."""
    return hashlib.sha256(public).hexdigest()[:16]
