"""The vendor's work: make a release of protected files, and issue licences for it.

The vendor's folder gets, beside the keys, one licence for each release, sealed with the vendor's own
passphrase, from which licensees' are made (`NAME.licence`), and a ledger of them (`ledger.jsonl`). Both are private.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from privet.errors import InputError, LicenceError, OutputError, UsageError
from privet.files import RUN, append_line, read_json, read_lines, sha256, write_bytes
from privet.images import ImageSet, open_images, pair
from privet.images.budget import Budget
from privet.images.picture import measure
from privet.learning import Job, Learner, Publication, Runtime, publish_changed
from privet.licensing.fingerprint import FALSE_ACCUSATIONS, Suspect, mark, trace
from privet.licensing.keys import Vendor
from privet.licensing.licence import Licence, Terms, read_licence, write_licence
from privet.licensing.manifest import Manifest, check_name, describe_files, read_manifest, write_manifest
from privet.licensing.sealed import WORK
from privet.licensing.unlock import Unlock
from privet.models import load_model
from privet.models.keyed_stem import CHUNK, KeyedStem
from privet.models.weights import read_tensors
from privet.progress import Progress, silent
from privet.protection import METHODS, KeyedEM, Lock, publish
from privet.protection.keyed import Keyed
from privet.protection.surrogate import FILE as SURROGATE

LEDGER = "ledger.jsonl"


@dataclass(frozen=True, kw_only=True)
class StemPlan:
    """The stem that a release shall have; as for `KeyedStem.from_key`."""

    group: int = 4
    tile: int = 8
    grey: bool = False


def protect(
    images: ImageSet,
    vendor: Vendor,
    name: str,
    out: Path,
    *,
    method: str = KeyedEM.name,
    preset: str,
    settings: Mapping[str, Any] | None = None,
    runtime: Runtime,
    seed: int = 0,
    **writing: Any,
) -> Publication:
    """Protect images with noise that follows from the key of a release, and write them for that release.

    The surrogate, which knows the noise, goes to the vendor's folder (`NAME.surrogate.safetensors`).

    Args:
        images: the originals, as opened.
        vendor: whose key the noise follows from.
        name: of the release that this will be.
        out: a new folder; a killed call goes on there.
        method: the name of a protection with a key.
        preset: of the method.
        settings: of the method that differ from the preset's.
        runtime: where.
        seed: the same seed gives the same bytes.
        **writing: as for `publish`.

    Raises:
        UsageError: no such method.
        PrivetError: as the method and `publish`.
    """
    chosen = keyed_method(method).preset(
        preset, **{**(settings or {}), "key": vendor.stem_key(check_name(name))}
    )
    publication = publish(images, chosen, out, runtime=runtime, seed=seed, **writing)
    if runtime.rank == 0 and (surrogate := out / SURROGATE).exists():
        write_bytes(vendor.folder / f"{name}.surrogate.safetensors", surrogate.read_bytes(), private=True)
        surrogate.unlink()
    return publication


def keyed_method(name: str) -> type[Keyed]:
    """Return a protection that a licence belongs to.

    Raises:
        UsageError: there is no such protection.
    """
    methods = {method.name: method for method in METHODS.values() if issubclass(method, Keyed)}
    if name not in methods:
        raise UsageError(f"Unknown method {name!r} for a release; expected one of {', '.join(methods)}.")
    return methods[name]


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
        name: of the release, never used before; the stem follows from it.
        passphrase: of the vendor, for the file that the licences are made from.
        stem: the stem that the perturbation was confined to; None for what `protect` wrote into run.json,
            if it made these files, and else for no stem.
        lock: each class was changed by one pattern, which licences shall hold; known of what `protect` locked.
        clean: the originals; needed with a stem, to check that through it both look the same, and with a
            lock, to find its patterns.
        weights: the secret initial weights, as a file that privet saved, or None.
        recipe: settings of `Learner` by name.
        audit: the report.json of the audit of these files, or None.
        work: as for `seal`.
        progress: told about images.

    Raises:
        UsageError: no stem, lock or weights, so that nothing would authorise; or a recipe that cannot work.
        LicenceError: the perturbation is not what the stem takes away, or no lock.
        InputError, OutputError: as usual.
    """
    check_name(name)
    settings = check_recipe(recipe or {})
    run = read_json(folder / RUN) if (folder / RUN).exists() else {}
    stem, lock = stem or _planned(run), lock or run.get("method") == Lock.name
    if stem is None and weights is None and not lock:
        raise UsageError(
            "Expected a stem, a lock or initial weights: without any, everybody is authorised alike."
        )
    if (stem is not None or lock) and clean is None:
        raise UsageError("A release with a stem or a lock needs the originals, to check that it fits.")
    tensors: dict[str, Tensor] = {}
    if lock and clean is not None:
        images, originals = _open_pair(folder, clean, progress)
        _, images = _whole_pair(originals, images)
        patterns = Unlock.between(originals, images).patterns
        tensors |= {f"lock/{key}": value for key, value in patterns.items()}
    if stem is not None and clean is not None:
        layer = vendor.stem(name, group=stem.group, tile=stem.tile, grey=stem.grey)
        _check_stem(layer, folder, clean, grey=stem.grey, progress=progress)
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
    manifest = Manifest(
        release=name,
        copy=None,
        created=_now(),
        public_key=vendor.public.hex(),
        files=describe_files(folder),
        method=run.get("method"),
        budget=run.get("budget"),
        commitments=master.commitments,
        audit=None if audit is None else _digest(audit),
    )
    path = _master(vendor, name)
    if path.exists():
        if read_licence(path, passphrase, public=vendor.public).commitments != master.commitments:
            raise OutputError(
                f"There was a release {name} with other keys or another recipe. Choose a new name."
            )
    else:
        write_licence(path, master, vendor, passphrase, work=work)
    write_manifest(folder, manifest, vendor)
    return manifest


def issue(
    vendor: Vendor,
    name: str,
    vendor_passphrase: str,
    *,
    licensee: str,
    passphrase: str,
    out: Path,
    expires: str | None = None,
    copied: bool = False,
    work: int = WORK,
) -> Licence:
    """Write a licensee's licence, and enter it into the ledger.

    Args:
        vendor: who issues.
        name: of the release.
        vendor_passphrase: what opens the release's own licence.
        licensee: who gets it.
        passphrase: what shall open it; the licensee gets it another way than the file.
        out: the file to write.
        expires: the last day, YYYY-MM-DD, or None. A date that is kept by those who keep it: no key can be called back.
        copied: whether the licensee gets a copy of their own (`make_copy`).
        work: as for `seal`.

    Raises:
        LicenceError: there is no such release, or as `read_licence`.
        UsageError: no licensee, or no date.
        OutputError: the file exists.
    """
    if not licensee.strip():
        raise UsageError("Expected the name of the licensee, got an empty one.")
    if out.exists():
        raise OutputError(f"{out} exists. Choose another file.")
    master = _open_master(vendor, name, vendor_passphrase)
    copy = vendor.copy_name(name, licensee) if copied else None
    licence = replace(master, terms=replace(master.terms, licensee=licensee, expires=expires, copy=copy))
    entry = {"release": name, "licensee": licensee, "copy": copy, "expires": expires, "issued": _now()}
    ledger = vendor.folder / LEDGER
    ledger.touch(mode=0o600)
    append_line(ledger, entry)  # first: a copy that nobody could trace must not leave the house
    write_licence(out, licence, vendor, passphrase, work=work)
    return licence


def make_copy(
    protected: Path,
    clean: str | Path,
    licence: Licence,
    vendor: Vendor,
    out: Path,
    *,
    runtime: Runtime,
    workers: int = 4,
    progress: Progress = silent,
) -> Publication:
    """Write a licensee's fingerprinted copy of a release, with a manifest of its own.

    Args:
        protected: the release's folder, with its manifest.
        clean: the originals.
        licence: issued with `copied`.
        vendor: who signs.
        out: a new folder; a killed call goes on there.
        runtime: where.
        workers: files encoded at a time.
        progress: told about images.

    Raises:
        UsageError: the licence has no copy, or the release no L-infinity budget to stay in.
        PrivetError: as `read_manifest`, `open_images` and `publish_changed`.
    """
    copy = licence.terms.copy
    manifest = read_manifest(protected, public=vendor.public)
    budget = manifest.budget or {}
    if copy is None or budget.get("norm") != "linf":
        raise UsageError(
            "A copy needs a licence that was issued with one, and a release with an L-infinity budget."
        )
    images, originals = _open_pair(protected, clean, progress)
    key = vendor.fingerprint(manifest.release, copy)
    epsilon = int(budget["amount"])
    # Read anew under the same names: a chip changes a value by 1 at most.
    written = publish_changed(
        images,
        lambda: _in_order(mark(images, originals, key, epsilon=epsilon, stem=licence.stem), images),
        out,
        job=Job(runtime=runtime, seed=0, progress=progress),
        record={
            "method": manifest.method,
            "budget": dict(budget),
            "release": manifest.release,
            "copy": copy,
        },
        budget=Budget(norm="linf", amount=1),
        workers=workers,
    )
    write_manifest(
        out,
        replace(manifest, copy=copy, created=_now(), files=describe_files(out, workers=workers)),
        vendor,
    )
    return written


def find_leak(
    leaked: str | Path,
    protected: str | Path,
    vendor: Vendor,
    name: str,
    passphrase: str,
    *,
    false_accusations: float = FALSE_ACCUSATIONS,
    progress: Progress = silent,
) -> list[tuple[str, Suspect]]:
    """Say from which licensee's copy leaked images come: each licensee and what `trace` says, surest first.

    Args:
        leaked: images that were found.
        protected: the release before any copy was marked.
        vendor: whose ledger names the licensees.
        name: of the release.
        passphrase: the vendor's.
        false_accusations: the probability of accusing anybody innocent that is accepted.
        progress: told about images.

    Raises:
        LicenceError: nobody got a copy of this release.
    """
    copies = {
        str(entry["copy"]): str(entry["licensee"])
        for entry in read_lines(vendor.folder / LEDGER)
        if entry["release"] == name and entry["copy"]
    }
    if not copies:
        raise LicenceError(
            f"The ledger knows no copy of the release {name!r}; copies are issued with --copy."
        )
    stem = _open_master(vendor, name, passphrase).stem
    base = open_images(protected, progress=progress)
    found = open_images(leaked, size=base.size, progress=progress)
    keys = {copy: vendor.fingerprint(name, copy) for copy in copies}
    suspects = trace(found, base, keys, stem=stem, false_accusations=false_accusations, progress=progress)
    return [(copies[suspect.copy], suspect) for suspect in suspects]


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


def _check_stem(stem: KeyedStem, folder: Path, clean: str | Path, *, grey: bool, progress: Progress) -> None:
    images, originals = _open_pair(folder, clean, progress)
    if bool(images.grey.any()) and not grey:
        raise UsageError("Some images are grey, and their channels must move together: give --stem-grey.")
    before, after = _whole_pair(originals, images)
    differ = sum(
        int(
            (stem(before.pixels[start : start + CHUNK]) != stem(after.pixels[start : start + CHUNK]))
            .flatten(1)
            .any(1)
            .sum()
        )
        for start in range(0, len(after), CHUNK)
    )
    if differ:
        raise LicenceError(
            f"Through the stem, {differ} of {len(after)} protected images differ from their originals: the "
            "perturbation is not what this stem takes away. Protect them with the stem of this release."
        )


def _open_pair(protected: str | Path, clean: str | Path, progress: Progress) -> tuple[ImageSet, ImageSet]:
    """Open both sets at the files' own size, which must be one."""
    images = open_images(protected, progress=progress)
    if any(measure(file.read()) != images.size for file in images.files):
        raise InputError(
            "Stems and fingerprints need files of one size of at most 224 px, for they work on the files' own pixels. "
            "Resize the originals, then protect them."
        )
    return images, open_images(clean, size=images.size, progress=progress)


def _whole_pair(originals: ImageSet, images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return each protected image beside its original; all must have one."""
    before, after = pair(originals, images)
    if len(after) != len(images):
        raise InputError(
            f"Of {len(images)} protected images only {len(after)} have an original of their name."
        )
    return before, after


def _in_order(marked: ImageSet, images: ImageSet) -> ImageSet:
    place = {name: index for index, name in enumerate(marked.names)}
    return images.with_pixels(marked.subset([place[name] for name in images.names]).pixels)


def _master(vendor: Vendor, name: str) -> Path:
    return vendor.folder / f"{check_name(name)}.licence"


def _open_master(vendor: Vendor, name: str, passphrase: str) -> Licence:
    path = _master(vendor, name)
    if not path.exists():
        raise LicenceError(f"There is no release {name!r} in {vendor.folder}.")
    return read_licence(path, passphrase, public=vendor.public)


def _digest(path: Path) -> str:
    try:
        return sha256(path.read_bytes())
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.") from error


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
