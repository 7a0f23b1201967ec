"""Protections that follow from a vendor's key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from privet.errors import InputError, UsageError
from privet.images.image_set import ImageSet
from privet.images.picture import measure
from privet.models.keyed_stem import key_stream
from privet.protection.base import Protection


@dataclass(frozen=True, kw_only=True)
class Keyed(Protection):
    """A protection with a secret, which is never recorded, but for a commitment.

    Attributes:
        key: at least 16 secret bytes.
    """

    key: bytes = field(default=b"", repr=False)

    def settings(self) -> dict[str, Any]:
        """Return every setting by name; in place of the key, what tells it from others and says nothing of it."""
        known = {name: value for name, value in super().settings().items() if name != "key"}
        return {**known, "key_commitment": self._secret("commitment", 32).hex()}

    def check_key(self) -> None:
        """Raise UsageError if there is no key, or a short one."""
        self._secret("commitment", 0)

    def _secret(self, purpose: str, length: int) -> bytes:
        """Return bytes that follow from the key.

        Raises:
            UsageError: no key, or a short one.
        """
        if not self.key:
            raise UsageError(f"{self.name} needs a vendor's key: protect with 'privet license protect'.")
        return key_stream(self.key, purpose, length)


def refuse_other_sizes(images: ImageSet) -> None:
    """Raise InputError unless networks see the files' own pixels, on which a licence works."""
    if any(measure(file.read()) != images.size for file in images.files):
        raise InputError(
            "A licence works on the files' own pixels, so they must have one size of at most 224 px. Resize the "
            "originals, then protect them."
        )
