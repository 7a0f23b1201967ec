from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import blobs
from tests.images.test_write import shifted

from privet.audit import Cell, Facts, Plan
from privet.audit.flags import find_flags
from privet.audit.run import Audit, Material
from privet.audit.statistics import rows
from privet.audit.verdict import judge
from privet.images import ImageSet, compare_all
from privet.learning import Learner
from privet.report import strips, summarise, write_report
from privet.report.report import render
from privet.report.strips import worst_strips


class Checker(HTMLParser):
    """Finds tags that are not closed, and anything that a page would have to fetch."""

    VOID = frozenset("meta img br link input hr path use rect line circle".split())

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and value and not value.startswith(("data:", "#")):
                self.fetched.append(value)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def audit(
    images: ImageSet | None = None,
    *,
    seeds: tuple[int, ...] = (0, 1),
    plain: float = 0.2,
    noisy: float = 0.75,
) -> Audit:
    clean = images or blobs(20, size=(16, 16))
    protected = shifted(clean, 5)
    plan = Plan(
        recoveries=("none", "jpeg-10", "grayscale", "adversarial-4"),
        architectures=("resnet8", "vgg11-w16"),
        seeds=seeds,
        learner=Learner(epochs=3),
    )

    def result(cell: Cell) -> dict[str, Any]:
        level = {"clean": 0.75, "random": noisy, "protected": plain if cell.recovery == "none" else 0.75}
        last = level[cell.data] + 0.02 * cell.seed
        line = {"loss": 1.0, "train_accuracy": 0.9}
        history = [{"epoch": epoch, "accuracy": last * epoch / 3, **line} for epoch in (1, 2, 3)]
        return {"last": last, "best": last, "best_epoch": 3, "history": history}

    results = {cell: result(cell) for cell in plan.cells()}
    table = rows(plan, results)
    facts = Facts(
        chance=0.34,
        test=300,
        paired=len(clean),
        unpaired=0,
        overlap=0,
        linf=5,
        excess=None,
        protection={"method": "<b>em</b>", "seed": 0, "settings": {"epsilon": 8, "surrogate": "resnet8"}},
    )
    flags = find_flags(plan, table, facts)
    run = {
        "privet": "0",
        "plan": plan.settings(),
        "seed": 0,
        "clean": "c" * 64,
        "protected": "p" * 64,
        "test": "t" * 64,
    }
    run.update(precision="bf16", device="cpu", versions={"torch": "2"})
    return Audit(
        plan=plan,
        material=Material(
            clean=clean,
            random=clean,
            protected=protected,
            test=clean,
            similarities=tuple(compare_all(clean.pixels, protected.pixels)),
            shown=(2, 1),
            facts=facts,
        ),
        results=results,
        table=tuple(table),
        flags=tuple(flags),
        verdict=judge(plan, table, flags, facts),
        costs={
            "none": {"seconds": 0.0, "facts": {}},
            "jpeg-10": {"seconds": 0.6, "facts": {}},
            "grayscale": {
                "seconds": None,
                "facts": {"a": {"evaluations": 4}, "evaluations": 3, "chosen": "versions"},
            },
            "adversarial-4": {"seconds": 0.0, "facts": {}},
        },
        examples={
            "jpeg-10": shifted(clean, 9).pixels[[2, 1]],
            "grayscale": torch.cat([shifted(clean, by).pixels[[2, 1]] for by in (20, 30)]),  # two versions
        },
        run=run,
    )


def test_the_page_needs_nothing_else_and_says_what_was_found(tmp_path: Path) -> None:
    path = write_report(audit(), tmp_path)
    page = path.read_text("utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.fetched == []
    assert "http" not in re.sub(
        r'xmlns(:\w+)?="[^"]+"|"https?://(www\.w3\.org|purl\.org|creativecommons\.org)[^"]*"', "", page
    )
    assert "The protection does not hold against JPEG at quality 10" in checker.text
    assert checker.text.count("which chose versions") == 1
    for words in ("best-above-last", "small-test", "Random noise of the same size is the control", "2/0002"):
        assert (words in checker.text) is (words != "best-above-last")
    assert "<b>em</b>" not in page and "&lt;b&gt;em&lt;/b&gt;" in page


def test_every_grade_can_be_seen_and_an_unknown_one_is_explained(tmp_path: Path) -> None:
    report = summarise(audit())
    for one, grade in zip(report["verdict"]["recoveries"], ("untested", "weakens"), strict=False):
        one["grade"] = grade
    page = render(report, pictures=b"", recovered=None)
    for grade in {one["grade"] for one in report["verdict"]["recoveries"]}:
        assert f".grade.{grade} {{ background: var(--" in page
    assert "Untested: the clean" in page and "Untested: the clean" not in write_report(
        audit(), tmp_path
    ).read_text("utf-8")


def test_where_a_control_failed_nothing_is_graded(tmp_path: Path) -> None:
    page = write_report(audit(noisy=0.3), tmp_path).read_text("utf-8")
    assert "No verdict: the audit&#39;s own controls failed (control-protects)." in page
    table = page[page.index("<table>") : page.index("</table>")]
    assert re.findall(r'class="grade (\w+)"', table) == ["untested"] * 4
    assert re.findall(r'<td class="number">([^<]*)</td></tr>', table) == ["–"] * 4
    assert "Untested: the audit's own controls failed" in page


def test_a_share_of_less_than_an_accuracy_is_uncertain_by_is_not_given() -> None:
    for plain, given in ((0.72, False), (0.68, True)):  # 300 test images tell 0.75 by 0.06
        (_, jpeg, *_others) = summarise(audit(plain=plain))["recoveries"]
        assert (jpeg["recovered"]["resnet8"] is not None) is given


def test_every_version_that_a_recovery_makes_is_shown(tmp_path: Path) -> None:
    found = audit()
    page = write_report(found, tmp_path).read_text()
    assert re.findall(r"<span>(original|protected|jpeg-10|grayscale[ 0-9]*)</span>", page) == [
        "original",
        "protected",
        "jpeg-10",
        "grayscale 1",
        "grayscale 2",
    ]
    (picture,) = re.findall(r'what each recovery made.*?base64,([^"]+)"', page)
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
    small = torch.from_numpy(image[::6, ::6].copy()).permute(2, 0, 1)  # 16 px are enlarged to 96
    shown = [small[:, :16, 20 * column : 20 * column + 16] for column in range(5)]
    expected = [
        found.material.clean.pixels[2],
        *(shifted(found.material.clean, by).pixels[2] for by in (5, 9, 20, 30)),
    ]
    assert all(torch.equal(one, other) for one, other in zip(shown, expected, strict=True))


def test_the_page_is_the_same_each_time(tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        write_report(audit(), tmp_path / name)
        pages.append([(tmp_path / name / file).read_bytes() for file in ("report.html", "report.json")])
    assert pages[0] == pages[1]


def test_the_json_holds_every_figure(tmp_path: Path) -> None:
    found = audit()
    write_report(found, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(json.dumps(summarise(found)))
    assert report["verdict"]["grade"] == "partly"
    assert len(report["grid"]) == 4 * 3 * 2
    row = next(row for row in report["grid"] if row["data"] == "protected" and row["recovery"] == "none")
    assert row["last"] == {
        "mean": pytest.approx(0.21),
        "sd": pytest.approx(0.01414, abs=1e-5),
        "values": [0.2, 0.22],
    }
    assert len(row["histories"]) == 2
    assert report["images"]["linf"] == 5
    plain, jpeg, grey, _adversarial = report["recoveries"]
    assert plain["recovered"] == {"resnet8": 0.0, "vgg11-w16": 0.0}
    assert jpeg["recovered"]["resnet8"] == pytest.approx(1.0)
    assert (jpeg["seconds_per_1000"], jpeg["evaluations"]) == (pytest.approx(1000 * 0.6 / 20), 0)
    assert (grey["seconds_per_1000"], grey["evaluations"]) == (None, 7)
    assert [one["versions"] for one in report["recoveries"]] == [0, 1, 2, 0]
    assert [one["chosen"] for one in report["recoveries"]] == [None, None, "versions", None]


def test_one_seed_and_small_images_have_a_page_too(tmp_path: Path) -> None:
    page = write_report(audit(blobs(3, size=(6, 8)), seeds=(0,)), tmp_path).read_text()
    assert "±" in page and "one-seed" in page and "SSIM" not in page


def test_strips_show_original_changed_and_difference() -> None:
    before = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    after = before.clone()
    after[1] += 4
    image = np.asarray(strips(before, after, magnify=10))
    factor = 12  # 8 px are enlarged to at least 96
    assert image.shape == ((8 + 4 + 8) * factor, (3 * 8 + 2 * 4) * factor, 3)
    assert image[0, 0].tolist() == [100, 100, 100]
    assert image[0, -1].tolist() == [127, 127, 127]
    assert image[-1, 12 * factor].tolist() == [104, 104, 104]
    assert image[-1, -1].tolist() == [167, 167, 167]


def test_the_worst_come_first() -> None:
    clean = blobs(5)
    pixels = clean.pixels.clone()
    for index, change in ((3, 9), (1, 5), (2, 1)):
        pixels[index] = (pixels[index].short() + change).clamp(0, 255).byte()
    image, columns, shown = worst_strips(clean, clean.with_pixels(pixels), 4)
    assert [name for name, _ in shown] == [clean.names[index] for index in (3, 1, 2, 0)]
    assert columns == ["original", "changed", "the difference, 14.1 times"]
    assert isinstance(image, Image.Image)


def test_of_versions_a_strip_shows_all() -> None:
    clean = replace(blobs(4), names=("0/a", "1/b-c", "2/b", "0/d"))
    steps = {"x": (2, 9, 2, 9), "grayscale+y-1": (4, 2, 2, 9)}
    pixels = [clean.pixels[index] // by for changes in steps.values() for index, by in enumerate(changes)]
    names = tuple(f"{name}-{version}" for version in steps for name in clean.names)
    order = torch.tensor([5, 0, 7, 6, 1, 2, 4])  # as a folder is read; "0/d-x" was skipped
    every = replace(clean.subset([0, 1, 2, 3] * 2), pixels=torch.stack(pixels), names=names)
    image, columns, shown = worst_strips(clean, every.subset(order), 2)
    assert columns == ["original", "grayscale+y-1", "x"]
    assert [name for name, _ in shown] == [
        f"{name}, {version}" for name in ("1/b-c", "0/a") for version in columns[1:]
    ]
    assert image.size == (3 * 8 * 12 + 2 * 4 * 12, (2 * 8 + 4) * 12)
    found = np.asarray(image)[::12, ::12][:8, 12:20]  # first row, second column
    assert np.array_equal(found, pixels[5].permute(1, 2, 0).numpy())


def test_the_embedded_picture_is_the_strips(tmp_path: Path) -> None:
    page = write_report(audit(), tmp_path).read_text()
    recovered, data = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == ((3 * 16 + 8) * 6, (2 * 16 + 4) * 6)
    with Image.open(io.BytesIO(base64.b64decode(recovered))) as image:
        assert image.size == ((5 * 16 + 16) * 6, (2 * 16 + 4) * 6)
        found = np.asarray(image)[::6, ::6][
            20:36, 40:56
        ]  # second row, third column: the second image after JPEG
    assert np.array_equal(found, audit().examples["jpeg-10"][1].permute(1, 2, 0).numpy())
