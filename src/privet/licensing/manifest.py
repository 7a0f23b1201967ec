"""A release's manifest: what was published, and what its licences must hold, signed by the vendor.

`release.json` lies in the published folder, as canonical JSON (sorted keys, no spaces, UTF-8). The signature covers
the canonical bytes of all but itself. Secrets appear as commitments only: SHA-256 over 32 secret bytes and
the digest of what is committed to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import torch
from torch import Tensor

from privet.errors import FileListError, InputError, ManifestError, UsageError, VersionError
from privet.files import TEMPORARY, WORKSPACE, sha256, write_bytes
from privet.images.picture import PictureError, decode
from privet.images.source import CLUTTER
from privet.licensing.keys import Vendor, check_signature
from privet.parallel import ordered
from privet.protection.surrogate import FILE as SURROGATE

NAME = "release.json"
FORMAT = "privet-release-1"
LARGEST = 1 << 30  # bytes of a manifest
HEX = re.compile(r"[0-9a-f]{64}")
DROPPED = frozenset((*CLUTTER, ".ds_store"))  # by Windows and macOS, into folders that somebody looked at


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One published file.

    Attributes:
        sha256: of its bytes.
        pixels: SHA-256 of its decoded pixels, or None for what is no image.
    """

    sha256: str
    pixels: str | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a vendor says of a release.

    Attributes:
        release: its name.
        copy: which licensee's fingerprinted copy this is, as an opaque name, or None.
        created: UTC, ISO 8601.
        public_key: the vendor's, in hexadecimal.
        files: every published file by its path, with forward slashes.
        method: of the protection, if its run.json says so.
        budget: of the protection, likewise.
        commitments: for "stem", "lock", "weights" and "recipe", as far as the licence has them.
        audit: SHA-256 of the audit's report.json, or None: this release was not audited.
    """

    release: str
    copy: str | None
    created: str
    public_key: str
    files: Mapping[str, FileRecord]
    method: str | None
    budget: Mapping[str, Any] | None
    commitments: Mapping[str, str]
    audit: str | None

    @property
    def merkle_root(self) -> str:
        """The root over all files, in the order of their paths."""
        return merkle_root([canonical([path, self.files[path].sha256]) for path in sorted(self.files)])

    def json(self) -> dict[str, Any]:
        """Return everything but the signature."""
        return {"format": FORMAT, **asdict(self), "merkle_root": self.merkle_root}


def canonical(value: Any) -> bytes:
    """Return JSON that depends on the value alone."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def merkle_root(leaves: Sequence[bytes]) -> str:
    """Return the root of a Merkle tree in hexadecimal (RFC 6962: leaves and nodes are hashed apart)."""
    level = [hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]
    if not level:
        return hashlib.sha256().hexdigest()
    while len(level) > 1:
        odd = level[-1:] if len(level) % 2 else []
        pairs = zip(level[::2], level[1::2], strict=False)
        level = [hashlib.sha256(b"\1" + one + other).digest() for one, other in pairs] + odd
    return level[0].hex()


def commit(salt: bytes, value: Mapping[str, Tensor] | Mapping[str, Any]) -> str:
    """Return the commitment to tensors or to JSON; it says nothing of them without the salt.

    Args:
        salt: 32 secret bytes.
        value: tensors by name, or what JSON can hold.
    """
    described = {
        name: [str(one.dtype), list(one.shape), sha256(_raw(one))] if isinstance(one, Tensor) else one
        for name, one in value.items()
    }
    return sha256(salt + hashlib.sha256(canonical(described)).digest())


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def describe_files(folder: Path, *, workers: int = 4) -> dict[str, FileRecord]:
    """Return a record of every file of a release, the manifest itself and what a system or a kill left aside.

    Raises:
        InputError: nothing is there, or something that must not be published.
    """
    paths = [path for path in list_files(folder) if not dropped(folder, path)]
    if not paths:
        raise InputError(f"There is no file in {folder} to release.")
    for path in paths:
        if Path(path).name == SURROGATE:
            raise InputError(
                f"{folder / path} helps others to undo the protection. Move it to a private place before the release."
            )

    def describe(path: str) -> FileRecord:
        data = (folder / path).read_bytes()
        return FileRecord(sha256=sha256(data), pixels=pixels_digest(data))

    return dict(ordered(describe, paths, workers))


def list_files(folder: Path) -> Iterator[str]:
    """Yield the path of every published file, sorted; links and pipes are an error.

    Raises:
        InputError: the folder is none, cannot be read, or is an unfinished run's.
        FileListError: something in it is not a regular file.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    if (folder / WORKSPACE).exists():
        raise InputError(f"{folder} holds an unfinished run. Give its command again, then come back.")

    def unreadable(error: OSError) -> NoReturn:
        raise InputError(f"Cannot read {error.filename}: {error.strerror}.") from error

    found = []
    for place, folders, names in os.walk(folder, onerror=unreadable):
        for name in (*names, *(one for one in folders if Path(place, one).is_symlink())):
            path = Path(place, name)
            if not stat.S_ISREG(path.lstat().st_mode):
                raise FileListError(f"{path} is not a regular file; a release has only such.")
            if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
                raise FileListError(
                    f"{str(path)!r} has a name that is not UTF-8, which JSON cannot hold. Rename it."
                )
            found.append(path.relative_to(folder).as_posix())
    yield from (path for path in sorted(found) if path != NAME)


def dropped(folder: Path, path: str) -> bool:
    """Say whether a file of a folder is none of the release's: one that a system or a kill left there, and no image."""
    name = PurePosixPath(path).name
    known = (
        name.casefold() in DROPPED
        or name.startswith("._")  # macOS, beside each file on foreign disks
        or TEMPORARY.fullmatch(name) is not None
    )
    return known and pixels_digest((folder / path).read_bytes()) is None


def pixels_digest(data: bytes) -> str | None:
    """Return the SHA-256 of an image file's pixels, or None if it is no whole image."""
    try:
        picture = decode(data)
    except PictureError:
        return None
    deep = picture.rgb if picture.deep is None else picture.deep
    alpha = b"" if picture.alpha is None else picture.alpha.tobytes()
    return sha256(repr((deep.shape, str(deep.dtype))).encode() + deep.tobytes() + alpha)


def write_manifest(folder: Path, manifest: Manifest, vendor: Vendor) -> None:
    """Sign a manifest and write it into its folder."""
    content = manifest.json()
    signed = {**content, "signature": vendor.sign(canonical(content)).hex()}
    write_bytes(folder / NAME, canonical(signed) + b"\n")


def read_manifest(folder: Path, *, public: bytes) -> Manifest:
    """Return a folder's manifest, after its signature was checked.

    Raises:
        InputError: there is no such folder, or the manifest cannot be read.
        ManifestError: the folder has none, it is damaged, or the owner of `public` did not sign it.
        VersionError: another version's.
    """
    path = folder / NAME
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    try:
        if path.stat().st_size > LARGEST:
            raise ManifestError(f"{path} is larger than any manifest.")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ManifestError(f"There is no {NAME} in {folder}. Get the whole release.") from error
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.") from error
    return parse_manifest(data, public=public, name=str(path))


def parse_manifest(data: bytes, *, public: bytes, name: str = NAME) -> Manifest:
    """Return the manifest in these bytes; arguments and errors as for `read_manifest`."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{name} is damaged: not JSON.") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), str):
        raise ManifestError(f"{name} is not a release's manifest.")
    if content["format"] != FORMAT:
        raise VersionError(
            f"{name} has the format {content['format'][:40]!r}; this privet knows {FORMAT}. Install a newer one."
        )
    try:
        signature = bytes.fromhex(content.pop("signature"))
        message = canonical(content)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ManifestError(f"{name} is damaged: its signature cannot be read.") from error
    check_signature(public, signature, message, name=name)
    manifest = _manifest(content, name)
    if manifest.public_key != public.hex():
        raise ManifestError(f"{name} names another vendor than the one who signed it.")
    return manifest


def _manifest(content: dict[str, Any], name: str) -> Manifest:
    """Return the manifest of signed content: the vendor's own mistakes are errors, too."""
    try:
        content.pop("format")
        root = content.pop("merkle_root")
        files = {path: FileRecord(**record) for path, record in content.pop("files").items()}
        manifest = Manifest(files=files, **content)
        hashes = [record.sha256 for record in files.values()] + list(manifest.commitments.values())
        if not all(HEX.fullmatch(one) for one in hashes) or root != manifest.merkle_root:
            raise ValueError("hashes")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ManifestError(f"{name} is signed, but malformed; tell the vendor.") from error
    return manifest


def check_name(name: str) -> str:
    """Return a release's or copy's name if it can be a file's name.

    Raises:
        UsageError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UsageError(f"Expected a name of at most 64 letters, digits, '.', '_' and '-', got {name!r}.")
    return name
