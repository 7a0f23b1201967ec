"""Whose copy leaked: found when guilty, almost never accused when not."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from privet.errors import (
    FileListError,
    LicenceError,
    ManifestError,
    OtherReleaseError,
    UsageError,
    WrongLicenceError,
)
from privet.files import read_lines
from privet.images import ImageSet, open_images
from privet.learning import Runtime
from privet.licensing import (
    Licence,
    Suspect,
    Vendor,
    find_leak,
    issue,
    make_copy,
    mark,
    read_manifest,
    trace,
    verify,
    write_manifest,
)
from privet.models.keyed_stem import KeyedStem
from privet.seeds import generator
from tests.licensing.conftest import EASY, OURS, THEIRS, World

PEOPLE = {f"copy-{number}": bytes([number]) * 32 for number in range(10)}
STEM = KeyedStem.from_key(bytes(range(32)))


def pictures(count: int, seed: int = 0) -> ImageSet:
    random = generator(seed, "pictures")
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=random)
    pixels = pixels // 8 + torch.randint(0, 224, (count, 3, 2, 2), generator=random).repeat_interleave(
        8, 2
    ).repeat_interleave(8, 3)
    return ImageSet.from_arrays(pixels.to(torch.uint8), torch.zeros(count, dtype=torch.int64))


def protect(images: ImageSet, stem: KeyedStem | None, epsilon: int = 8) -> ImageSet:
    wanted = 20 * torch.randn(images.pixels.shape, generator=generator(1, "noise"))
    chip = stem or KeyedStem.from_key(bytes(range(16)))
    delta = chip.project(wanted, images.pixels, epsilon=epsilon)
    return images.with_pixels((images.pixels + delta).to(torch.uint8))


def guilty(found: list[Suspect]) -> list[str]:
    return sorted(suspect.copy for suspect in found if suspect.guilty)


@pytest.mark.parametrize("stem", [STEM, None], ids=["stem", "pixels"])
def test_a_copy_keeps_budget_and_stem_and_is_traced(stem: KeyedStem | None) -> None:
    clean = pictures(6)
    protected = protect(clean, stem)
    copy = mark(protected, clean, PEOPLE["copy-3"], epsilon=8, stem=stem)
    assert int((copy.pixels.int() - clean.pixels.int()).abs().max()) <= 8
    changed = (copy.pixels.int() - protected.pixels.int()).abs()
    assert int(changed.max()) == 1 and float(changed.float().mean()) > 0.4
    if stem is not None:
        assert torch.equal(stem(copy.pixels), stem(clean.pixels))
    order = torch.tensor([4, 1, 5])
    leaked = replace(copy.subset(order), names=("x", "y", "z"))  # some of them, under other names
    found = trace(leaked, protected, PEOPLE, stem=stem)
    assert guilty(found) == ["copy-3"] and found[0].copy == "copy-3"
    assert found[0].false_accusation < 1e-9 and found[1].false_accusation > 1e-3
    assert all(one.score >= other.score for one, other in pairwise(found))


@pytest.mark.parametrize("stem", [STEM, None], ids=["stem", "pixels"])
def test_who_average_their_copies_are_named(stem: KeyedStem | None) -> None:
    clean = pictures(40)
    protected = protect(clean, stem)
    copies = torch.stack(
        [
            mark(protected, clean, PEOPLE[name], epsilon=8, stem=stem).pixels
            for name in ("copy-1", "copy-4", "copy-7")
        ]
    )
    average = protected.with_pixels(copies.float().mean(0).round().to(torch.uint8))
    median = protected.with_pixels(copies.median(0).values)
    for leaked in (average, median):
        assert guilty(trace(leaked, protected, PEOPLE, stem=stem)) == ["copy-1", "copy-4", "copy-7"]


def test_the_innocent_are_not_accused() -> None:
    clean = pictures(4)
    protected = protect(clean, None)
    many = {f"copy-{number}": number.to_bytes(32, "big") for number in range(400)}
    leaks = [
        clean,  # the originals themselves
        protected,
        pictures(4, seed=9),  # somebody else's images
        mark(protected, clean, b"unknown key....." * 2, epsilon=8),
    ]
    for leaked in leaks:
        found = trace(leaked, protected, many, false_accusations=1e-3)
        assert guilty(found) == []
    scores = torch.tensor([suspect.score for suspect in trace(leaks[3], protected, many)])
    assert abs(float(scores.mean())) < 0.2 and 0.9 < float(scores.std()) < 1.1
    # Hoeffding's bound is what is stated, and the tail keeps below it.
    for level in (1.0, 1.5, 2.0, 2.5):
        assert float((scores >= level).float().mean()) <= math.exp(-(level**2) / 2)


def repeated(images: ImageSet, times: int, noise: int = 0) -> ImageSet:
    """Return every image many times under names of its own, each time with other noise of so many 1/255."""
    many = images.subset(list(range(len(images))) * times)
    moved = many.pixels.int() + torch.randint(
        -noise, noise + 1, many.pixels.shape, generator=generator(2, "resaved")
    )
    return replace(
        many.with_pixels(moved.clamp(0, 255).to(torch.uint8)),
        names=tuple(f"found-{number}" for number in range(len(many))),
    )


@pytest.mark.parametrize("stem", [STEM, None], ids=["stem", "pixels"])
def test_files_of_one_image_count_as_one(stem: KeyedStem | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the score of the innocent would grow with the root of the number of files."""
    clean = pictures(4)
    protected = protect(clean, stem)
    many = {f"copy-{number}": number.to_bytes(32, "big") for number in range(100)}
    once = trace(clean.subset([2]), protected, many, stem=stem)
    for times in (16, 64):
        found = trace(repeated(clean.subset([2]), times), protected, many, stem=stem)
        assert [suspect.score for suspect in found] == pytest.approx([suspect.score for suspect in once])
    for leaked in (
        repeated(clean.subset([2]), 64, noise=3),  # saved anew each time
        repeated(pictures(1, seed=9), 64),  # somebody else's image, again and again
        pictures(400, seed=11),  # more of somebody else's images than were protected
    ):
        found = trace(leaked, protected, many, stem=stem)
        assert guilty(found) == [] and found[0].score < 4.5
    scores = [suspect.score for suspect in found]
    monkeypatch.setattr("privet.licensing.fingerprint.CHUNK", 3)  # in parts of the found and of the protected
    again = trace(leaked, protected, many, stem=stem)
    assert [suspect.score for suspect in again] == pytest.approx(scores)


@pytest.mark.parametrize("stem", [STEM, None], ids=["stem", "pixels"])
def test_the_guilty_are_named_among_many_files(stem: KeyedStem | None) -> None:
    clean = pictures(4)
    protected = protect(clean, stem)
    copy = mark(protected, clean, PEOPLE["copy-7"], epsilon=8, stem=stem)
    once = trace(copy, protected, PEOPLE, stem=stem)
    found = trace(repeated(copy, 16), protected, PEOPLE, stem=stem)
    assert guilty(found) == ["copy-7"] and found[0].score == pytest.approx(once[0].score)
    noisy = [trace(repeated(copy, times, noise=3), protected, PEOPLE, stem=stem) for times in (1, 16)]
    assert guilty(noisy[1]) == ["copy-7"]
    assert noisy[1][0].score > noisy[0][0].score  # noise of many files of one image cancels


def test_the_statement_is_the_bound() -> None:
    clean = pictures(1)
    protected = protect(clean, None)
    copy = mark(protected, clean, PEOPLE["copy-0"], epsilon=8)
    for suspect in trace(copy, protected, PEOPLE):
        bound = min(1.0, 10 * math.exp(-(max(suspect.score, 0) ** 2) / 2))
        assert suspect.false_accusation == pytest.approx(bound)
    same = trace(protected, protected, PEOPLE)
    assert [suspect.score for suspect in same] == [0.0] * 10 and not guilty(same)


def test_what_cannot_be_traced() -> None:
    clean = pictures(3)
    protected = protect(clean, None)
    with pytest.raises(UsageError, match="its budget was given as 4"):
        mark(protected, clean, PEOPLE["copy-0"], epsilon=4)
    with pytest.raises(UsageError, match="Expected the original of each of 3"):
        mark(protected, clean.subset([0, 1]), PEOPLE["copy-0"], epsilon=8)
    with pytest.raises(UsageError, match="at least one copy"):
        trace(protected, protected, {})
    with pytest.raises(UsageError, match="a probability"):
        trace(protected, protected, PEOPLE, false_accusations=0)
    small = ImageSet.from_arrays(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1))
    with pytest.raises(UsageError, match="open both at one size"):
        trace(small, protected, PEOPLE)


def with_a_copy(vendor: Vendor, name: str, folder: Path) -> Licence:
    """Return a licence that lets a copy be made, written into a folder."""
    return issue(
        vendor, "cats-1", OURS, licensee=name, passphrase=THEIRS, out=folder / name, copied=True, work=EASY
    )


def test_copies_of_a_release(made: World, tmp_path: Path, runtime: Runtime) -> None:
    root = tmp_path
    with pytest.raises(LicenceError, match="The ledger knows no copy of the release 'cats-2'"):
        find_leak(made.folder, made.folder, made.vendor, "cats-2", OURS)
    with pytest.raises(UsageError, match="issued with one"):
        make_copy(made.folder, made.root / "clean", made.licence, made.vendor, root / "none", runtime=runtime)
    licences = {name: with_a_copy(made.vendor, name, root) for name in ("Bo", "Cy")}
    for name, licence in licences.items():
        for _ in range(2):  # again: what is there stays
            make_copy(
                made.folder, made.root / "clean", licence, made.vendor, root / f"{name}-copy",
                runtime=runtime, workers=1,
            )  # fmt: skip
        found = verify(root / f"{name}-copy", licence=licence)
        assert found.images == 12 and found.manifest.copy == licence.terms.copy
        verify(made.folder, licence=licence)
    with pytest.raises(LicenceError, match="the licence goes with"):
        verify(root / "Bo-copy", licence=licences["Cy"])
    with pytest.raises(LicenceError, match="the public release"):
        verify(
            root / "Bo-copy", licence=replace(made.licence, terms=replace(made.licence.terms, expires=None))
        )
    clean, copy = (open_images(root_) for root_ in (made.root / "clean", root / "Bo-copy"))
    place = {name: index for index, name in enumerate(copy.names)}
    copy = copy.subset([place[name] for name in clean.names])
    assert int((copy.pixels.int() - clean.pixels.int()).abs().max()) <= 8
    stem = licences["Bo"].stem
    assert stem is not None and torch.equal(stem(copy.pixels), stem(clean.pixels))
    names = [
        (who, suspect.guilty)
        for who, suspect in find_leak(root / "Bo-copy", made.folder, made.vendor, "cats-1", OURS)
    ]
    assert names == [("Bo", True), ("Cy", False)]


def with_a_ledger_of_its_own(made: World, folder: Path) -> Vendor:
    """Return the vendor with a copy of their folder, so that no other test meets its licensees."""
    shutil.copytree(made.vendor.folder, folder / "vendor")
    return replace(made.vendor, folder=folder / "vendor")


def test_copies_are_made_of_the_licensed_release_alone(
    made: World, copied: Callable[[], Path], tmp_path: Path, runtime: Runtime
) -> None:
    ours = with_a_ledger_of_its_own(made, tmp_path)

    def make(base: Path, licence: Licence, out: str, vendor: Vendor = ours) -> None:
        make_copy(base, made.root / "clean", licence, vendor, tmp_path / out, runtime=runtime, workers=1)

    first, second = (with_a_copy(ours, name, tmp_path) for name in ("Di", "Ed"))
    make(made.folder, first, "copy-of-Di")
    manifest = read_manifest(made.folder, public=ours.public)
    for licence in (first, second):  # also whoever already has this very copy
        with pytest.raises(
            UsageError, match="copy-of-Di is a licensee's copy .*folder of the release itself"
        ):
            make(tmp_path / "copy-of-Di", licence, "refused")
    with pytest.raises(UsageError, match="is a licensee's copy"):
        find_leak(made.folder, tmp_path / "copy-of-Di", ours, "cats-1", OURS)
    with pytest.raises(OtherReleaseError, match="for the release 'dogs'"):
        make(made.folder, replace(second, terms=replace(second.terms, release="dogs")), "refused")
    with pytest.raises(WrongLicenceError, match="commits to"):
        make(made.folder, replace(second, salt=bytes(32)), "refused")
    with pytest.raises(WrongLicenceError, match="another vendor's"):
        make(made.folder, second, "refused", Vendor.create(tmp_path / "other", OURS, work=EASY))
    with pytest.raises(ManifestError, match="Get the whole release"):
        find_leak(made.folder, made.root / "clean", ours, "cats-1", OURS)

    base = copied()
    write_manifest(base, replace(manifest, release="cats-2"), ours)
    with pytest.raises(OtherReleaseError, match="is the release 'cats-2'; asked was about 'cats-1'"):
        find_leak(made.folder, base, ours, "cats-1", OURS)
    write_manifest(base, replace(manifest, budget={"norm": "l0", "amount": 1}), ours)
    with pytest.raises(UsageError, match="names none that is L-infinity"):
        make(base, second, "refused")
    write_manifest(base, manifest, ours)
    next(base.rglob("*.png")).unlink()
    with pytest.raises(FileListError, match="missing"):
        make(base, second, "refused")
    assert not (tmp_path / "refused").exists()


def test_a_licence_with_a_copy_waits_for_its_base(
    made: World, copied: Callable[[], Path], tmp_path: Path
) -> None:
    """Neither the ledger nor the licence tells of a copy that cannot be made."""
    base, ours = copied(), with_a_ledger_of_its_own(made, tmp_path)
    manifest = read_manifest(base, public=ours.public)
    ledger, file = ours.folder / "ledger.jsonl", tmp_path / "Fay"
    entries = len(read_lines(ledger))
    for wrong, error, message in (
        ({"copy": "0123456789abcdef"}, UsageError, "is a licensee's copy"),
        ({"release": "cats-2"}, OtherReleaseError, "this is 'cats-2'"),
        ({"commitments": {}}, WrongLicenceError, "commits to"),
        ({"budget": None}, UsageError, "names none that is L-infinity"),
        ({}, None, ""),
    ):
        write_manifest(base, replace(manifest, **wrong), ours)  # type: ignore[arg-type]
        arguments = {"licensee": "Fay", "passphrase": THEIRS, "out": file, "copied": True, "base": base}
        if error is None:
            issue(ours, "cats-1", OURS, work=EASY, **arguments)  # type: ignore[arg-type]
            continue
        with pytest.raises(error, match=message):
            issue(ours, "cats-1", OURS, work=EASY, **arguments)  # type: ignore[arg-type]
        assert not file.exists() and len(read_lines(ledger)) == entries
    assert file.exists() and len(read_lines(ledger)) == entries + 1
