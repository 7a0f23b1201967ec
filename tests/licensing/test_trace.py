"""Whose copy leaked: found when guilty, almost never accused when not."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from privet.errors import LicenceError, UsageError
from privet.images import ImageSet, open_images
from privet.learning import Runtime
from privet.licensing import Suspect, find_leak, issue, make_copy, mark, trace, verify
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


def test_copies_of_a_release(made: World, tmp_path: Path, runtime: Runtime) -> None:
    root = tmp_path
    with pytest.raises(LicenceError, match="The ledger knows no copy of the release 'cats-2'"):
        find_leak(made.folder, made.folder, made.vendor, "cats-2", OURS)
    with pytest.raises(UsageError, match="issued with one"):
        make_copy(made.folder, made.root / "clean", made.licence, made.vendor, root / "none", runtime=runtime)
    licences = {
        name: issue(
            made.vendor,
            "cats-1",
            OURS,
            licensee=name,
            passphrase=THEIRS,
            out=root / name,
            copied=True,
            work=EASY,
        )
        for name in ("Bo", "Cy")
    }
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
