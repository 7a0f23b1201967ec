"""Issue licences for a release, and keep a ledger of them.

The ledger (`ledger.jsonl`, in the vendor's folder) says who got which licence and copy. It is private.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from privet.errors import OutputError, UsageError
from privet.files import append_line
from privet.licensing.keys import Vendor
from privet.licensing.licence import Licence, write_licence
from privet.licensing.release import now, open_master
from privet.licensing.sealed import WORK
from privet.licensing.verify import check_base
from privet.progress import Progress, silent

LEDGER = "ledger.jsonl"


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
    base: Path | None = None,
    work: int = WORK,
    progress: Progress = silent,
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
        base: the release's folder, which their copy will be made of: checked before anything is written. None leaves
            that to `make_copy`, when the licence is out.
        work: as for `seal`.
        progress: told about the files of `base`.

    Raises:
        LicenceError: there is no such release, or as `read_licence`; the folder as `check_base`.
        UsageError: no licensee, or no date; the folder as `check_base`.
        OutputError: the file exists.
    """
    if not licensee.strip():
        raise UsageError("Expected the name of the licensee, got an empty one.")
    if out.exists():
        raise OutputError(f"{out} exists. Choose another file.")
    master = open_master(vendor, name, vendor_passphrase)
    copy = vendor.copy_name(name, licensee) if copied else None
    licence = replace(master, terms=replace(master.terms, licensee=licensee, expires=expires, copy=copy))
    if base is not None:
        check_base(base, licence, progress=progress)
    entry = {"release": name, "licensee": licensee, "copy": copy, "expires": expires, "issued": now()}
    ledger = vendor.folder / LEDGER
    ledger.touch(mode=0o600)
    append_line(ledger, entry)  # first: a copy that nobody could trace must not leave the house
    write_licence(out, licence, vendor, passphrase, work=work)
    return licence
