"""A release, its manifest and its licences: what holds, and one typed error for each thing that does not."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from privet.errors import (
    EXIT_CODES,
    BundleError,
    ChangedFileError,
    ExpiredError,
    FileListError,
    InputError,
    LicenceError,
    ManifestError,
    OtherReleaseError,
    OutputError,
    PassphraseError,
    PrivetError,
    ReencodedError,
    UsageError,
    VersionError,
    WrongLicenceError,
)
from privet.images import ImageSet, write_images
from privet.learning import Runtime
from privet.licensing import (
    Vendor,
    issue,
    load_licence,
    read_licence,
    read_manifest,
    read_public,
    release,
    train,
    verify,
    write_licence,
)
from privet.licensing.manifest import NAME, canonical, merkle_root, parse_manifest
from privet.models import create_model
from tests.conftest import blobs
from tests.licensing.conftest import EASY, OURS, PLAN, RECIPE, THEIRS, World, protect, publish

SOON = datetime.date(2030, 6, 30)
Copy = Callable[[], Path]


def image_of(folder: Path) -> Path:
    return sorted(folder.rglob("*.png"))[0]


def resign(folder: Path, vendor: Vendor, **changes: object) -> None:
    content = json.loads((folder / NAME).read_text())
    content.pop("signature")
    content.update(changes)
    (folder / NAME).write_bytes(canonical({**content, "signature": vendor.sign(canonical(content)).hex()}))


def test_a_release_holds_and_says_so(made: World) -> None:
    public = read_public(made.root / "vendor")
    licence = read_licence(made.file, THEIRS, public=public)
    found = verify(made.folder, public=public, licence=licence, today=SOON)
    assert found.images == 12 and set(found.manifest.files) >= {"0/0000.png", "manifest.jsonl", "run.json"}
    assert found.manifest.method == "keyed noise" and found.manifest.budget == {"norm": "linf", "amount": 8}
    assert set(found.manifest.commitments) == {"stem", "weights", "recipe"}
    assert licence.terms.recipe == {**RECIPE, "architecture": "cnn-w4"} and licence.terms.licensee == "Ada"
    assert verify(made.folder, public=public) and verify(made.folder, licence=licence, today=SOON)
    for file in (made.file, made.root / "vendor/vendor.key", made.root / "vendor/cats-1.licence"):
        assert file.stat().st_mode & 0o777 == 0o600
    assert (made.root / "vendor/ledger.jsonl").stat().st_mode & 0o777 == 0o600


def spoil_byte(folder: Path) -> None:
    data = bytearray(image_of(folder).read_bytes())
    data[len(data) // 2] ^= 1
    image_of(folder).write_bytes(data)


def spoil_text(folder: Path) -> None:
    (folder / "run.json").write_bytes((folder / "run.json").read_bytes() + b" ")


def jpeg(folder: Path) -> None:
    with Image.open(image_of(folder)) as image:
        image.load()
        image.save(folder / "x.jpg", quality=90)
    with Image.open(folder / "x.jpg") as image:
        image.save(image_of(folder))
    (folder / "x.jpg").unlink()


def resave(folder: Path) -> None:
    with Image.open(image_of(folder)) as image:
        image.load()
        image.save(image_of(folder), compress_level=1)


def manifest_byte(folder: Path) -> None:
    text = (folder / NAME).read_text()
    (folder / NAME).write_text(text.replace('"release":"cats-1"', '"release":"cats-2"'))


def newer(folder: Path) -> None:
    text = (folder / NAME).read_text()
    (folder / NAME).write_text(text.replace("privet-release-1", "privet-release-2"))


SPOILT: dict[str, tuple[Callable[[Path], object], type[PrivetError], str]] = {
    "a flipped byte": (spoil_byte, ChangedFileError, "0/0000.png: the bytes are not those that were signed"),
    "a changed text": (spoil_text, ChangedFileError, "run.json: the bytes"),
    "jpeg": (jpeg, ReencodedError, "other pixels than were signed"),
    "written anew": (resave, ReencodedError, "The pixels are those that were signed"),
    "a missing file": (lambda f: image_of(f).unlink(), FileListError, "0/0000.png in .*: missing"),
    "one too many": (lambda f: (f / "0/new.png").write_bytes(b""), FileListError, "not part of the release"),
    "a link": (lambda f: (f / "link").symlink_to("/"), FileListError, "not a regular file"),
    "no utf-8": (lambda f: Path(os.fsdecode(os.fsencode(f) + b"/\xff")).touch(), FileListError, "not UTF-8"),
    "no manifest": (lambda f: (f / NAME).unlink(), ManifestError, "Get the whole release"),
    "another name": (manifest_byte, ManifestError, "is not what the vendor .* signed"),
    "a newer format": (newer, VersionError, "'privet-release-2'; this privet knows privet-release-1"),
    "no json": (lambda f: (f / NAME).write_bytes(b"{"), ManifestError, "not JSON"),
    "a list": (lambda f: (f / NAME).write_bytes(b"[1]"), ManifestError, "not a release's manifest"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_was_spoilt_is_found(case: str, made: World, copied: Copy) -> None:
    spoil, error, message = SPOILT[case]
    folder = copied()
    spoil(folder)
    with pytest.raises(error, match=message):
        verify(folder, public=made.vendor.public, licence=made.licence, today=SOON)


def test_what_systems_drop_into_folders_is_no_part_of_a_release(made: World, copied: Copy) -> None:
    folder, public = copied(), made.vendor.public
    clutter = [".DS_Store", "0/.DS_Store", "0/Thumbs.db", "desktop.ini", "0/._0000.png", ".abcd_1f9.tmp"]
    for name in clutter:
        (folder / name).write_bytes(b"what somebody's file manager keeps, or a kill left")
    assert verify(folder, public=public).manifest == read_manifest(made.folder, public=public)
    # Signed they are not either, so that whoever tidies up does not break the release.
    release(
        folder, made.vendor, "cats-1", OURS, stem=PLAN, clean=made.root / "clean",
        weights=made.root / "initial.safetensors", recipe=RECIPE, work=EASY,
    )  # fmt: skip
    assert not set(clutter) & set(read_manifest(folder, public=public).files)
    for name in clutter:  # an image is one too many, whatever it is called
        shutil.copy(image_of(made.folder), folder / name)
        with pytest.raises(FileListError, match=f"{name} in .*: not part of the release"):
            verify(folder, public=public)
        (folder / name).unlink()
    (folder / "0/._0000.png").symlink_to("/")
    with pytest.raises(FileListError, match="not a regular file"):
        verify(folder, public=public)


def test_a_folder_that_cannot_be_read_is_not_left_out(
    made: World, copied: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, look = copied(), os.scandir

    def refuse(path: str) -> object:
        if path.endswith("/1"):
            raise PermissionError(13, "Permission denied", path)
        return look(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="Cannot read .*/1: Permission denied"):
        verify(folder, public=made.vendor.public)
    weights = made.root / "initial.safetensors"
    with pytest.raises(InputError, match="Cannot read .*/1: Permission denied"):
        release(folder, made.vendor, "b", OURS, weights=weights, work=EASY)


def test_signed_nonsense_is_the_vendors_mistake(made: World, copied: Copy) -> None:
    folder = copied()
    for changes in (
        {"merkle_root": "0" * 64},
        {"files": []},
        {"extra": 1},
        {"files": {"a": {"sha256": 1, "pixels": None}}},
    ):
        shutil.copy(made.folder / NAME, folder / NAME)
        resign(folder, made.vendor, **changes)
        with pytest.raises(ManifestError, match="signed, but malformed"):
            read_manifest(folder, public=made.vendor.public)


def test_licences_that_do_not_belong(made: World, tmp_path: Path) -> None:
    public, today = made.vendor.public, SOON + datetime.timedelta(days=1)
    with pytest.raises(ExpiredError, match="expired after 2030-06-30"):
        verify(made.folder, licence=made.licence, today=today)
    verify(made.folder, licence=replace(made.licence, terms=replace(made.licence.terms, expires=None)))
    with pytest.raises(OtherReleaseError, match="for the release 'dogs'; this is 'cats-1'"):
        verify(made.folder, licence=replace(made.licence, terms=replace(made.licence.terms, release="dogs")))
    tensors = {name: value.clone() for name, value in made.licence.tensors.items()}
    tensors["stem/sign"][0, 0, 0] *= -1
    for wrong in (
        replace(made.licence, tensors=tensors),
        replace(made.licence, salt=bytes(32)),
        replace(made.licence, terms=replace(made.licence.terms, recipe={})),
    ):
        with pytest.raises(WrongLicenceError, match="does not hold what the manifest commits to"):
            verify(made.folder, licence=wrong, today=SOON)
    other = Vendor.create(tmp_path / "other", OURS, work=EASY)
    with pytest.raises(WrongLicenceError, match="another vendor's"):
        read_licence(made.file, THEIRS, public=other.public)
    with pytest.raises(ManifestError):
        verify(made.folder, public=other.public)
    with pytest.raises(WrongLicenceError, match="another vendor's licence than|is another vendor's than"):
        theirs = replace(made.licence, terms=replace(made.licence.terms, public_key=other.public.hex()))
        verify(made.folder, public=public, licence=theirs, today=SOON)
    # Terms that were changed by somebody who knows the passphrase:
    write_licence(tmp_path / "forged", made.licence, other, THEIRS, work=EASY)
    with pytest.raises(WrongLicenceError, match="not as its vendor signed it"):
        read_licence(tmp_path / "forged", THEIRS)
    with pytest.raises(UsageError, match="anybody could have signed"):
        verify(made.folder)


def test_every_failure_has_its_own_code() -> None:
    kinds = [LicenceError, *LicenceError.__subclasses__()]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes) == 11 and set(codes) <= set(EXIT_CODES)


def test_passphrases_and_torn_bundles(made: World, tmp_path: Path) -> None:
    with pytest.raises(PassphraseError, match="does not open"):
        read_licence(made.file, "wrong")
    with pytest.raises(UsageError, match="empty"):
        read_licence(made.file, "")
    with pytest.raises(InputError, match="Cannot read"):
        read_licence(tmp_path / "none", THEIRS)
    data = made.file.read_bytes()
    torn = tmp_path / "torn"
    for content, error, message in (
        (data[:-1], BundleError, "truncated or torn"),
        (data[:40], BundleError, "too short"),
        (data + b"x", BundleError, "truncated or torn"),
        (b"PK" + data[2:], BundleError, "not a file that privet sealed"),
        (data[:8] + b"\2" + data[9:], VersionError, "has format 2"),
        (data[:100] + bytes([data[100] ^ 1]) + data[101:], BundleError, "checksum does not fit"),
    ):
        torn.write_bytes(content)
        with pytest.raises(error, match=message):
            read_licence(torn, THEIRS)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_bundles_end_in_typed_errors(made: World, tmp_path: Path, data: st.DataObject) -> None:
    import hashlib

    whole = made.file.read_bytes()
    torn = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(1, 4))):
        if torn:
            torn[data.draw(st.integers(0, len(torn) - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()) and len(torn) > 32:  # an attacker mends the checksum
        if len(torn) > 9:
            torn[9] = min(torn[9], 6) if data.draw(st.booleans()) else max(torn[9], 21)
        torn = torn[:-32] + hashlib.sha256(torn[:-32]).digest()
    if bytes(torn) == whole:
        return
    (tmp_path / "bundle").write_bytes(torn)
    with pytest.raises((BundleError, VersionError, PassphraseError)):
        read_licence(tmp_path / "bundle", THEIRS)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_manifests_end_in_typed_errors(made: World, data: st.DataObject) -> None:
    whole = (made.folder / NAME).read_bytes()
    torn = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(0, 3))):
        if torn:
            torn[data.draw(st.integers(0, len(torn) - 1))] = data.draw(st.sampled_from(b'0a"[]{},:\xff\0'))
    try:
        manifest = parse_manifest(bytes(torn), public=made.vendor.public)
    except (ManifestError, VersionError):
        return
    assert manifest == read_manifest(made.folder, public=made.vendor.public)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["terms", "salt", "signature", "release", "expires", "recipe", "public_key", "tensor"]),
    json_values,
)
def test_hostile_contents_end_in_typed_errors(made: World, tmp_path: Path, place: str, value: object) -> None:
    """Somebody who knows the passphrase seals nonsense."""
    import safetensors.torch

    from privet.licensing.licence import FORMAT
    from privet.licensing.sealed import unseal, write_sealed

    content = unseal(made.file.read_bytes(), THEIRS)
    length = int.from_bytes(content[:8], "little")
    about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][FORMAT])
    tensors = dict(made.licence.tensors)
    if place in about:
        about[place] = value
    elif place == "tensor":
        tensors["stem/group"] = torch.zeros(2)
    else:
        about["terms"][place] = value
    write_sealed(
        tmp_path / "odd", safetensors.torch.save(tensors, {FORMAT: json.dumps(about)}), THEIRS, work=EASY
    )
    try:
        licence = read_licence(tmp_path / "odd", THEIRS)
    except (BundleError, WrongLicenceError):
        return
    assert licence.terms == made.licence.terms


@pytest.mark.parametrize("content", [b"", b"x" * 64, b"\xff" * 8, (2).to_bytes(8, "little") + b"{}"])
def test_seals_around_something_else(tmp_path: Path, content: bytes) -> None:
    from privet.licensing.sealed import write_sealed

    write_sealed(tmp_path / "odd", content, THEIRS, work=EASY)
    with pytest.raises((BundleError, VersionError)):
        read_licence(tmp_path / "odd", THEIRS)


@pytest.mark.parametrize("length", [0, 8, 63, 64, 65])
def test_keys_of_a_vendor_have_one_length(tmp_path: Path, length: int) -> None:
    from privet.licensing.sealed import write_sealed

    write_sealed(tmp_path / "vendor/vendor.key", b"x" * length, OURS, work=EASY)
    if length == 64:
        assert Vendor.open(tmp_path / "vendor", OURS)._secret == b"x" * 32
        return
    with pytest.raises(BundleError, match="does not hold a vendor's keys"):
        Vendor.open(tmp_path / "vendor", OURS)


def test_keys_that_a_kill_left_without_a_public_one(tmp_path: Path) -> None:
    public = Vendor.create(tmp_path, OURS, work=EASY).public
    (tmp_path / "vendor.pub").unlink()
    key = (tmp_path / "vendor.key").read_bytes()
    with pytest.raises(PassphraseError):
        Vendor.create(tmp_path, "another's", work=EASY)
    assert not (tmp_path / "vendor.pub").exists()
    assert Vendor.create(tmp_path, OURS, work=EASY).public == public == read_public(tmp_path)
    assert (tmp_path / "vendor.key").read_bytes() == key
    with pytest.raises(OutputError, match="could trace no earlier release"):
        Vendor.create(tmp_path, OURS, work=EASY)
    (tmp_path / "vendor.key").unlink()  # moved to a safe place
    with pytest.raises(OutputError, match="could trace no earlier release"):
        Vendor.create(tmp_path, OURS, work=EASY)


def test_merkle_root_against_recursion() -> None:
    import hashlib

    def slow(leaves: list[bytes]) -> bytes:
        if len(leaves) == 1:
            return hashlib.sha256(b"\0" + leaves[0]).digest()
        half = 1
        while half * 2 < len(leaves):
            half *= 2
        return hashlib.sha256(b"\1" + slow(leaves[:half]) + slow(leaves[half:])).digest()

    for count in range(1, 20):
        leaves = [bytes([number]) for number in range(count)]
        assert merkle_root(leaves) == slow(leaves).hex()
    assert merkle_root([]) == hashlib.sha256().hexdigest()


def test_releases_that_cannot_be_made(made: World, tmp_path: Path) -> None:
    vendor = made.vendor
    with pytest.raises(UsageError, match="everybody is authorised alike"):
        release(made.folder, vendor, "a", OURS, work=EASY)
    with pytest.raises(UsageError, match="needs the originals"):
        release(made.folder, vendor, "a", OURS, stem=PLAN, work=EASY)
    with pytest.raises(LicenceError, match="Through the stem, 12 of 12 protected images differ"):
        release(made.folder, vendor, "cats-2", OURS, stem=PLAN, clean=made.root / "clean", work=EASY)
    with pytest.raises(UsageError, match="Expected a name"):
        release(made.folder, vendor, "../cats", OURS, stem=PLAN, clean=made.root / "clean", work=EASY)
    initial = made.root / "initial.safetensors"
    for recipe, message in (
        ({"epoch": 3}, "holds settings of Learner"),
        ({"weights": "x"}, "names no weights file"),
        ({"architecture": "vit"}, "The recipe is for vit"),
    ):
        with pytest.raises(UsageError, match=message):
            release(made.folder, vendor, "a", OURS, weights=initial, recipe=recipe, work=EASY)
    with pytest.raises(OutputError, match="other keys or another recipe"):
        release(made.folder, vendor, "cats-1", OURS, weights=initial, work=EASY)
    publish(made.clean, made.protected, tmp_path / "p")
    (tmp_path / "p/surrogate.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="helps others to undo the protection"):
        release(tmp_path / "p", vendor, "a", OURS, weights=initial, work=EASY)
    with pytest.raises(InputError, match="There is no release 'none'"):
        issue(vendor, "none", OURS, licensee="A", passphrase="p", out=tmp_path / "l", work=EASY)
    for wrong in ({"licensee": " "}, {"expires": "tomorrow"}, {"expires": "2020-01-01"}):
        arguments = {"licensee": "A", "passphrase": "p", "out": tmp_path / "l", **wrong}
        with pytest.raises(UsageError):
            issue(vendor, "cats-1", OURS, work=EASY, **arguments)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="exists"):
        issue(vendor, "cats-1", OURS, licensee="A", passphrase="p", out=made.file, work=EASY)
    with pytest.raises(OutputError, match="could trace no earlier release"):
        Vendor.create(made.root / "vendor", OURS, work=EASY)


@pytest.mark.parametrize("run", [{}, {"settings": 3}, {"settings": {"group": "x", "tile": 8, "grey": False}}])
def test_a_run_that_does_not_tell_its_stem(made: World, tmp_path: Path, run: dict[str, object]) -> None:
    publish(made.clean, made.protected, tmp_path / "p")
    (tmp_path / "p/run.json").write_text(json.dumps({"method": "keyed-em", **run}))
    with pytest.raises(InputError, match="names the method keyed-em, but not its stem"):
        release(tmp_path / "p", made.vendor, "a", OURS, clean=made.root / "clean", work=EASY)


def test_the_same_release_again_is_the_same(made: World, tmp_path: Path) -> None:
    """After a kill between its two files, or when the files were protected again."""
    vendor = Vendor.create(tmp_path / "v", OURS, work=EASY)
    protected = protect(made.clean, vendor, "r")
    publish(made.clean, protected, tmp_path / "p")
    first, again = (
        release(tmp_path / "p", vendor, "r", OURS, stem=PLAN, clean=made.root / "clean", work=EASY)
        for _ in range(2)
    )
    assert replace(first, created="") == replace(again, created="")
    with pytest.raises(PassphraseError):
        release(tmp_path / "p", vendor, "r", "?", stem=PLAN, clean=made.root / "clean", work=EASY)


def test_a_name_stands_for_the_same_images(made: World, tmp_path: Path) -> None:
    vendor = Vendor.create(tmp_path / "v", OURS, work=EASY)

    def make(folder: str, **more: Path) -> None:
        release(
            tmp_path / folder, vendor, "r", OURS, stem=PLAN, clean=tmp_path / f"{folder}-clean", work=EASY, **more
        )  # fmt: skip

    for folder, count, seed in (("p", 12, 0), ("other", 12, 7), ("more", 15, 0)):
        clean = blobs(count, seed=seed)
        write_images(clean, clean, tmp_path / f"{folder}-clean", workers=1)
        publish(clean, protect(clean, vendor, "r"), tmp_path / folder)
    make("p")
    record = tmp_path / "v/r.images.json"
    assert record.stat().st_mode & 0o777 == 0o600
    kept = record.read_bytes()
    for folder in ("other", "more"):
        with pytest.raises(OutputError, match="There was a release r of other images"):
            make(folder)
        assert not (tmp_path / folder / NAME).exists() and record.read_bytes() == kept
    # The same images, with an audit, a text, and files written anew, are the same release.
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "p/README").write_text("cats")
    resave(tmp_path / "p")
    make("p", audit=tmp_path / "report.json")
    assert read_manifest(tmp_path / "p", public=vendor.public).audit is not None
    assert record.read_bytes() == kept
    image_of(tmp_path / "p").rename(tmp_path / "p/0/another.png")  # fingerprints go by names
    image_of(tmp_path / "p-clean").rename(tmp_path / "p-clean/0/another.png")
    with pytest.raises(OutputError, match="of other images"):
        make("p")
    # A vendor's folder of before there was a record: the next release makes it.
    record.unlink()
    make("other")
    with pytest.raises(OutputError, match="of other images"):
        make("p")


def test_a_release_keeps_its_own_secrets(made: World, tmp_path: Path) -> None:
    folder, initial = tmp_path / "p", made.root / "initial.safetensors"
    publish(made.clean, made.protected, folder)
    vendor = Vendor.create(tmp_path / "v", OURS, work=EASY)

    def refused(message: str, *, by: Vendor = vendor, weights: Path = initial) -> None:
        with pytest.raises(InputError, match=message):
            release(folder, by, "r", OURS, weights=weights, work=EASY)
        assert not (folder / NAME).exists() and not (by.folder / "r.licence").exists()

    inside = folder / "0/initial.safetensors"
    shutil.copy(initial, inside)
    refused("secret initial weights, lies in it. Move it to a private place", weights=inside)
    (tmp_path / "link").symlink_to(inside)
    refused("secret initial weights, lies in it", weights=tmp_path / "link")
    inside.rename(folder / "notes.txt")
    refused("notes.txt has the bytes of .*initial.safetensors, which must stay private")
    (folder / "notes.txt").unlink()
    for name in ("vendor.key", "cats.surrogate.safetensors"):
        (vendor.folder / "cats.surrogate.safetensors").write_bytes(b"what the noise was found with")
        shutil.copy(vendor.folder / name, folder / "notes.txt")
        refused(f"notes.txt has the bytes of .*{name}, which must stay private")
    shutil.copy(vendor.folder / "vendor.pub", folder / "notes.txt")  # which everybody may have
    assert "notes.txt" in release(folder, vendor, "r", OURS, weights=initial, work=EASY).files
    (folder / NAME).unlink()
    refused("the vendor's folder, lies in it", by=Vendor.create(folder / "keys", OURS, work=EASY))


def test_a_loop_of_ones_own(made: World) -> None:
    model = create_model("cnn-w4", classes=3, size=(8, 8), seed=1)
    licence = load_licence(model, made.file, THEIRS, today=SOON)
    wanted = create_model("cnn-w4", classes=3, size=(8, 8), seed=5).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert licence.stem is not None
    assert torch.equal(licence.stem(made.protected.pixels), licence.stem(made.clean.pixels))
    assert not torch.equal(made.protected.pixels, made.clean.pixels)
    with pytest.raises(InputError, match="do not fit this network"):
        load_licence(create_model("cnn-w4", classes=4, size=(8, 8)), made.file, THEIRS, today=SOON)
    with pytest.raises(ExpiredError):
        load_licence(model, made.file, THEIRS, today=datetime.date(2031, 1, 1))


def test_the_licensee_trains_as_on_the_originals(made: World, tmp_path: Path, runtime: Runtime) -> None:
    """The same network, bit for bit, as one that a training on the stemmed originals gives."""
    from privet.learning import Learner, study

    made_, stem = read_licence(made.file, THEIRS), made.licence.stem
    assert stem is not None
    trained = train(made.folder, made.root / "clean", made_, tmp_path / "out", runtime=runtime, today=SOON)
    # Files are read in the order of their bytes; so the originals' pixels go under the protected files' names.
    recipe = Learner(architecture="cnn-w4", **RECIPE, weights=made.root / "initial.safetensors")  # type: ignore[arg-type]
    place = {
        np.asarray(now).tobytes(): before
        for now, before in zip(made.protected.pixels, made.clean.pixels, strict=True)
    }

    def originals(images: ImageSet) -> ImageSet:
        found = [place.get(np.asarray(one).tobytes(), one) for one in images.pixels]
        return images.with_pixels(stem.apply_to(torch.stack(found)))

    expected = study(
        made.folder,
        made.root / "clean",
        recipe,
        tmp_path / "x",
        runtime=runtime,
        transform=originals,
        present=originals,
    )
    for one, other in zip(trained.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ExpiredError):
        train(
            made.folder, made.root / "clean", made_, tmp_path / "late", runtime=runtime,
            today=datetime.date(2031, 1, 1),
        )  # fmt: skip
    assert not (tmp_path / "late").exists()


def test_secrets_are_not_shown(made: World) -> None:
    import copy
    import pickle

    vendor = made.vendor
    text = repr(vendor) + str(vendor) + repr(made.licence)
    for secret in (vendor._secret, vendor._signing, made.licence.salt):
        assert secret.hex() not in text and repr(secret)[2:-1] not in text
    for spread in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled"):
            spread(vendor)


def test_every_release_has_keys_of_its_own(made: World) -> None:
    vendor = made.vendor
    patterns = [vendor.stem(name).group for name in ("a", "b")]
    assert not torch.equal(*patterns)
    keys = {vendor.fingerprint("a", "bc"), vendor.fingerprint("ab", "c"), vendor.salt("a"), vendor.salt("b")}
    assert len(keys) == 4
    assert Vendor.open(made.root / "vendor", OURS).salt("a") == vendor.salt("a")
