"""Licensing: a release that is signed, licences for it, checks of both, and whose copy leaked."""

from privet.licensing.copies import CopyPlan, find_leak, make_copy
from privet.licensing.fingerprint import Suspect, mark, trace
from privet.licensing.issue import Issued, issue
from privet.licensing.keys import Vendor, read_public
from privet.licensing.licence import Licence, Terms, load_licence, read_licence, write_licence
from privet.licensing.manifest import Manifest, read_manifest, write_manifest
from privet.licensing.protect import protect
from privet.licensing.release import StemPlan, release
from privet.licensing.train import train
from privet.licensing.unlock import Unlock
from privet.licensing.verify import Verified, verify

__all__ = [
    "CopyPlan",
    "Issued",
    "Licence",
    "Manifest",
    "StemPlan",
    "Suspect",
    "Terms",
    "Unlock",
    "Vendor",
    "Verified",
    "find_leak",
    "issue",
    "load_licence",
    "make_copy",
    "mark",
    "protect",
    "read_licence",
    "read_manifest",
    "read_public",
    "release",
    "trace",
    "train",
    "verify",
    "write_licence",
    "write_manifest",
]
