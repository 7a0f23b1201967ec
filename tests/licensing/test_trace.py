"""Whose copy leaked: found when guilty, almost never accused when not."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from privet.errors import (
    FileListError,
    InputError,
    LicenceError,
    ManifestError,
    OtherReleaseError,
    OutputError,
    PrivetError,
    UsageError,
    WrongLicenceError,
)
from privet.images import ImageSet, open_images, write_images
from privet.learning import Runtime
from privet.licensing import (
    CopyPlan,
    Issued,
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
    write_licence,
    write_manifest,
)
from privet.licensing.ledger import read_ledger
from privet.licensing.release import open_master
from privet.models.keyed_stem import KeyedStem
from privet.seeds import generator
from tests.images.test_write import tree
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
    (sure,) = trace(
        mark(protect(pictures(40), None), pictures(40), b"1" * 32, epsilon=8),
        protect(pictures(40), None),
        {"copy": b"1" * 32},
    )
    assert (
        sure.score > 60 and 0 < sure.false_accusation < 1e-300
    )  # not impossible: only beyond what floats hold
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
    licence = open_master(vendor, "cats-1", OURS)
    terms = replace(licence.terms, licensee=name, copy=vendor.copy_name("cats-1", name))
    write_licence(folder / name, replace(licence, terms=terms), vendor, THEIRS, work=EASY)
    return replace(licence, terms=terms)


def test_copies_of_a_release(made: World, tmp_path: Path, runtime: Runtime) -> None:
    root = tmp_path

    def plan(out: Path) -> CopyPlan:
        return CopyPlan(out=out, protected=made.folder, clean=made.root / "clean", runtime=runtime, workers=1)

    with pytest.raises(InputError, match="The ledger knows no copy of the release 'cats-2'"):
        find_leak(made.folder, made.folder, made.vendor, "cats-2", OURS)
    with pytest.raises(UsageError, match="issued with one"):
        make_copy(plan(root / "none"), made.licence, made.vendor)
    licences = {name: with_a_copy(made.vendor, name, root) for name in ("Bo", "Cy")}
    for name, licence in licences.items():
        for _ in range(2):  # again: what is there stays
            make_copy(plan(root / f"{name}-copy"), licence, made.vendor)
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
    # However the images were found: without classes, among other files, or as one file.
    files = sorted((root / "Bo-copy").rglob("*.png"))
    (root / "loose/deeper").mkdir(parents=True)
    for number, path in enumerate(files):
        shutil.copy(path, root / "loose" / ("deeper" if number % 2 else "") / f"IMG_{number}")
    (root / "loose/notes.txt").write_text("from a server")
    for leaked in (root / "loose", root / "loose/deeper", root / "loose/IMG_0"):
        who, suspect = find_leak(leaked, made.folder, made.vendor, "cats-1", OURS)[0]
        assert who == "Bo" and suspect.guilty


def with_a_ledger_of_its_own(made: World, folder: Path) -> Vendor:
    """Return the vendor with a copy of their folder, so that no other test meets its licensees."""
    shutil.copytree(made.vendor.folder, folder / "vendor")
    return replace(made.vendor, folder=folder / "vendor")


def test_copies_are_made_of_the_licensed_release_alone(
    made: World, copied: Callable[[], Path], tmp_path: Path, runtime: Runtime
) -> None:
    ours = with_a_ledger_of_its_own(made, tmp_path)

    def make(base: Path, licence: Licence, out: str, vendor: Vendor = ours) -> None:
        clean = made.root / "clean"
        plan = CopyPlan(out=tmp_path / out, protected=base, clean=clean, runtime=runtime, workers=1)
        make_copy(plan, licence, vendor)

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


def issue_to_fay(made: World, vendor: Vendor, folder: Path, runtime: Runtime, **changes: Any) -> Issued:
    """Issue a licence with a copy; `changes` are those of `issue`, or of its `CopyPlan`."""
    plan: dict[str, Any] = {"out": folder / "copy", "protected": made.folder, "clean": made.root / "clean"}
    plan |= {name: changes.pop(name) for name in list(changes) if name in ("protected", "clean")}
    if "copy" in changes:
        plan["out"] = changes.pop("copy")
    arguments: dict[str, Any] = {"licensee": "Fay", "passphrase": THEIRS, "out": folder / "Fay"}
    copy = CopyPlan(**plan, runtime=runtime, workers=1)
    return issue(vendor, "cats-1", OURS, work=EASY, copy=copy, **{**arguments, **changes})


def test_a_licence_with_a_copy_waits_for_its_base(
    made: World, copied: Callable[[], Path], tmp_path: Path, runtime: Runtime
) -> None:
    """Neither the ledger nor the licence tells of a copy that cannot be made, and the same command mended goes on."""
    base = copied().rename(tmp_path / "base")
    ours = with_a_ledger_of_its_own(made, tmp_path)
    manifest = read_manifest(base, public=ours.public)
    kept = (ours.folder / "ledger.jsonl").read_bytes()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/photo").touch()
    strangers = pictures(12)
    write_images(strangers, strangers, tmp_path / "strangers", workers=1)

    def refused(error: type[PrivetError], message: str, **changes: Any) -> None:
        with pytest.raises(error, match=message):
            issue_to_fay(made, ours, tmp_path, runtime, **{"protected": base, **changes})
        assert not (tmp_path / "Fay").exists() and not (tmp_path / "copy").exists()
        assert (ours.folder / "ledger.jsonl").read_bytes() == kept

    for wrong, error, message in (
        ({"copy": "0123456789abcdef"}, UsageError, "is a licensee's copy"),
        ({"release": "cats-2"}, OtherReleaseError, "this is 'cats-2'"),
        ({"commitments": {}}, WrongLicenceError, "commits to"),
        ({"budget": None}, UsageError, "names none that is L-infinity"),
        ({"budget": {"norm": "linf", "amount": 2}}, UsageError, "its budget was given as 2"),
    ):
        write_manifest(base, replace(manifest, **wrong), ours)  # type: ignore[arg-type]
        refused(error, message)
    write_manifest(base, manifest, ours)
    refused(InputError, "no file or folder", clean=tmp_path / "no/such/place")
    refused(
        InputError,
        "classes that the others lack",
        clean=tmp_path / "strangers",
    )
    refused(OutputError, "holds other files", copy=tmp_path / "full")
    refused(OutputError, "whose files it would be among", copy=base / "copy")
    refused(OutputError, "whose files it would be among", copy=made.root / "clean/copy")
    refused(OutputError, "which others will get", out=base / "Fay")
    refused(OutputError, "which others will get", out=tmp_path / "copy/Fay")
    issue_to_fay(made, ours, tmp_path, runtime, protected=base)
    assert (tmp_path / "Fay").exists() and len(read_ledger(ours)) == 1 + len(kept.splitlines())


def test_issued_again_it_does_what_is_left(
    made: World, tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, stages = with_a_ledger_of_its_own(made, tmp_path), list[str]()

    def again(*, stop: int | None = None, **changes: Any) -> Issued:
        """Issue, and be interrupted at the report of that number."""
        stages.clear()

        def listen(stage: str, done: int, total: int) -> None:
            stages.append(stage)
            if len(stages) == stop:
                raise KeyboardInterrupt

        return issue_to_fay(made, ours, tmp_path, runtime, progress=listen, **changes)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def entries() -> list[Any]:
        return [entry["licensee"] for entry in read_ledger(ours) if entry["licensee"] == "Fay"]

    with monkeypatch.context() as patch:
        # Not the function's, which hides its module's name.
        patch.setattr(sys.modules["privet.licensing.issue"], "write_licence", interrupt)
        with pytest.raises(KeyboardInterrupt):
            again()
    files = len(read_manifest(made.folder, public=ours.public).files)
    assert stages.count("verifying") == files  # read once
    whole, reports = tree(tmp_path / "copy"), len(stages)
    assert entries() == ["Fay"] and not (tmp_path / "Fay").exists()
    shutil.rmtree(tmp_path / "copy")
    for stop in range(1, reports + 1, 5):
        with pytest.raises(KeyboardInterrupt):
            again(stop=stop)
        assert not (tmp_path / "Fay").exists()  # last
    licence = again().licence
    verify(tmp_path / "copy", licence=licence)
    del whole["release.json"]  # which says when it was made
    assert {name: data for name, data in tree(tmp_path / "copy").items() if name in whole} == whole
    # The licence is out, and the copy was lost.
    kept = (tmp_path / "Fay").read_bytes()
    shutil.rmtree(tmp_path / "copy")
    again()
    verify(tmp_path / "copy", licence=licence)
    assert (tmp_path / "Fay").read_bytes() == kept and entries() == ["Fay"]
    for setting, value in {"licensee": "Gus", "expires": "2100-01-01", "passphrase": "another"}.items():
        with pytest.raises(OutputError, match="Fay exists, and is no licence of these terms"):
            again(stop=None, **{setting: value})
    assert entries() == ["Fay"]


def test_a_torn_line_of_the_ledger_takes_no_other_with_it(made: World, tmp_path: Path) -> None:
    ours = with_a_ledger_of_its_own(made, tmp_path)
    before = read_ledger(ours)
    with (ours.folder / "ledger.jsonl").open("ab") as file:
        file.write(b'{"release": "cats-1", "lice')
    issue(ours, "cats-1", OURS, licensee="Hal", passphrase=THEIRS, out=tmp_path / "Hal", work=EASY)
    assert [entry["licensee"] for entry in read_ledger(ours)] == [
        *(entry["licensee"] for entry in before),
        "Hal",
    ]
