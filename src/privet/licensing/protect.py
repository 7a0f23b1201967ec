"""Protect images with noise that follows from the key of a release."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privet.errors import UsageError
from privet.files import write_bytes
from privet.images import ImageSet
from privet.learning import Publication, Runtime
from privet.licensing.keys import Vendor
from privet.licensing.manifest import check_name
from privet.models import SavedModel, save_model
from privet.protection import METHODS, UGE, KeyedEM, publish
from privet.protection.keyed import Keyed
from privet.protection.surrogate import FILE as SURROGATE


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

    The surrogate, which knows the noise, goes to the vendor's folder (`NAME.surrogate.safetensors`), and so do the
    initial weights of authorised networks (`NAME.weights.safetensors`, further ones `NAME.weights-2.safetensors`, ...).

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
    if runtime.rank == 0 and isinstance(chosen, UGE):
        for number, (network, architecture) in enumerate(
            zip(chosen.networks(images), chosen.authorised, strict=True), start=1
        ):
            about = SavedModel(architecture=architecture, class_names=images.class_names, size=images.size)
            save_model(weights_path(vendor, name, number), network, about, private=True)
    return publication


def weights_path(vendor: Vendor, name: str, number: int = 1) -> Path:
    """Return where the initial weights of a release's authorised network lie."""
    return vendor.folder / f"{name}.weights{'' if number == 1 else f'-{number}'}.safetensors"


def keyed_method(name: str) -> type[Keyed]:
    """Return a protection that a licence belongs to.

    Raises:
        UsageError: there is no such protection.
    """
    methods = {method.name: method for method in METHODS.values() if issubclass(method, Keyed)}
    if name not in methods:
        raise UsageError(f"Unknown method {name!r} for a release; expected one of {', '.join(methods)}.")
    return methods[name]
