"""The errors that privet raises on purpose, and the exit code that the command line gives each.

A message says what was expected, what came, and what to do. Anything else that escapes is a defect.
"""

from __future__ import annotations


class PrivetError(Exception):
    """Base of every error that is the caller's to mend; its message is meant to be read."""

    exit_code = 1


class UsageError(PrivetError):
    """A setting that cannot work: an unknown name, a value out of range, two that contradict."""

    exit_code = 2


class InputError(PrivetError):
    """Data that cannot be used at all: nothing to read, no labels, a file of the wrong kind."""

    exit_code = 3


class BudgetError(PrivetError):
    """A perturbation that left its budget: the method is broken, and nothing of it was published."""

    exit_code = 5


class MissingExtraError(PrivetError):
    """A feature whose optional package is not installed."""

    exit_code = 6

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs an optional package. Install it with: pip install 'privet[{extra}]'"
        )


class OutputError(PrivetError):
    """A place that cannot be written: another run's folder, no permission, no space."""

    exit_code = 7


class CodecError(PrivetError):
    """Bytes that are no message of this schema: damaged, truncated, hostile, or made for another model."""

    exit_code = 8


class LicenceError(PrivetError):
    """A release or a licence that does not hold; each kind of failure is a subclass with its own code."""

    exit_code = 20


class ManifestError(LicenceError):
    """A manifest that is damaged, or that the expected vendor did not sign."""

    exit_code = 21


class VersionError(LicenceError):
    """A manifest, bundle or key file of a format that this version of privet does not know."""

    exit_code = 22


class FileListError(LicenceError):
    """A release that lacks a file, or has one too many."""

    exit_code = 23


class ChangedFileError(LicenceError):
    """A file of a release whose bytes are not those that were signed, and that is no whole image."""

    exit_code = 24


class ReencodedError(LicenceError):
    """An image of a release that was written anew: a whole image, but not the one that was signed."""

    exit_code = 25


class BundleError(LicenceError):
    """A sealed file that is truncated, damaged, or not sealed by privet."""

    exit_code = 26


class PassphraseError(LicenceError):
    """A passphrase that does not open a sealed file."""

    exit_code = 27


class OtherReleaseError(LicenceError):
    """A licence for another release than the one at hand."""

    exit_code = 28


class WrongLicenceError(LicenceError):
    """A licence that is not the vendor's, or does not hold what the release's manifest commits to."""

    exit_code = 29


class ExpiredError(LicenceError):
    """A licence whose last day is over."""

    exit_code = 30


# Exit codes that belong to no exception.
OK = 0
OVER_LIMIT = 9  # finished, and what was measured exceeds the limit that was asked for
CONTROL_FAILED = 10  # finished within the limit, but the attacks fail without a defence too
PARTIAL = 4  # finished, but some inputs were skipped; the manifest says which and why
INTERRUPTED = 130  # Ctrl-C; the run resumes when it is started again

EXIT_CODES = {
    OK: "Everything was done.",
    PrivetError.exit_code: "privet failed in a way that it did not foresee; please report it.",
    UsageError.exit_code: "A setting cannot work; the message names it. Nothing was written.",
    InputError.exit_code: "The input cannot be used; the message says why. Nothing was written.",
    PARTIAL: "Finished, but some images were skipped; manifest.jsonl gives each one's reason.",
    BudgetError.exit_code: "A perturbation left its budget and was not published; please report it.",
    MissingExtraError.exit_code: "An optional package is missing; the message says how to install it.",
    OutputError.exit_code: "The output cannot be written; the message says why.",
    CodecError.exit_code: "A federated message is damaged, or was made for another model.",
    OVER_LIMIT: "Finished, and what was measured exceeds the limit that was asked for (--fail-above).",
    CONTROL_FAILED: "Finished, but the attacks recovered nothing without a defence either, so the limit says nothing.",
    LicenceError.exit_code: "A release or a licence does not hold; the message says why.",
    ManifestError.exit_code: "A manifest is damaged, or not signed by the expected vendor.",
    VersionError.exit_code: "A manifest, licence or key file has a format that this version does not know.",
    FileListError.exit_code: "A release lacks a file, or has one too many.",
    ChangedFileError.exit_code: "A file of a release is damaged.",
    ReencodedError.exit_code: "An image of a release was written anew.",
    BundleError.exit_code: "A licence or key file is truncated, damaged, or not one.",
    PassphraseError.exit_code: "The passphrase does not open the file.",
    OtherReleaseError.exit_code: "The licence is for another release.",
    WrongLicenceError.exit_code: "The licence is not the vendor's, or not what the manifest commits to.",
    ExpiredError.exit_code: "The licence has expired.",
    INTERRUPTED: "Interrupted. The same command goes on where it stopped.",
}
