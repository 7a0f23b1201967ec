"""Issue licences for a release, and copies of it that can be traced to their licensees."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from pathlib import Path

from privet.errors import ExpiredError, OutputError, PrivetError, UsageError
from privet.learning import Publication
from privet.licensing.copies import CopyPlan, make_copy
from privet.licensing.keys import Vendor
from privet.licensing.ledger import enter
from privet.licensing.licence import Licence, read_licence, write_licence
from privet.licensing.release import open_master
from privet.licensing.sealed import WORK
from privet.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Issued:
    """What a licensee gets.

    Attributes:
        licence: as it was written.
        copy: their fingerprinted copy, or None.
    """

    licence: Licence
    copy: Publication | None


def issue(
    vendor: Vendor,
    name: str,
    vendor_passphrase: str,
    *,
    licensee: str,
    passphrase: str,
    out: Path,
    expires: str | None = None,
    copy: CopyPlan | None = None,
    today: datetime.date | None = None,
    work: int = WORK,
    progress: Progress = silent,
) -> Issued:
    """Enter a licence into the ledger, write the licensee's copy if they get one, and last their licence.

    Whatever can be refused is refused before anything is written. Called again with the same arguments, after a kill,
    it does what is left to do.

    Args:
        vendor: who issues.
        name: of the release.
        vendor_passphrase: what opens the release's own licence.
        licensee: who gets it.
        passphrase: what shall open it; the licensee gets it another way than the file.
        out: the file to write.
        expires: the last day, YYYY-MM-DD, or None. A date that is kept by those who keep it: no key can be called back.
        copy: what their own copy is made of and where it goes, or None if they use the public release.
        today: by default today, UTC.
        work: as for `seal`.
        progress: told about the files of the copy.

    Raises:
        InputError: there is no such release.
        UsageError: no licensee, or no date, or one that is over.
        OutputError: the file is there and is not this licence, or lies in a folder that is or will be published.
        PrivetError: as `read_licence` and `make_copy`.
    """
    if not licensee.strip():
        raise UsageError("Expected the name of the licensee, got an empty one.")
    master = open_master(vendor, name, vendor_passphrase)
    terms = replace(
        master.terms,
        licensee=licensee,
        expires=expires,
        copy=None if copy is None else vendor.copy_name(name, licensee),
    )
    try:
        terms.check_date(today)
    except ExpiredError as error:
        raise UsageError(f"Expected a last day that is not over, got {expires}.") from error
    licence = replace(master, terms=terms)
    written = out.exists()
    if written and not _holds(out, licence, vendor, passphrase):
        raise OutputError(
            f"{out} exists, and is no licence of these terms under this passphrase. Choose another file."
        )
    made = None
    if copy is not None:
        for folder in (copy.protected, copy.out):
            if out.resolve().is_relative_to(folder.resolve()):
                raise OutputError(f"{out} lies in {folder}, which others will get. Choose another file.")
        made = make_copy(copy, licence, vendor, progress=progress)
    enter(vendor, terms)
    if not written:
        write_licence(out, licence, vendor, passphrase, work=work)
    return Issued(licence=licence, copy=made)


def _holds(path: Path, licence: Licence, vendor: Vendor, passphrase: str) -> bool:
    """Say whether a file is this licence, which an earlier call wrote."""
    try:
        there = read_licence(path, passphrase, public=vendor.public)
    except PrivetError:
        return False
    return there.terms == licence.terms and there.commitments == licence.commitments
