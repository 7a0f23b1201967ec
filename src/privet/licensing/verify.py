"""Check a release against its manifest, and a licence against the release."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from privet.errors import (
    ChangedFileError,
    FileListError,
    OtherReleaseError,
    ReencodedError,
    UsageError,
    WrongLicenceError,
)
from privet.files import sha256
from privet.licensing.licence import Licence
from privet.licensing.manifest import FileRecord, Manifest, dropped, list_files, pixels_digest, read_manifest
from privet.parallel import ordered
from privet.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A release that holds.

    Attributes:
        manifest: what its vendor signed.
        images: how many of its files are images.
    """

    manifest: Manifest
    images: int


def verify(
    folder: Path,
    *,
    public: bytes | None = None,
    licence: Licence | None = None,
    today: datetime.date | None = None,
    workers: int = 4,
    progress: Progress = silent,
) -> Verified:
    """Check a release, and that a licence belongs to it and has not expired.

    Args:
        folder: the published folder.
        public: the vendor's key; may be left out with a licence, which holds it.
        licence: the licence to check, or None.
        today: by default today, UTC.
        workers: files read at a time.
        progress: told about files.

    Raises:
        InputError: the folder is none, or cannot be read.
        ManifestError, VersionError: the manifest is not what this vendor signed.
        FileListError: a file is missing, or one too many; what operating systems drop into folders does not count.
        ChangedFileError, ReencodedError: a file is not the one that was signed.
        OtherReleaseError, WrongLicenceError, ExpiredError: the licence does not hold for this release.
        UsageError: neither a key nor a licence: anybody could have signed.
    """
    if public is None:
        if licence is None:
            raise UsageError(
                "Expected the vendor's public key or a licence: without, anybody could have signed."
            )
        public = bytes.fromhex(licence.terms.public_key)
    manifest = read_manifest(folder, public=public)
    _check_list(folder, manifest)
    _check_files(folder, manifest, workers, progress)
    if licence is not None:
        _check_licence(manifest, licence)
        licence.terms.check_date(today)
    return Verified(
        manifest=manifest, images=sum(record.pixels is not None for record in manifest.files.values())
    )


def check_base(folder: Path, licence: Licence, *, workers: int = 4, progress: Progress = silent) -> Manifest:
    """Return the manifest of a release of which a copy can be made for a licence.

    Args:
        folder: the release, before any copy was marked.
        licence: of whoever gets the copy.
        workers: files read at a time.
        progress: told about files.

    Raises:
        UsageError: the folder is a copy itself, or the release has no L-infinity budget to stay in.
        LicenceError: as `verify`.
    """
    manifest = read_manifest(folder, public=bytes.fromhex(licence.terms.public_key))
    refuse_copy(folder, manifest)
    if (manifest.budget or {}).get("norm") != "linf":
        raise UsageError(
            f"A copy stays inside the release's budget, and {folder} names none that is L-infinity. Protect the "
            "originals with a method that keeps one."
        )
    return verify(folder, licence=licence, workers=workers, progress=progress).manifest


def refuse_copy(folder: Path, manifest: Manifest) -> None:
    """Raise UsageError if a folder is a licensee's copy: it differs from the release by that licensee's chips."""
    if manifest.copy is not None:
        raise UsageError(
            f"{folder} is a licensee's copy ({manifest.copy}), and what was compared with it or made of it would point "
            "at that licensee. Give the folder of the release itself."
        )


def _check_list(folder: Path, manifest: Manifest) -> None:
    there, signed = set(list_files(folder)), set(manifest.files)
    for found, what in (
        (signed - there, "missing"),
        ({path for path in there - signed if not dropped(folder, path)}, "not part of the release"),
    ):
        if found:
            raise FileListError(f"{_some(sorted(found))} in {folder}: {what}. Get the whole release again.")


def _check_files(folder: Path, manifest: Manifest, workers: int, progress: Progress) -> None:
    def look(path: str) -> tuple[str, FileRecord | None]:
        data = (folder / path).read_bytes()
        if sha256(data) == manifest.files[path].sha256:
            return path, None
        return path, FileRecord(sha256=sha256(data), pixels=pixels_digest(data))

    damaged: list[str] = []
    same: list[str] = []
    other: list[str] = []
    for done, (_, (path, found)) in enumerate(ordered(look, sorted(manifest.files), workers), start=1):
        progress("verifying", done, len(manifest.files))
        if found is None:
            continue
        if found.pixels is None:
            damaged.append(path)
        else:
            (same if found.pixels == manifest.files[path].pixels else other).append(path)
    if damaged:
        raise ChangedFileError(f"{_some(damaged)}: the bytes are not those that were signed. Get them again.")
    if other:
        raise ReencodedError(
            f"{_some(other)}: other pixels than were signed; resaved, resized or compressed images do not fit the "
            "licence any more. Get them again."
        )
    if same:
        raise ReencodedError(
            f"{_some(same)}: written anew. The pixels are those that were signed, the files are not. Get them again."
        )


def _check_licence(manifest: Manifest, licence: Licence) -> None:
    terms = licence.terms
    if terms.release != manifest.release:
        raise OtherReleaseError(
            f"The licence is for the release {terms.release!r}; this is {manifest.release!r}."
        )
    if terms.public_key != manifest.public_key:
        raise WrongLicenceError("The licence is another vendor's than the release.")
    if manifest.copy is not None and terms.copy != manifest.copy:
        raise WrongLicenceError(
            f"This is the copy {manifest.copy}; the licence goes with {terms.copy or 'the public release'}."
        )
    if licence.commitments != dict(manifest.commitments):
        raise WrongLicenceError(
            "The licence does not hold what the manifest commits to. Ask the vendor for the right one."
        )


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more
