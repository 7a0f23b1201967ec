"""The audit of a licence: who gets which images, what the bounds say, and that it resumes to the same result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import blobs
from tests.licensing.conftest import EASY, OURS

from privet.audit import LicencePlan, Seat, audit_licence
from privet.audit import licence as module
from privet.audit.licence_plan import (
    ANOTHER_KEY,
    CLEAN,
    CLEAN_PART,
    DISTILLED,
    FILES_ALONE,
    FREEDOM,
    LEARNED,
    LICENSEE,
    MIXED,
    PLAIN,
)
from privet.audit.licence_verdict import NO, OPEN, PLAINLY, YES, judge_licence, licence_rows, who
from privet.audit.outsiders import Released, TileLayer, prepare
from privet.cli import main
from privet.errors import UsageError, WrongLicenceError
from privet.images import ImageSet, open_images, pair
from privet.learning import Job, Learner, Runtime, accuracy, learn
from privet.licensing import Licence, Vendor, protect, read_licence, release
from privet.models import SavedModel, create_model, save_model
from privet.models.keyed_stem import KeyedStem
from privet.recovery import create_recovery
from privet.report import write_licence_report
from privet.seeds import generator

KEY = bytes(range(32))
LEARNER = Learner(architecture="cnn-w4", epochs=1, batch_size=6, flip=False)
SMALL = {"surrogate": "cnn-w4", "train_steps": 2, "batch_size": 8, "max_rounds": 1}
PLAN = LicencePlan(
    architectures=("cnn-w4", "resnet10-w4"),
    seeds=(0, 1),
    tries=3,
    recoveries=("jpeg-10",),
    pairs=(6,),
    learner=LEARNER,
)


def natural(count: int, *, size: int = 16, seed: int = 0) -> ImageSet:
    """Return images that are smooth, as photographs are."""
    coarse = torch.rand(count, 3, 4, 4, generator=generator(seed, "natural"))
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    labels = torch.arange(count) % 3
    names = [f"{label}/{index:04d}" for index, label in enumerate(labels.tolist())]
    return ImageSet.from_arrays((60 + 130 * fine).to(torch.uint8), labels, names=names)


def released(*, stem: KeyedStem | None, count: int = 240) -> Released:
    clean, test = natural(count), natural(30, seed=1)
    random = generator(2, "noise")
    if stem is None:
        patterns = 8 * (torch.randint(0, 2, (3, *clean.pixels.shape[1:]), generator=random) * 2 - 1)
        protected = clean.with_pixels((clean.pixels.int() + patterns[clean.labels]).to(torch.uint8))
    else:
        wanted = 30 * torch.randn(clean.pixels.shape, generator=random)
        delta = stem.project(wanted, clean.pixels, epsilon=8)
        protected = clean.with_pixels((clean.pixels + delta).to(torch.uint8))
    return Released(
        clean=clean,
        protected=protected,
        test=test,
        unlocked=clean,
        presented=test,
        asked=protected,
        stem=stem,
        lock=stem is None,
        prior=None,
    )


def energy(images: ImageSet, clean: ImageSet) -> float:
    return float((images.pixels.float() - clean.pixels.float()).square().mean())


@pytest.fixture(scope="module")
def stem() -> KeyedStem:
    return KeyedStem.from_key(KEY, group=4, tile=4)


class TestOutsiders:
    def test_pairs_take_a_lock_off(self, runtime: Runtime) -> None:
        found = released(stem=None)
        images, test = prepare("pairs 6", found, architecture="cnn-w4", share=0.1, runtime=runtime)
        assert torch.equal(images.pixels, found.clean.pixels) and test is found.test
        one, _ = prepare(
            "pairs 1", found, architecture="cnn-w4", share=0.1, runtime=runtime
        )  # of the class 0 alone
        same = (one.pixels == found.clean.pixels).flatten(1).all(1)
        assert torch.equal(same, found.clean.labels == 0)

    def test_the_files_alone_give_most_of_a_lock_away(self, runtime: Runtime) -> None:
        found = released(stem=None)
        images, _ = prepare(FILES_ALONE, found, architecture="cnn-w4", share=0.1, runtime=runtime)
        assert energy(images, found.clean) < 0.2 * energy(found.protected, found.clean)

    def test_pairs_span_what_a_stem_takes(self, runtime: Runtime, stem: KeyedStem) -> None:
        found = released(stem=stem)
        images, _ = prepare("pairs 60", found, architecture="cnn-w4", share=0.1, runtime=runtime)
        moved = stem.amplitude(images.pixels.float() - 127.5)
        assert float(moved.abs().mean()) < 0.1 * float(
            stem.amplitude(found.protected.pixels.float() - 127.5).abs().mean()
        )

    def test_the_files_alone_point_at_a_stem(self, runtime: Runtime, stem: KeyedStem) -> None:
        found = released(stem=stem)
        images, _ = prepare(FILES_ALONE, found, architecture="cnn-w4", share=0.1, runtime=runtime)
        before, after = (
            float(stem.amplitude(one.pixels.float() - 127.5).square().mean())
            for one in (found.protected, images)
        )
        assert after < 0.3 * before

    def test_another_key_is_another_stem_of_the_design(self, runtime: Runtime, stem: KeyedStem) -> None:
        found = released(stem=stem)
        images, test = prepare(ANOTHER_KEY, found, architecture="cnn-w4", share=0.1, runtime=runtime)
        assert not torch.equal(stem.apply_to(images.pixels), stem.apply_to(found.clean.pixels))
        assert not torch.equal(test.pixels, found.test.pixels)
        grey = KeyedStem.from_key(KEY, group=4, tile=4, grey=True)
        images, _ = prepare(
            ANOTHER_KEY, released(stem=grey), architecture="cnn-w4", share=0.1, runtime=runtime
        )
        assert not torch.equal(images.pixels, found.protected.pixels)

    def test_a_tile_as_large_as_the_image_is_looked_for_too(self, runtime: Runtime) -> None:
        found = released(stem=KeyedStem.from_key(KEY, group=4, tile=16), count=30)
        images, _ = prepare(FILES_ALONE, found, architecture="cnn-w4", share=0.1, runtime=runtime)
        assert not torch.equal(images.pixels, found.protected.pixels)

    def test_a_layer_can_be_learned_in_the_place_of_the_stem(self, runtime: Runtime, stem: KeyedStem) -> None:
        found = released(stem=stem, count=30)
        images, test = prepare(LEARNED, found, architecture="cnn-w4", share=0.1, runtime=runtime)
        for one, before in ((images, found.protected), (test, found.test)):
            change = (one.pixels.float() - before.pixels.float()).abs()
            assert 0 < float(change.mean()) < 60  # it begins at the identity, and moves
        layer, x = TileLayer(5), torch.rand(2, 3, 12, 16)
        assert torch.equal(layer(x), x)  # which no tile of 5 fits
        again, _ = prepare(LEARNED, found, architecture="cnn-w4", share=0.1, runtime=runtime)
        assert torch.equal(images.pixels, again.pixels)

    def test_a_part_of_the_originals(self, runtime: Runtime) -> None:
        found = released(stem=None)
        alone, _ = prepare(CLEAN_PART, found, architecture="cnn-w4", share=0.25, runtime=runtime)
        mixed, _ = prepare(MIXED, found, architecture="cnn-w4", share=0.25, runtime=runtime)
        assert len(alone) == 60 and set(alone.names) <= set(found.clean.names)
        same = (mixed.pixels == found.clean.pixels).flatten(1).all(1)
        assert {name for name, one in zip(mixed.names, same, strict=True) if one} == set(alone.names)
        assert torch.equal(mixed.pixels[~same], found.protected.pixels[~same])

    def test_who_has_nothing_trains_on_the_files(self, runtime: Runtime) -> None:
        found = released(stem=None)
        for name in (PLAIN, DISTILLED):
            assert prepare(name, found, architecture="cnn-w4", share=0.1, runtime=runtime) == (
                found.protected,
                found.test,
            )
        assert prepare(CLEAN, found, architecture="cnn-w4", share=0.1, runtime=runtime) == (
            found.clean,
            found.test,
        )
        assert prepare(LICENSEE, found, architecture="cnn-w4", share=0.1, runtime=runtime) == (
            found.unlocked,
            found.presented,
        )
        grey, shown = prepare("recovery grayscale", found, architecture="cnn-w4", share=0.1, runtime=runtime)
        for one in (grey, shown):
            assert torch.equal(one.pixels[:, 0], one.pixels[:, 2])


def results(**last: tuple[float, float]) -> dict[Seat, dict[str, Any]]:
    """Return learners: (last, best) by "who/architecture", for two seeds."""
    return {
        Seat(who=name.partition("/")[0], architecture=name.partition("/")[2], seed=seed): {
            "last": values[0] + 0.001 * seed,
            "best": values[1] + 0.001 * seed,
        }
        for name, values in last.items()
        for seed in (0, 1)
    }


GOOD = {
    f"{CLEAN}/cnn-w4": (0.70, 0.71),
    f"{CLEAN}/resnet10-w4": (0.60, 0.61),
    f"{LICENSEE}/cnn-w4": (0.69, 0.70),
    f"{PLAIN}/cnn-w4": (0.20, 0.39),
    f"{PLAIN}/resnet10-w4": (0.20, 0.29),
    f"{MIXED}/cnn-w4": (0.60, 0.60),
    "recovery jpeg-10/cnn-w4": (0.30, 0.35),
}


class TestVerdict:
    def judge(self, plan: LicencePlan = PLAN, chance: float = 0.1, **changes: tuple[float, float]) -> Any:
        return judge_licence(plan, licence_rows(results(**{**GOOD, **changes})), chance=chance)

    def test_within_all_bounds(self) -> None:
        verdict = self.judge()
        assert verdict.grade == YES and not verdict.reasons
        assert verdict.hacker == pytest.approx(0.391) and verdict.strongest == PLAIN
        assert (verdict.clean, verdict.licensee) == (pytest.approx(0.7005), pytest.approx(0.6905))

    def test_the_luckiest_seed_counts(self) -> None:
        lucky = results(**GOOD)
        lucky[Seat(who=PLAIN, architecture="cnn-w4", seed=1)]["best"] = 0.41
        assert judge_licence(PLAN, licence_rows(lucky), chance=0.1).grade == NO

    def test_a_strong_outsider(self) -> None:
        also = {"files alone/cnn-w4": (0.40, 0.402)}
        verdict = self.judge(**also, **{"recovery jpeg-10/cnn-w4": (0.30, 0.405)})
        assert len(verdict.reasons) == 2
        assert (
            verdict.grade == PLAINLY
            and "who tries JPEG at quality 10 reaches 40.6% at best" in verdict.headline
        )
        assert verdict.strongest == "recovery jpeg-10"

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({f"{LICENSEE}/cnn-w4": (0.679, 0.70)}, "the licensee loses 2.1 points"),
            ({f"{PLAIN}/cnn-w4": (0.20, 0.405)}, r"as they are reach 40.6% at best \(cnn-w4\)"),
            (
                {f"{PLAIN}/resnet10-w4": (0.20, 0.305)},
                r"as they are reach 30.6% at best \(resnet10-w4\), where clean files give 60",
            ),
        ],
    )
    def test_not_even_against_plain_training(
        self, changed: dict[str, tuple[float, float]], words: str
    ) -> None:
        import re

        verdict = self.judge(**changed)
        assert verdict.grade == NO and re.search(words, verdict.headline)

    def test_too_little_was_tried_or_taught(self) -> None:
        assert self.judge(plan=replace(PLAN, seeds=(0,))).grade == OPEN
        assert self.judge(plan=replace(PLAN, architectures=("cnn-w4",))).grade == OPEN
        verdict = self.judge(chance=0.35)
        assert verdict.grade == OPEN and "resnet10-w4 learns too little from clean files" in verdict.headline

    def test_whoever_has_a_part_of_the_originals_is_not_judged(self) -> None:
        assert (
            self.judge(**{f"{MIXED}/cnn-w4": (0.70, 0.70), f"{CLEAN_PART}/cnn-w4": (0.65, 0.65)}).grade == YES
        )


class TestPlan:
    def test_everybody_has_a_seat(self) -> None:
        seats = PLAN.seats(stem=True, lock=False, weights=False)
        assert len(set(seats)) == len(seats)
        assert sum(one.who == PLAIN and one.architecture == "cnn-w4" for one in seats) == 3
        assert {one.who for one in seats} == {
            CLEAN, LICENSEE, PLAIN, "recovery jpeg-10", ANOTHER_KEY, LEARNED, FILES_ALONE, "pairs 6",
            CLEAN_PART, MIXED, DISTILLED,
        }  # fmt: skip
        assert all(who(one.who) for one in seats) and seats[-1].who == DISTILLED
        fewer = {one.who for one in PLAN.seats(stem=False, lock=False, weights=True)}
        assert not fewer & {ANOTHER_KEY, LEARNED, FILES_ALONE, "pairs 6"}
        of_weights = [one for one in PLAN.seats(stem=False, lock=False, weights=True) if one.who == LICENSEE]
        assert {one.architecture for one in of_weights} == {"cnn-w4"}

    def test_freedom_changes_the_learner(self) -> None:
        made = [
            PLAN.learner_of(Seat(who=LICENSEE, architecture="cnn-w4", seed=0, freedom=freedom), weights=None)
            for freedom in FREEDOM
        ]
        assert len({str(one) for one in made}) == len(made)
        assert (
            made[1].optimiser == "adamw" and made[2].learning_rate == pytest.approx(0.01) and made[3].distort
        )
        recipe = replace(LEARNER, architecture="vit", learning_rate=None)
        other = replace(PLAN, architectures=("vit",), learner=recipe)
        slow = Seat(who=LICENSEE, architecture="vit", seed=0, freedom="a tenth of the rate")
        assert other.learner_of(slow, weights=None).learning_rate == pytest.approx(
            1e-4
        )  # of AdamW's usual 0.001
        fast = replace(PLAN, learner=replace(LEARNER, learning_rate=0.1))
        free = Seat(who=LICENSEE, architecture="cnn-w4", seed=0, freedom="adamw")
        assert fast.learner_of(free, weights=None).rate == pytest.approx(1e-3)  # 0.1 is meant for SGD
        path = Path("weights.safetensors")
        assert (
            PLAN.learner_of(Seat(who=LICENSEE, architecture="cnn-w4", seed=0), weights=path).weights == path
        )
        assert PLAN.learner_of(Seat(who=PLAIN, architecture="cnn-w4", seed=0), weights=path).weights is None
        adversarial = Seat(who="recovery adversarial-4", architecture="cnn-w4", seed=0)
        assert PLAN.learner_of(adversarial, weights=None).radius == 4

    def test_impossible_plans_are_refused(self) -> None:
        with pytest.raises(
            UsageError, match="first architecture must be the recipe's, cnn-w4; got resnet10-w4"
        ):
            replace(PLAN, architectures=("resnet10-w4", "cnn-w4"))
        for changes in ({"tries": 0}, {"pairs": (0,)}, {"share": 1.0}):
            with pytest.raises(UsageError, match="at least one try"):
                replace(PLAN, **changes)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="at least one seed"):
            replace(PLAN, seeds=())
        blind = replace(LEARNER, architecture="simclr:cnn-w4")
        with pytest.raises(UsageError, match="must learn with labels; got simclr:cnn-w4"):
            replace(PLAN, architectures=("simclr:cnn-w4",), learner=blind)
        with pytest.raises(UsageError):
            replace(PLAN, recoveries=("nonsense",))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Licence]:
    """Return a folder with originals and a locked release, and its licence."""
    from privet.images import write_images

    root = tmp_path_factory.mktemp("world")
    clean = blobs(18)
    write_images(clean, clean, root / "clean", workers=1)
    vendor = Vendor.create(root / "vendor", OURS, work=EASY)
    runtime = Runtime(device=torch.device("cpu"), precision="float32")
    protect(
        open_images(root / "clean"), vendor, "cats", root / "cats", method="lock", preset="cpu", settings=SMALL,
        runtime=runtime,
    )  # fmt: skip
    told = {"architecture": "cnn-w4", "epochs": 1, "batch_size": 6, "flip": False}
    network = create_model("cnn-w4", classes=3, size=(8, 8), seed=5)
    about = SavedModel(architecture="cnn-w4", class_names=clean.class_names, size=(8, 8))
    save_model(root / "initial.safetensors", network, about)
    release(
        root / "cats", vendor, "cats", OURS, clean=root / "clean", weights=root / "initial.safetensors", recipe=told,
        work=EASY,
    )  # fmt: skip
    return root, read_licence(root / "vendor/cats.licence", OURS)


SHORT = replace(PLAN, tries=1, seeds=(0, 1), architectures=("cnn-w4", "resnet10-w4"))


class TestRun:
    def run(self, world: tuple[Path, Licence], out: Path, runtime: Runtime, **changes: Any) -> Any:
        root, licence = world
        given = {"plan": SHORT, "licence": licence, **changes}
        return audit_licence(
            root / "cats", clean=root / "clean", test=root / "clean", out=out, runtime=runtime, **given
        )

    def test_it_goes_on_after_a_kill_and_ends_with_the_same(
        self, world: tuple[Path, Licence], tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = self.run(world, tmp_path / "whole", runtime)
        calls = 0

        def stop(*given: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 6:
                raise KeyboardInterrupt
            return learn(*given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(module, "learn", stop)
            with pytest.raises(KeyboardInterrupt):
                self.run(world, tmp_path / "parts", runtime)
        assert len((tmp_path / "parts/cells.jsonl").read_text().splitlines()) == 6
        again = self.run(world, tmp_path / "parts", runtime, workers=2)
        assert again.results == whole.results and again.verdict == whole.verdict
        assert self.run(world, tmp_path / "parts", runtime).results == whole.results  # nothing is left to do
        assert not list(tmp_path.rglob("*.safetensors"))

    def test_everybody_gets_their_own_images_and_weights(
        self, world: tuple[Path, Licence], tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root, licence = world
        seen: dict[bytes, list[tuple[Learner, bool]]] = {}

        def watch(train: ImageSet, test: ImageSet, learner: Learner, **given: Any) -> Any:
            key = train.pixels.numpy().tobytes()
            seen.setdefault(key, []).append((learner, given["answers"] is not None))
            return learn(train, test, learner, **given)

        monkeypatch.setattr(module, "learn", watch)
        plan = replace(SHORT, recoveries=("versions",), learner=replace(LEARNER, epochs=2))
        found = self.run(world, tmp_path / "run", runtime, plan=plan)
        _, opened = pair(open_images(root / "clean"), open_images(root / "cats"))
        versions = create_recovery("versions").recover(opened, Job(runtime=runtime))
        assert [learner.epochs for learner, _ in seen[versions.pixels.numpy().tobytes()]] == [1, 1]
        plain = seen[opened.pixels.numpy().tobytes()]
        assert {(learner.epochs, imitates) for learner, imitates in plain} == {(2, True), (2, False)}
        unlocked = seen[licence.unlock(opened).pixels.numpy().tobytes()]
        assert sum(learner.weights is not None for learner, _ in unlocked) == 2 + 3
        assert all(learner.weights is None for learner, _ in plain)
        assert found.facts["holds"] == ["lock", "weights"] and found.facts["unlocked"]["values"] < 0.1

    def test_what_cannot_work_is_refused_before_anything_is_written(
        self, world: tuple[Path, Licence], tmp_path: Path, runtime: Runtime
    ) -> None:
        _, licence = world
        tensors = {**licence.tensors, "lock/0": licence.tensors["lock/0"] + 1}
        with pytest.raises(UsageError, match="lenet needs images of at least 16 px"):
            self.run(world, tmp_path / "run", runtime, plan=replace(SHORT, architectures=("cnn-w4", "lenet")))
        assert not (tmp_path / "run").exists()
        with pytest.raises(WrongLicenceError):
            self.run(world, tmp_path / "run", runtime, licence=replace(licence, tensors=tensors))
        strange = replace(licence, terms=replace(licence.terms, recipe={"colour": 1}))
        with pytest.raises(WrongLicenceError, match="not one that this privet knows"):
            strange.learner()

    def test_the_page_and_the_command(
        self,
        world: tuple[Path, Licence],
        tmp_path: Path,
        runtime: Runtime,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        root, _ = world
        (tmp_path / "words").write_text(OURS + "\n")
        arguments = ["audit", "licence", root / "cats", "--licence", root / "vendor/cats.licence"]
        arguments += ["--clean", root / "clean", "--test", root / "clean", "--out", tmp_path / "run"]
        arguments += [
            "--passphrase-file",
            tmp_path / "words",
            "--architectures",
            "resnet10-w4",
            "--seeds",
            "2",
        ]
        arguments += ["--tries", "1", "--recoveries", "jpeg-10", "--pairs", "6", "--workers", "1"]
        arguments += ["--precision", "float32", "--device", "cpu"]
        assert main([str(one) for one in arguments]) == 0
        assert "Report:" in capsys.readouterr().out
        report = json.loads((tmp_path / "run/report.json").read_text())
        again = self.run(world, tmp_path / "python", runtime)
        assert write_licence_report(again, tmp_path / "python")["rows"] == report["rows"]
        page = (tmp_path / "run/report.html").read_text()
        assert report["verdict"]["headline"] in page and 'src="http' not in page
        assert "the licensee" in page and "distorted views" in page


def test_a_distilled_learner_imitates(runtime: Runtime) -> None:
    images = blobs(24)
    turned = images.labels.add(1) % 3
    answers = 20 * torch.nn.functional.one_hot(turned, 3).float()
    learner = Learner(architecture="cnn-w4", epochs=30, batch_size=8, flip=False)
    others = replace(images, labels=turned)
    taught = learn(images, images, learner, runtime=runtime, answers=answers).model
    assert accuracy(taught, others, runtime=runtime) > 0.6 > 0.4 > accuracy(taught, images, runtime=runtime)
    alone = learn(images, images, learner, runtime=runtime).model
    assert accuracy(alone, images, runtime=runtime) > 0.6
    with pytest.raises(UsageError, match=r"Expected answers \(24, 3\)"):
        learn(images, images, learner, runtime=runtime, answers=answers[:5])


def test_an_optimiser_can_be_chosen(runtime: Runtime) -> None:
    images = blobs(12)
    learner = Learner(architecture="cnn-w4", epochs=1, batch_size=6)
    one, other = (
        learn(images, images, replace(learner, optimiser=name, learning_rate=0.01), runtime=runtime)
        for name in ("sgd", "adamw")
    )
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    with pytest.raises(UsageError, match="Unknown optimiser 'lion'"):
        replace(learner, optimiser="lion")
    with pytest.raises(UsageError, match="leave the optimiser out"):
        Learner(architecture="simclr:cnn-w4", optimiser="adamw")
