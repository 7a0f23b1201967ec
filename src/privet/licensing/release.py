"""Make a release of protected files: sign what is in it, and keep what licences are made of.

The vendor's folder gets, beside the keys, one licence for each release, sealed with the vendor's own
passphrase, from which licensees' are made (`NAME.licence`), and a digest of the images that the name was used
for (`NAME.images.json`). It is private.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from privet.errors import InputError, LicenceError, OutputError, UsageError
from privet.files import RUN, json_line, read_json, sha256, write_bytes
from privet.images import ImageSet, open_images, pair
from privet.images.picture import measure
from privet.learning import Learner
from privet.licensing.keys import Vendor
from privet.licensing.licence import Licence, Terms, read_licence, write_licence
from privet.licensing.manifest import (
    FileRecord,
    Manifest,
    canonical,
    check_name,
    describe_files,
    write_manifest,
)
from privet.licensing.protect import weights_path
from privet.licensing.sealed import WORK
from privet.licensing.unlock import Unlock
from privet.models import load_model
from privet.models.keyed_stem import KeyedStem
from privet.models.weights import read_tensors
from privet.progress import Progress, silent
from privet.protection import UGE, KeyedEM, Lock

PRIVATE = (".key", ".licence", ".safetensors")  # of files in a vendor's folder that nobody else may have


@dataclass(frozen=True, kw_only=True)
class StemPlan:
    """The stem that a release shall have; as for `KeyedStem.from_key`."""

    group: int = 4
    tile: int = 8
    grey: bool = False


def release(
    folder: Path,
    vendor: Vendor,
    name: str,
    passphrase: str,
    *,
    stem: StemPlan | None = None,
    lock: bool = False,
    clean: str | Path | None = None,
    weights: Path | None = None,
    recipe: Mapping[str, Any] | None = None,
    audit: Path | None = None,
    work: int = WORK,
    progress: Progress = silent,
) -> Manifest:
    """Make a release of a folder of protected files: sign its manifest, and keep what licences are made of.

    Args:
        folder: what was protected; gets `release.json`.
        vendor: who signs.
        name: of the release, never used for other images; the stem follows from it.
        passphrase: of the vendor, for the file that the licences are made from.
        stem: the stem that the perturbation was confined to; None for what `protect` wrote into run.json,
            if it made these files, and else for no stem.
        lock: each class was changed by one pattern, which licences shall hold; known of what `protect` locked.
        clean: the originals; needed with a stem, to check that through it both look the same, and with a
            lock, to find its patterns.
        weights: the secret initial weights, as a file that privet saved; None for none, or for those that `protect`
            left in the vendor's folder.
        recipe: settings of `Learner` by name.
        audit: the report.json of the audit of these files, or None.
        work: as for `seal`.
        progress: told about images.

    Raises:
        UsageError: no stem, lock or weights, so that nothing would authorise; or a recipe that cannot work.
        LicenceError: the perturbation is not what the stem takes away, or no lock.
        InputError: the folder holds something secret, or as usual.
        OutputError: there was a release of this name with other images, keys or recipe, or as usual.
    """
    check_name(name)
    settings = check_recipe(recipe or {})
    run = read_json(folder / RUN) if (folder / RUN).exists() else {}
    stem, lock = stem or _planned(run), lock or run.get("method") == Lock.name
    if weights is None and run.get("method") == UGE.name:
        weights = weights_path(vendor, name)
    if stem is None and weights is None and not lock:
        raise UsageError(
            "Expected a stem, a lock or initial weights: without any, everybody is authorised alike."
        )
    _check_places(folder, vendor, weights)
    tensors: dict[str, Tensor] = {}
    if stem is not None or lock:
        if clean is None:
            raise UsageError("A release with a stem or a lock needs the originals, to check that it fits.")
        before, after = _whole_pair(folder, clean, progress)
        if lock:
            patterns = Unlock.between(before, after).patterns
            tensors |= {f"lock/{key}": value for key, value in patterns.items()}
        if stem is not None:
            layer = vendor.stem(name, group=stem.group, tile=stem.tile, grey=stem.grey)
            _check_stem(layer, before, after, grey=stem.grey)
            tensors |= {f"stem/{key}": value for key, value in layer.state_dict().items()}
    if weights is not None:
        _, about = load_model(weights)
        if settings.setdefault("architecture", about.architecture) != about.architecture:
            raise UsageError(
                f"The recipe is for {settings['architecture']}, the initial weights are a {about.architecture}'s."
            )
        tensors |= {f"weights/{key}": value for key, value in read_tensors(weights)[0].items()}
    terms = Terms(release=name, licensee="vendor", recipe=settings, public_key=vendor.public.hex())
    master = Licence(terms=terms, salt=vendor.salt(name), tensors=tensors)
    files = describe_files(folder)
    _check_contents(folder, files, vendor, weights)
    manifest = Manifest(
        release=name,
        copy=None,
        created=now(),
        public_key=vendor.public.hex(),
        files=files,
        method=run.get("method"),
        budget=run.get("budget"),
        commitments=master.commitments,
        audit=None if audit is None else _digest(audit),
    )
    path = master_path(vendor, name)
    if path.exists():
        if read_licence(path, passphrase, public=vendor.public).commitments != master.commitments:
            raise OutputError(
                f"There was a release {name} with other keys or another recipe. Choose a new name."
            )
    else:
        write_licence(path, master, vendor, passphrase, work=work)
    _check_images(images_path(vendor, name), files, name)
    write_manifest(folder, manifest, vendor)
    return manifest


def check_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe that `Learner` takes.

    Raises:
        UsageError: it does not.
    """
    if "weights" in recipe:
        raise UsageError("A recipe names no weights file: initial weights are part of the licence.")
    try:
        Learner(**recipe)
    except TypeError as error:
        raise UsageError(f"A recipe holds settings of Learner; this one does not: {error}.") from error
    return dict(recipe)


def open_pair(protected: str | Path, clean: str | Path, progress: Progress) -> tuple[ImageSet, ImageSet]:
    """Open both sets at the files' own size, which must be one."""
    images = open_images(protected, progress=progress)
    if any(measure(file.read()) != images.size for file in images.files):
        raise InputError(
            "Stems and fingerprints need files of one size of at most 224 px, for they work on the files' own pixels. "
            "Resize the originals, then protect them."
        )
    return images, open_images(clean, size=images.size, progress=progress)


def master_path(vendor: Vendor, name: str) -> Path:
    return vendor.folder / f"{check_name(name)}.licence"


def images_path(vendor: Vendor, name: str) -> Path:
    """Return where it is kept which images a release's name was used for."""
    return vendor.folder / f"{check_name(name)}.images.json"


def open_master(vendor: Vendor, name: str, passphrase: str) -> Licence:
    path = master_path(vendor, name)
    if not path.exists():
        raise InputError(f"There is no release {name!r} in {vendor.folder}.")
    return read_licence(path, passphrase, public=vendor.public)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _check_places(folder: Path, vendor: Vendor, weights: Path | None) -> None:
    """Raise InputError if what must stay private lies in the folder that is released."""
    for path, what in ((vendor.folder, "the vendor's folder"), (weights, "the secret initial weights")):
        if path is not None and path.resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"{folder} is to be released, and {path}, {what}, lies in it. Move it to a private place before the "
                "release."
            )


def _check_contents(
    folder: Path, files: Mapping[str, FileRecord], vendor: Vendor, weights: Path | None
) -> None:
    """Raise InputError if a file that is released has the bytes of one that must stay private, under any name."""
    private = [path for path in vendor.folder.iterdir() if path.suffix in PRIVATE and path.is_file()]
    secrets = {_digest(path): path for path in (*private, *([] if weights is None else [weights]))}
    for name, record in files.items():
        if record.sha256 in secrets:
            raise InputError(
                f"{folder / name} has the bytes of {secrets[record.sha256]}, which must stay private. Take it out of "
                "the folder before the release."
            )


def _check_images(path: Path, files: Mapping[str, FileRecord], name: str) -> None:
    """Keep which images a name stands for, and raise OutputError if it stands for others already.

    Every further image under one key helps to find the key's pattern. What counts is paths and pixels, so that images
    that were written anew, or a text beside them, make no other release. A vendor's folder of an earlier version
    has no such record: its next release under the name makes it.
    """
    pixels = [[file, files[file].pixels] for file in sorted(files) if files[file].pixels is not None]
    record = {"images": sha256(canonical(pixels))}
    if not path.exists():
        write_bytes(path, json_line(record), private=True)
    elif read_json(path) != record:
        raise OutputError(
            f"There was a release {name} of other images, and every image more under its key helps to undo it. Choose "
            "a new name, and protect these images for it."
        )


def _planned(run: Mapping[str, Any]) -> StemPlan | None:
    """Return the stem that a run confined its noise to, or None."""
    if run.get("method") != KeyedEM.name:
        return None
    try:
        settings = run["settings"]
        return StemPlan(group=int(settings["group"]), tile=int(settings["tile"]), grey=bool(settings["grey"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{RUN} names the method {KeyedEM.name}, but not its stem. Protect the originals again."
        ) from error


def _whole_pair(folder: Path, clean: str | Path, progress: Progress) -> tuple[ImageSet, ImageSet]:
    """Return each protected image beside its original; all must have one."""
    images, originals = open_pair(folder, clean, progress)
    before, after = pair(originals, images)
    if len(after) != len(images):
        raise InputError(
            f"Of {len(images)} protected images only {len(after)} have an original of their name."
        )
    return before, after


def _check_stem(stem: KeyedStem, before: ImageSet, after: ImageSet, *, grey: bool) -> None:
    if bool(after.grey.any()) and not grey:
        raise UsageError("Some images are grey, and their channels must move together: give --stem-grey.")
    changed = stem.apply_to(before.pixels) != stem.apply_to(after.pixels)
    if differ := int(changed.flatten(1).any(1).sum()):
        raise LicenceError(
            f"Through the stem, {differ} of {len(after)} protected images differ from their originals: the "
            "perturbation is not what this stem takes away. Protect them with the stem of this release."
        )


def _digest(path: Path) -> str:
    try:
        return sha256(path.read_bytes())
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.") from error
