"""A licence: what an authorised party needs so that a release stays learnable, sealed with a passphrase.

Inside the seal lies one safetensors file (nothing is unpickled): the stem's pattern, the lock's patterns, initial
weights, and, as its only metadata, the terms, which the vendor signed together with digests of the tensors.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from privet.errors import (
    BundleError,
    ExpiredError,
    InputError,
    ManifestError,
    UsageError,
    VersionError,
    WrongLicenceError,
)
from privet.images import ImageSet
from privet.learning import Learner
from privet.licensing.keys import Vendor, check_signature
from privet.licensing.manifest import canonical, commit
from privet.licensing.sealed import WORK, read_sealed, write_sealed
from privet.licensing.unlock import Unlock
from privet.models.keyed_stem import KeyedStem
from privet.models.weights import load_tensors

FORMAT = "privet-licence-1"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a licence says in words.

    Attributes:
        release: the release it is for.
        licensee: who may use it.
        copy: the name of their fingerprinted copy, or None if they use the public one.
        expires: the last day, UTC, ISO 8601; None if there is no last day.
        recipe: settings of `Learner` for training, by name.
        public_key: the vendor's, in hexadecimal.
    """

    release: str
    licensee: str
    copy: str | None = None
    expires: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    public_key: str

    def __post_init__(self) -> None:
        words = (self.release, self.licensee, self.public_key, self.copy or "")
        if not all(isinstance(one, str) for one in words) or not isinstance(self.recipe, Mapping):
            raise UsageError("Expected a licence's terms as text, and its recipe as settings by name.")
        if self.expires is not None:
            last_day(self.expires)

    def check_date(self, today: datetime.date | None = None) -> None:
        """Raise ExpiredError if the last day is over, by UTC."""
        today = today or datetime.datetime.now(datetime.UTC).date()
        if self.expires is not None and today > last_day(self.expires):
            raise ExpiredError(
                f"The licence of {self.licensee} for {self.release} expired after {self.expires}. Ask the vendor for "
                "a new one."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Licence:
    """An opened licence; `repr` shows the terms alone.

    Attributes:
        terms: what it says in words.
        salt: 32 bytes that open the manifest's commitments.
        tensors: "stem/group" and "stem/sign", "lock/CLASS", "weights/NAME", as far as there are any.
    """

    terms: Terms
    salt: bytes = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)

    @cached_property
    def stem(self) -> KeyedStem | None:
        """The transform for stored images, before any augmentation, in training and in use; or None."""
        pattern = self._part("stem")
        return KeyedStem(pattern["group"], pattern["sign"]) if pattern else None

    @cached_property
    def lock(self) -> Unlock | None:
        """What opens locked training images, by their classes; or None."""
        patterns = self._part("lock")
        return Unlock(patterns=patterns) if patterns else None

    def unlock(self, images: ImageSet) -> ImageSet:
        """Return a release's training images as the licensee's network gets them, before any augmentation."""
        images = self.lock.apply_to(images) if self.lock else images
        return self.present(images)

    def present(self, images: ImageSet) -> ImageSet:
        """Return images in use, the test images among them, as the licensee's network gets them."""
        return images.with_pixels(self.stem.apply_to(images.pixels)) if self.stem else images

    def learner(self) -> Learner:
        """Return how the recipe says to train, but for the initial weights.

        Raises:
            WrongLicenceError: in a way that this privet does not know.
        """
        try:
            return Learner(**self.terms.recipe)
        except TypeError as error:
            raise WrongLicenceError(
                f"The licence's recipe is not one that this privet knows: {error}."
            ) from error

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The initial weights by name; empty if the licence has none."""
        return self._part("weights")

    @cached_property
    def commitments(self) -> dict[str, str]:
        """What a manifest must commit to, for this licence to belong to it."""
        parts = {name: self._part(name) for name in ("stem", "lock", "weights")}
        held = {name: commit(self.salt, tensors) for name, tensors in parts.items() if tensors}
        return {**held, "recipe": commit(self.salt, self.terms.recipe)}

    def _part(self, name: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(f"{name}/"): value
            for key, value in self.tensors.items()
            if key.startswith(f"{name}/")
        }


def last_day(text: str) -> datetime.date:
    """Return a date.

    Raises:
        UsageError: it is none.
    """
    try:
        return datetime.date.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise UsageError(f"Expected a date as YYYY-MM-DD, got {text!r}.") from error


def write_licence(path: Path, licence: Licence, vendor: Vendor, passphrase: str, *, work: int = WORK) -> None:
    """Sign a licence, seal it, and write it with mode 0600.

    Args:
        path: of the file.
        licence: its terms must name this vendor.
        vendor: who signs.
        passphrase: what opens the file; the licensee gets it another way than the file.
        work: as for `seal`.
    """
    statement = _statement(asdict(licence.terms), licence.salt, licence.tensors)
    metadata = {
        "terms": asdict(licence.terms),
        "salt": licence.salt.hex(),
        "signature": vendor.sign(statement).hex(),
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in licence.tensors.items()}
    content = safetensors.torch.save(tensors, {FORMAT: json.dumps(metadata)})
    write_sealed(path, content, passphrase, work=work)


def read_licence(path: Path, passphrase: str, *, public: bytes | None = None) -> Licence:
    """Open a licence and check its vendor's signature; whether it has expired is not asked here.

    Args:
        path: of the file.
        passphrase: what opens it.
        public: the vendor's key, if known from elsewhere; else the licence's own is believed, which whoever
            knew the passphrase put there.

    Raises:
        InputError, BundleError, VersionError, PassphraseError: as `read_sealed`.
        WrongLicenceError: another vendor's, or not as it was signed.
    """
    content = read_sealed(path, passphrase)
    try:
        tensors, metadata = _parse(content)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{path} opens, but holds no licence.") from error
    if FORMAT not in metadata:
        raise VersionError(f"{path} holds no licence of the format that this privet knows ({FORMAT}).")
    try:
        about = json.loads(metadata[FORMAT])
        terms, salt = Terms(**about["terms"]), bytes.fromhex(about["salt"])
        signature, own = bytes.fromhex(about["signature"]), bytes.fromhex(terms.public_key)
        statement = _statement(about["terms"], salt, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, UsageError) as error:
        raise BundleError(f"{path} opens, but its terms are malformed.") from error
    if public is not None and own != public:
        raise WrongLicenceError(f"{path} is another vendor's licence.")
    try:
        check_signature(own, signature, statement, name=str(path))
    except ManifestError as error:
        raise WrongLicenceError(f"{path} is not as its vendor signed it.") from error
    licence = Licence(terms=terms, salt=salt, tensors=tensors)
    try:
        licence.stem, licence.lock  # noqa: B018 - a pattern that is none is found now
    except (KeyError, InputError) as error:
        raise BundleError(f"{path} opens, but its stem or its lock is malformed.") from error
    return licence


def load_licence(
    model: nn.Module, path: Path, passphrase: str, *, today: datetime.date | None = None
) -> Licence:
    """Open a licence for a training loop of one's own: put its initial weights into `model`.

    The licence's `stem`, if it has one, must be applied to every stored image before any augmentation, in
    training and in use; its `lock`, if it has one, to stored training images only.

    Args:
        model: the network of the recipe; its weights are replaced if the licence has initial weights.
        path: of the licence.
        passphrase: what opens it.
        today: by default today.

    Raises:
        LicenceError: as `read_licence`, and an expired licence.
        InputError: the weights do not fit the model.
    """
    licence = read_licence(path, passphrase)
    licence.terms.check_date(today)
    if licence.weights and (missing := load_tensors(model, licence.weights, path)):
        raise InputError(
            f"The licence's initial weights do not fit this network: {len(missing)} tensors are absent or of another "
            f"shape, {missing[0]} for one. Build the network of its recipe: {dict(licence.terms.recipe)}."
        )
    return licence


def _parse(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = safetensors.torch.load(content)
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return {name: value for name, value in tensors.items() if torch.is_tensor(value)}, dict(metadata)


def _statement(terms: Mapping[str, Any], salt: bytes, tensors: Mapping[str, Tensor]) -> bytes:
    """Return the bytes that the vendor signs."""
    return canonical({"format": FORMAT, "terms": terms, "tensors": commit(salt, tensors)})
