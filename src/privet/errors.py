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


# Exit codes that belong to no exception.
OK = 0
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
    INTERRUPTED: "Interrupted. The same command goes on where it stopped.",
}
