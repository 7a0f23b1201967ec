"""Fingerprinted copies of a release, one for each licensee, and from whose copy leaked images come."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from privet.errors import InputError, OtherReleaseError, OutputError, UsageError, WrongLicenceError
from privet.images import ImageSet, open_images
from privet.images.budget import Budget
from privet.learning import Job, Publication, Runtime, publish_changed
from privet.licensing.fingerprint import FALSE_ACCUSATIONS, Suspect, mark, trace
from privet.licensing.keys import Vendor
from privet.licensing.ledger import enter, read_ledger
from privet.licensing.licence import Licence
from privet.licensing.manifest import describe_files, read_manifest, write_manifest
from privet.licensing.release import now, open_master, open_pair
from privet.licensing.verify import check_base, refuse_copy
from privet.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class CopyPlan:
    """What a licensee's copy is made of, and where it goes.

    Attributes:
        out: a new folder; a killed call goes on there.
        protected: the release's folder, with its manifest; it is verified, for the copy is signed anew.
        clean: the originals.
        runtime: where.
        workers: files encoded at a time.
    """

    out: Path
    protected: Path
    clean: str | Path
    runtime: Runtime
    workers: int = 4


def make_copy(
    plan: CopyPlan, licence: Licence, vendor: Vendor, *, progress: Progress = silent
) -> Publication:
    """Write a licensee's fingerprinted copy of a release, with a manifest of its own.

    Before the first file is written, the vendor's ledger has the licensee: a copy that nobody could trace must not
    leave the house.

    Args:
        plan: what it is made of, and where it goes.
        licence: for this release, with the name of a copy.
        vendor: who signs.
        progress: told about images.

    Raises:
        UsageError: the licence has no copy, the folder is a copy itself, or the release has no L-infinity budget.
        WrongLicenceError: the licence is another vendor's.
        OutputError: the copy would lie in the release or in the originals, or its folder holds something else.
        PrivetError: as `verify`, `open_images` and `publish_changed`.
    """
    copy, protected, out = licence.terms.copy, plan.protected, plan.out
    if copy is None:
        raise UsageError("A copy needs a licence that was issued with one.")
    if licence.terms.public_key != vendor.public.hex():
        raise WrongLicenceError("The licence is another vendor's than the one who makes the copy.")
    for folder in (protected, Path(plan.clean)):
        if folder.exists() and out.resolve().is_relative_to(folder.resolve()):
            raise OutputError(
                f"{out} lies in {folder}, whose files it would be among. Choose another folder."
            )
    manifest = check_base(protected, licence, workers=plan.workers, progress=progress)
    budget = manifest.budget or {}
    images, originals = open_pair(protected, plan.clean, progress)
    key = vendor.fingerprint(manifest.release, copy)

    def marked() -> ImageSet:
        epsilon = int(budget["amount"])
        changed = _in_order(mark(images, originals, key, epsilon=epsilon, stem=licence.stem), images)
        enter(vendor, licence.terms)  # nothing can refuse it any more, and no file is written yet
        return changed

    # Read anew under the same names: a chip changes a value by 1 at most.
    written = publish_changed(
        images,
        marked,
        out,
        job=Job(runtime=plan.runtime, seed=0, progress=progress),
        record={
            "method": manifest.method,
            "budget": dict(budget),
            "release": manifest.release,
            "copy": copy,
        },
        budget=Budget(norm="linf", amount=1),
        workers=plan.workers,
    )
    write_manifest(
        out,
        replace(manifest, copy=copy, created=now(), files=describe_files(out, workers=plan.workers)),
        vendor,
    )
    return written


def find_leak(
    leaked: str | Path,
    protected: Path,
    vendor: Vendor,
    name: str,
    passphrase: str,
    *,
    false_accusations: float = FALSE_ACCUSATIONS,
    progress: Progress = silent,
) -> list[tuple[str, Suspect]]:
    """Say from which licensee's copy leaked images come: each licensee and what `trace` says, surest first.

    Args:
        leaked: images that were found: a folder of them, however they lie there, or one file.
        protected: the release's folder, with its manifest, before any copy was marked.
        vendor: whose ledger names the licensees.
        name: of the release.
        passphrase: the vendor's.
        false_accusations: the probability of accusing anybody innocent that is accepted.
        progress: told about images.

    Raises:
        InputError: nobody got a copy of this release.
        OtherReleaseError: the folder is of another release.
        UsageError: the folder is a licensee's copy.
        PrivetError: as `read_manifest`, `open_images` and `trace`.
    """
    copies = {
        str(entry["copy"]): str(entry["licensee"])
        for entry in read_ledger(vendor)
        if entry["release"] == name and entry["copy"]
    }
    if not copies:
        raise InputError(f"The ledger knows no copy of the release {name!r}; copies are issued with --copy.")
    manifest = read_manifest(protected, public=vendor.public)
    if manifest.release != name:
        raise OtherReleaseError(f"{protected} is the release {manifest.release!r}; asked was about {name!r}.")
    refuse_copy(protected, manifest)
    stem = open_master(vendor, name, passphrase).stem
    base = open_images(protected, progress=progress)
    found = open_images(leaked, labelled=False, size=base.size, progress=progress)
    keys = {copy: vendor.fingerprint(name, copy) for copy in copies}
    suspects = trace(found, base, keys, stem=stem, false_accusations=false_accusations, progress=progress)
    return [(copies[suspect.copy], suspect) for suspect in suspects]


def _in_order(marked: ImageSet, images: ImageSet) -> ImageSet:
    place = {name: index for index, name in enumerate(marked.names)}
    return images.with_pixels(marked.subset([place[name] for name in images.names]).pixels)
