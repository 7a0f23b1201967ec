"""The ledger (`ledger.jsonl`, in the vendor's folder): who got which licence and copy. It is private."""

from __future__ import annotations

from typing import Any

from privet.files import append_line, read_lines
from privet.licensing.keys import Vendor
from privet.licensing.licence import Terms
from privet.licensing.release import now

NAME = "ledger.jsonl"


def enter(vendor: Vendor, terms: Terms) -> None:
    """Enter a licence into the vendor's ledger, unless it is there.

    Raises:
        OutputError: the ledger cannot be written.
    """
    entry = {
        "release": terms.release,
        "licensee": terms.licensee,
        "copy": terms.copy,
        "expires": terms.expires,
    }
    # Reading also cuts off a line that a full disk tore, which else would swallow this one.
    if any(entry.items() <= earlier.items() for earlier in read_ledger(vendor)):
        return
    ledger = vendor.folder / NAME
    ledger.touch(mode=0o600)
    append_line(ledger, {**entry, "issued": now()})


def read_ledger(vendor: Vendor) -> list[dict[str, Any]]:
    """Return what was entered, the earliest first."""
    return read_lines(vendor.folder / NAME)
