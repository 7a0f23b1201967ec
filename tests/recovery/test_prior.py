"""The prior, and the recoveries that denoise with it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import blobs, stop_after
from tests.images.test_write import tree
from torch import Tensor

from privet.cli import main
from privet.errors import InputError, UsageError
from privet.images import ImageSet, compare_all, open_images
from privet.learning import Job, Runtime
from privet.learning.runtime import use_threads
from privet.recovery import (
    AVATAR,
    JCDP,
    PriorTraining,
    Purify,
    create_recovery,
    load_prior,
    needs_prior,
    noise_error,
    restore,
    train_prior,
)
from privet.recovery.diffusion import DiffusionRecovery, ImageNoise, renoise, to_pixels, to_unit, walk_back
from privet.recovery.perceptual import features, perceptual_gradient
from privet.recovery.prior import SCHEDULING, Prior, fingerprints
from privet.recovery.prior_training import SCALES

pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")

TRAINING = PriorTraining(scale="tiny", steps=6, batch_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prior") / "prior"
    runtime = Runtime(device=torch.device("cpu"), precision="float32")
    train_prior(blobs(16, seed=5), TRAINING, out, runtime=runtime)
    return out


class Exact(torch.nn.Module):
    """Knows the image, and so the noise."""

    def __init__(self, image: Tensor, kept: Tensor) -> None:
        super().__init__()
        self.image, self.kept = image, kept
        self.calls = 0

    class config:  # noqa: N801 - as diffusers has it
        block_out_channels = (1,)
        down_block_types = up_block_types = ("Block",)
        sample_size = None

    def forward(self, noisy: Tensor, time: int) -> object:
        self.calls += 1
        kept = self.kept[time]

        class Answer:
            sample = (noisy - kept.sqrt() * self.image) / (1 - kept).sqrt()

        return Answer


def exact(image: Tensor) -> Prior:
    kept = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    return Prior(model=Exact(image, kept), kept=kept, max_t=1000, about={})


def test_the_schedule_is_that_of_the_paper(folder: Path, runtime: Runtime) -> None:
    prior = load_prior(folder, runtime=runtime)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert torch.allclose(prior.kept.double(), (1 - beta).cumprod(0), rtol=1e-4)
    assert prior.max_t == 250
    assert prior.images == frozenset().union(*fingerprints(blobs(16, seed=5)))


def test_images_are_known_again_by_their_pixels_and_by_their_files(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(blobs(3))
    here, smaller, arrays = open_images(folder), open_images(folder, size=4), blobs(3)
    order = [arrays.names.index(name) for name in here.names]
    for marks, small, bare in zip(
        fingerprints(here), fingerprints(smaller), (fingerprints(arrays)[n] for n in order), strict=True
    ):
        assert len(marks & small) == len(marks & bare) == 1
        assert not small & bare
    assert fingerprints(here)[0].isdisjoint(fingerprints(here)[1])


def test_diffusers_reads_what_is_written(folder: Path, runtime: Runtime) -> None:
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(str(folder))
    ours = load_prior(folder, runtime=runtime)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipeline.unet(x, 7).sample
    assert torch.allclose(ours.noise(x, 7, runtime=runtime), expected, atol=1e-5)
    assert torch.allclose(pipeline.scheduler.alphas_cumprod, ours.kept)


def test_the_network_is_described_in_the_same_bytes_by_every_process(folder: Path) -> None:
    config = json.loads((folder / "unet/config.json").read_text())
    assert config["_class_name"] == "UNet2DModel" and config["block_out_channels"] == [16, 32, 64]
    assert "_use_default_values" not in config  # a set of diffusers', listed as strings hash


def test_training_lowers_the_loss(runtime: Runtime, tmp_path: Path) -> None:
    losses = [
        train_prior(
            blobs(16),
            PriorTraining(scale="tiny", steps=steps, batch_size=16, decay=0.9, learning_rate=0.02),
            tmp_path / str(steps),
            runtime=runtime,
        ).about["loss"]
        for steps in (1, 80)
    ]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_killed_training_ends_with_the_same_bytes(
    dropout: float, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCALES, "tiny", SCALES["tiny"] | {"dropout": dropout})
    torch.manual_seed(len(str(tmp_path)))  # whatever was drawn before
    train_prior(blobs(16), TRAINING, tmp_path / "whole", runtime=runtime, checkpoint_seconds=0)
    for reports in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            train_prior(
                blobs(16),
                TRAINING,
                tmp_path / "parts",
                runtime=runtime,
                checkpoint_seconds=0,
                progress=stop_after(reports),
            )
    train_prior(blobs(16), TRAINING, tmp_path / "parts", runtime=runtime, checkpoint_seconds=0)
    whole, parts = (
        {name: data for name, data in tree(tmp_path / name_).items() if name != "loss.jsonl"}
        for name_ in ("whole", "parts")
    )
    assert parts == whole
    assert "unet/diffusion_pytorch_model.safetensors" in whole and "denoised.png" in whole


def test_large_images_are_learned_in_crops(runtime: Runtime, tmp_path: Path) -> None:
    images = blobs(4, size=(70, 90))
    prior = train_prior(
        images, PriorTraining(scale="tiny", steps=1, batch_size=2), tmp_path / "out", runtime=runtime
    )
    assert prior.about["crop"] == 64
    whole = prior.clean(to_unit(images.pixels, runtime.device), 20, runtime=runtime)
    assert whole.shape == (4, 3, 70, 90)  # 70 is no multiple of what the network halves


def test_walking_back_with_an_exact_prior_finds_the_image(runtime: Runtime) -> None:
    images = blobs(3)
    x = to_unit(images.pixels, runtime.device)
    prior = exact(x)
    noise = ImageNoise(images.pixels, 0, runtime.device)
    noisy = renoise(x, noise(), float(prior.kept[50]))
    found = walk_back(prior, noisy, 50, noise=noise, runtime=runtime)
    assert torch.equal(to_pixels(found), images.pixels)
    assert prior.model.calls == 50


def test_steps_back_are_those_of_diffusers(folder: Path, runtime: Runtime) -> None:
    from diffusers import DDPMScheduler

    prior = load_prior(folder, runtime=runtime)
    noisy = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.3
    ours, theirs = (torch.Generator().manual_seed(2) for _ in range(2))
    found = walk_back(
        prior, noisy, 30, noise=lambda: torch.randn(noisy.shape, generator=ours), runtime=runtime
    )
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type="fixed_large")
    expected = noisy
    for time in range(29, -1, -1):
        predicted = prior.noise(expected, time, runtime=runtime)
        expected = scheduler.step(predicted, time, expected, generator=theirs).prev_sample
    assert torch.allclose(found, expected, atol=1e-4)


def test_noise_belongs_to_the_image(runtime: Runtime) -> None:
    pixels = blobs(5).pixels
    whole = ImageNoise(pixels, 0, runtime.device)
    part = ImageNoise(pixels[[3, 1]], 0, runtime.device)
    other = ImageNoise(pixels, 1, runtime.device)
    for _ in range(2):
        drawn = whole()
        assert torch.equal(part(), drawn[[3, 1]])
        assert not torch.equal(other(), drawn)
    assert abs(float(drawn.mean())) < 0.1 and float(drawn.std()) == pytest.approx(1, abs=0.1)


METHODS: dict[str, tuple[type[DiffusionRecovery], dict[str, object], int]] = {
    "purify": (Purify, {}, 4),
    "jcdp": (JCDP, {"rounds": 2, "time": 13}, 26),
    "avatar": (AVATAR, {"time": 12}, 12),
}


@pytest.mark.parametrize("name", METHODS)
class TestEvery:
    def test_it_is_found_by_name_and_needs_a_prior(self, name: str, folder: Path, runtime: Runtime) -> None:
        method, _, _ = METHODS[name]
        assert create_recovery(name, prior="somewhere") == method(prior="somewhere")
        with pytest.raises(UsageError, match=f"{name} needs a prior: train one"):
            create_recovery(name)

    def test_results_do_not_depend_on_what_else_is_recovered(
        self, name: str, folder: Path, runtime: Runtime
    ) -> None:
        method, settings, evaluations = METHODS[name]
        recovery = method(prior=str(folder), **settings)  # type: ignore[arg-type]
        images = blobs(7)
        job = Job(runtime=runtime)
        whole = recovery.recover(images, job).pixels
        assert job.facts == {"evaluations": evaluations}
        assert not torch.equal(whole, images.pixels)
        part = recovery.recover(images.subset([5, 2]), Job(runtime=runtime)).pixels
        assert int((part.short() - whole[[5, 2]].short()).abs().max()) <= 1  # a last bit of float32
        other = recovery.recover(images, Job(runtime=runtime, seed=1)).pixels
        assert not torch.equal(other, whole)

    def test_interrupted_it_ends_with_the_same_bytes(
        self, name: str, folder: Path, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("privet.recovery.diffusion.PIECE", 3)
        method, settings, _ = METHODS[name]
        recovery = method(prior=str(folder), **settings)  # type: ignore[arg-type]
        images = blobs(8)
        restore(images, recovery, tmp_path / "whole", runtime=runtime, checkpoint_seconds=0)
        for reports in (1, 2, 5):
            with pytest.raises(KeyboardInterrupt):
                restore(
                    images,
                    recovery,
                    tmp_path / "parts",
                    runtime=runtime,
                    checkpoint_seconds=0,
                    progress=stop_after(reports),
                )
        restore(images, recovery, tmp_path / "parts", runtime=runtime, checkpoint_seconds=0)
        assert tree(tmp_path / "parts") == tree(tmp_path / "whole")

    def test_times_the_prior_never_saw_are_refused(self, name: str, folder: Path, runtime: Runtime) -> None:
        method, _, _ = METHODS[name]
        late = {"levels": (300, 20)} if name == "purify" else {"time": 300}
        with pytest.raises(
            UsageError,
            match=r"times below 250, and is asked for 300. Recover with a --method that noises images less \(jcdp, "
            r"purify-gently\), or train a prior with --max-t 301",
        ):
            method(prior=str(folder), **late).recover(blobs(2), Job(runtime=runtime))  # type: ignore[arg-type]


def test_purify_with_an_exact_prior_gives_the_clean_image(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = blobs(4)
    protected = clean.with_pixels(clean.pixels + 8)
    prior = exact(to_unit(clean.pixels, runtime.device))
    monkeypatch.setattr("privet.recovery.diffusion.load_prior", lambda *_, **__: prior)
    monkeypatch.setattr("privet.recovery.diffusion.weigh", lambda _: 1)
    job = Job(runtime=runtime)
    assert torch.equal(Purify(prior="x").recover(protected, job).pixels, clean.pixels)
    assert prior.model.calls == 4
    near = Purify(prior="x", ball=3).recover(protected, job).pixels
    assert int((protected.pixels.short() - near.short()).unique()) == 3
    pulled = Purify(prior="x", pull=0.5).recover(protected, job).pixels
    assert sorted((protected.pixels.short() - pulled.short()).unique().tolist()) == [4]


def test_a_round_of_purify_goes_down_as_diffusers_ddim_does(folder: Path, runtime: Runtime) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=True)
    prior, images = load_prior(folder, runtime=runtime), blobs(2)
    levels = (120, 80, 30)
    found = Purify(prior=str(folder), levels=levels, rounds=1).recover(images, Job(runtime=runtime)).pixels
    x = to_unit(images.pixels, runtime.device)
    noise = ImageNoise(images.pixels, 0, runtime.device)
    noisy = scheduler.add_noise(x, noise(), torch.tensor(levels[0]))
    for level, after in zip(levels, (*levels[1:], 0), strict=True):
        # The scheduler steps evenly, so it is told how far each of ours goes.
        scheduler.num_inference_steps = 1000 // (level - after)
        predicted = prior.noise(noisy, level, runtime=runtime)
        step = scheduler.step(predicted, level, noisy, use_clipped_model_output=True)
        noisy = step.prev_sample
    assert int((found.short() - to_pixels(step.pred_original_sample).short()).abs().max()) <= 1


@pytest.mark.parametrize(
    "settings", [{"levels": ()}, {"levels": (30, 60)}, {"levels": (60, 60)}, {"rounds": 0}]
)
def test_rounds_that_do_not_go_down_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="purify needs"):
        Purify(prior="x", **settings)


def test_the_rounds_of_purify_are_in_its_name(folder: Path, runtime: Runtime) -> None:
    for name, rounds in (("purify-1", 1), ("purify", 2), ("purify-3", 3), ("purify-gently", 4)):
        recovery = create_recovery(name, prior=str(folder))
        assert (recovery.name, needs_prior(f"{name}+grayscale")) == (name, True)
        job = Job(runtime=runtime)
        recovery.recover(blobs(2), job)
        assert job.facts == {"evaluations": 2 * rounds}
    for name in ("purify-0", "purify-", "jcdp-2", "purify-x"):
        with pytest.raises(UsageError, match="Unknown recovery"):
            create_recovery(name, prior="x")


def test_the_pull_of_jcdp_is_that_of_its_batch(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The squared error's shift, written out for a batch of 500 as released."""
    images = blobs(2)
    x = to_unit(images.pixels, runtime.device)
    method = JCDP(prior="x")
    prior = exact(x)
    guide = method._guide(prior, x, ImageNoise(images.pixels, 0, runtime.device), Job(runtime=runtime))
    again = ImageNoise(images.pixels, 0, runtime.device)
    noisy, time = x + 0.3, 15
    kept = float(prior.kept[time])
    leaf = noisy.repeat(250, 1, 1, 1).requires_grad_()
    anchor = renoise(x, again(), kept).repeat(250, 1, 1, 1)
    (gradient,) = torch.autograd.grad(torch.nn.functional.mse_loss(leaf, anchor), leaf)
    scale = math.sqrt((1 - kept) / kept) * 3 * 70000 / (2 * 8 / 255)
    assert torch.allclose(guide(noisy, time), -scale * gradient[:2], rtol=1e-4)


def test_the_perceptual_gradient_leads_to_the_image(folder: Path, runtime: Runtime) -> None:
    prior, job = load_prior(folder, runtime=runtime), Job(runtime=runtime)
    images = blobs(3)
    one = to_unit(images.pixels, runtime.device)
    other = to_unit(images.pixels.roll(2, 3), runtime.device)
    gradient = perceptual_gradient(prior.model, one, other, job)
    assert torch.equal(perceptual_gradient(prior.model, one, one, job), torch.zeros_like(one))

    def distance(x: Tensor) -> float:
        with torch.no_grad():
            pairs = zip(features(prior.model, x, job), features(prior.model, other, job), strict=True)
            unit = torch.nn.functional.normalize
            return sum(
                float((unit(a, dim=1) - unit(b, dim=1)).square().sum(1).mean((1, 2)).sum()) for a, b in pairs
            )

    step = 1e-3 / float(gradient.norm())
    slope = (distance(one + step * gradient) - distance(one - step * gradient)) / (2e-3)
    assert slope == pytest.approx(float(gradient.norm()), rel=0.05)


def test_the_perceptual_step_is_a_share_of_the_way_to_the_image(folder: Path, runtime: Runtime) -> None:
    prior, job = load_prior(folder, runtime=runtime), Job(runtime=runtime)
    images = blobs(3)
    one, x = (to_unit(pixels, runtime.device) for pixels in (images.pixels.roll(2, 3), images.pixels))
    step = Purify(prior="x", perceptual=0.1)._downhill(prior, one, x, job)
    gradient = perceptual_gradient(prior.model, one, x, job)
    for made, slope, way in zip(step, gradient, x - one, strict=True):
        assert float(made.norm()) == pytest.approx(float(way.norm()), rel=1e-4)
        assert float((made * slope).sum()) == pytest.approx(float(made.norm() * slope.norm()), rel=1e-3)
    assert torch.equal(Purify(prior="x", perceptual=0.1)._downhill(prior, x, x, job), torch.zeros_like(x))
    plain, guided = (
        Purify(prior=str(folder), perceptual=share).recover(images, Job(runtime=runtime)).pixels
        for share in (0.0, 0.1)
    )
    assert not torch.equal(plain, guided)


def test_a_prior_s_error_is_least_on_what_it_knows(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    images = blobs(16)
    prior = exact(to_unit(images.pixels, runtime.device))
    known = noise_error(prior, images, Job(runtime=runtime))
    other = noise_error(prior, images.with_pixels(images.pixels.roll(1, 0)), Job(runtime=runtime))
    assert known == pytest.approx(0, abs=1e-4)
    kept = float(prior.kept[prior.max_t // 2])  # one group of 16 images: one time, the middle one
    apart = to_unit(images.pixels, runtime.device) - to_unit(images.pixels.roll(1, 0), runtime.device)
    assert other == pytest.approx(float(apart.square().mean()) * kept / (1 - kept), rel=0.05)


SCHEDULES: dict[str, dict[str, object]] = {
    "rising": {"beta_start": -0.01, "beta_end": -0.01},
    "beyond": {"beta_end": 3.0},
    "standing still": {"trained_betas": [0.0] * 1000},
    "no betas": {"trained_betas": []},
    "unknown betas": {"trained_betas": [math.nan] * 1000},
    "rows of betas": {"trained_betas": [[0.01]] * 1000},
    "imaginary": {"beta_schedule": "scaled_linear", "beta_start": -0.01},
    "endless": {"num_train_timesteps": 10**12},
    "timeless": {"num_train_timesteps": "many"},
}


def broken(folder: Path, tmp_path: Path, how: str) -> Path:
    copy = tmp_path / how
    shutil.copytree(folder, copy)
    weights, config = copy / "unet/diffusion_pytorch_model.safetensors", copy / "unet/config.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "pickled":
        weights.write_bytes(b"\x80\x04]\x94.")
    elif how == "wrong shape":
        state = safetensors.torch.load_file(weights)
        state["conv_in.weight"] = state["conv_in.weight"][:, :2].contiguous()
        safetensors.torch.save_file(state, weights)
    elif how == "missing weight":
        state = safetensors.torch.load_file(weights)
        del state["conv_in.weight"]
        safetensors.torch.save_file(state, weights)
    elif how == "no schedule":
        shutil.rmtree(copy / "scheduler")
    elif how == "no network":
        config.unlink()
    elif how in ("grey", "nonsense"):
        change = {"in_channels": 1} if how == "grey" else {"layers_per_block": "many"}
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    elif how == "not json":
        config.write_text("{")
    elif how == "no number":
        state = safetensors.torch.load_file(weights)
        state["conv_in.bias"][3] = math.nan
        safetensors.torch.save_file(state, weights)
    elif how in SCHEDULES:
        schedule = copy / "scheduler/scheduler_config.json"
        schedule.write_text(json.dumps({**json.loads(schedule.read_text()), **SCHEDULES[how]}))
    elif how == "unknown times":
        config.write_text(json.dumps({**json.loads(config.read_text()), "time_embedding_type": "x"}))
    elif how == "damaged record":
        (copy / "prior.json").write_text(json.dumps({"range": [-1.0, 1.0], "max_t": "late"}))
    elif how == "empty training":
        about = copy / "prior.json"
        about.write_text(json.dumps({**json.loads(about.read_text()), "training": {}}))
    elif how == "empty record":
        (copy / "prior.json").write_text("{}")
    elif how == "range":
        about = copy / "prior.json"
        about.write_text(json.dumps({**json.loads(about.read_text()), "range": [0.0, 1.0]}))
    elif how == "v prediction":
        schedule = copy / "scheduler/scheduler_config.json"
        schedule.write_text(
            json.dumps({**json.loads(schedule.read_text()), "prediction_type": "v_prediction"})
        )
    elif how in ("another schedule", "class names"):
        path, change = {
            "another schedule": (
                copy / "scheduler/scheduler_config.json",
                {"_class_name": "ScoreSdeVeScheduler"},
            ),
            "class names": (config, {"num_class_embeds": 10}),
        }[how]
        kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "beta_schedule"}
        path.write_text(json.dumps(kept | change))
    elif how == "attention":
        about = json.loads(config.read_text())
        about["down_block_types"][1] = "AttnDownBlock2D"
        about["up_block_types"][1] = "AttnUpBlock2D"
        from diffusers import UNet2DModel

        model = UNet2DModel(**{key: value for key, value in about.items() if not key.startswith("_")})
        safetensors.torch.save_file(model.state_dict(), weights)
        config.write_text(json.dumps(about))
    return copy


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "is not a whole safetensors file"),
        ("pickled", "is not a whole safetensors file"),
        ("wrong shape", "does not fit its own config.json: .*conv_in.weight"),
        ("missing weight", "does not fit its own config.json: .*conv_in.weight"),
        ("no schedule", "has no scheduler_config.json"),
        ("no network", "holds no prior: expected config.json"),
        ("grey", "it has 1 channels in and 3 out; expected 3 and 3"),
        ("nonsense", "does not fit its own config.json"),
        ("not json", "is not a JSON file"),
        ("damaged record", "prior.json is not a record that 'privet prior train' wrote"),
        ("empty training", "prior.json is not a record that 'privet prior train' wrote"),
        ("empty record", "prior.json is not a record that 'privet prior train' wrote"),
        ("no number", r"holds values that are no numbers, in conv_in.bias"),
        ("unknown times", "does not fit its own config.json"),
        ("rising", "makes no sense: expected betas between 0 and 1"),
        ("beyond", "makes no sense: expected betas between 0 and 1"),
        ("standing still", "makes no sense: expected betas between 0 and 1"),
        ("no betas", "makes no sense: expected betas between 0 and 1"),
        ("unknown betas", "makes no sense: expected betas between 0 and 1"),
        ("rows of betas", "makes no sense: expected betas between 0 and 1"),
        ("imaginary", "has a noise schedule that diffusers does not know"),
        ("endless", "has a noise schedule of 1000000000000 times; expected 1 to 100,000"),
        ("timeless", "has a noise schedule of 'many' times; expected 1 to 100,000"),
        ("range", r"works on values in \[0.0, 1.0\]; expected \[-1.0, 1.0\]"),
        ("v prediction", "predicts 'v_prediction'; only noise predictors"),
        ("another schedule", "has the noise schedule of ScoreSdeVeScheduler, without betas"),
        ("class names", "wants to be told a class with each image; only unconditional priors"),
        ("attention", "knows images of 8 x 8 pixels only; these are 12 x 12"),
    ],
)
def test_a_prior_that_does_not_fit_is_one_error(
    folder: Path, tmp_path: Path, runtime: Runtime, how: str, words: str
) -> None:
    recovery = Purify(prior=str(broken(folder, tmp_path, how)))
    with pytest.raises(InputError, match=words):
        recovery.recover(blobs(2, size=(12, 12)), Job(runtime=runtime))


def test_a_network_takes_no_memory_before_its_weights_fit(folder: Path, runtime: Runtime) -> None:
    """What a config alone asks for would be filled with random numbers first."""
    before = torch.get_rng_state()
    prior = load_prior(folder, runtime=runtime)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(weight.dtype == torch.float32 for weight in prior.model.parameters())


def test_what_diffusers_called_attention_until_2023_is_understood(
    folder: Path, tmp_path: Path, runtime: Runtime
) -> None:
    copy = broken(folder, tmp_path, "attention")
    weights, images = copy / "unet/diffusion_pytorch_model.safetensors", blobs(2)
    expected = Purify(prior=str(copy)).recover(images, Job(runtime=runtime)).pixels
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state, renamed = safetensors.torch.load_file(weights), {}
    for name, value in state.items():
        for now, then in old.items():
            name = name.replace(f".{now}.", f".{then}.") if "attentions" in name else name
        renamed[name] = value
    assert renamed.keys() != state.keys()
    safetensors.torch.save_file(renamed, weights)
    assert torch.equal(Purify(prior=str(copy)).recover(images, Job(runtime=runtime)).pixels, expected)


def test_a_schedule_without_signal_at_the_end_is_diffusers_own(
    folder: Path, tmp_path: Path, runtime: Runtime
) -> None:
    from diffusers import DDPMScheduler

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_betas_zero_snr": True}))
    (copy / "prior.json").unlink()
    expected = DDPMScheduler.from_pretrained(copy / "scheduler").alphas_cumprod
    prior = load_prior(copy, runtime=runtime)
    assert torch.equal(prior.kept, expected)
    assert expected[-1] == 0 and prior.max_t == 999  # of the last time there is no way back


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("tiny"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def spoiled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(folder, tmp_path_factory.mktemp("spoiled") / "prior"))


RECORD = ("training", "images", "size", "crop", "max_t", "loss", "range", "seed", "torch")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    record=VALUES | st.dictionaries(st.sampled_from(RECORD), VALUES, max_size=3),
    training=st.dictionaries(st.sampled_from(("scale", "steps", "batch_size")), VALUES, max_size=2),
)
def test_whatever_is_in_a_record_is_told_or_one_error(
    folder: Path, spoiled: Path, monkeypatch: pytest.MonkeyPatch, record: Any, training: dict[str, object]
) -> None:
    """Half of the records are like a real one but for a few entries."""
    monkeypatch.setattr("privet.recovery.prior._network", lambda _: torch.nn.Identity())
    real = json.loads((folder / "prior.json").read_text())
    if isinstance(record, dict):
        record = {**real, "training": {**real["training"], **training}, **record}
    (spoiled / "prior.json").write_text(json.dumps(record))
    assert main(["prior", "info", str(spoiled)]) in (0, InputError.exit_code)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(SCHEDULING), VALUES | st.floats(0, 0.1), max_size=3))
def test_whatever_is_in_a_schedule_never_gives_more_of_an_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    monkeypatch.setattr("privet.recovery.prior._network", lambda _: torch.nn.Identity())
    real = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    place = tmp_path / "prior/scheduler"
    shutil.copytree(folder / "unet", tmp_path / "prior/unet", dirs_exist_ok=True)
    place.mkdir(exist_ok=True)
    (place / "scheduler_config.json").write_text(json.dumps({**real, **changes}))
    runtime = Runtime(device=torch.device("cpu"))
    try:
        prior = load_prior(tmp_path / "prior", runtime=runtime)
    except InputError:
        return
    kept = torch.cat([torch.ones(1), prior.kept])
    assert bool((kept.diff() < 0).all()) and bool((prior.kept[: prior.max_t] > 0).all())


@pytest.mark.parametrize(("loss", "blind"), [(0.3, False), (0.89, False), (0.9, True), (1.1, True)])
def test_a_prior_that_takes_next_to_no_noise_off_is_blind(folder: Path, loss: float, blind: bool) -> None:
    prior = exact(torch.zeros(1, 3, 8, 8))
    assert replace(prior, about={"loss": loss}).blind is blind
    assert not prior.blind  # nobody knows


def test_what_is_denoised_together_is_done_within_seconds(folder: Path, runtime: Runtime) -> None:
    recovery = AVATAR(prior=str(folder))  # of 2.5 MB

    def together(side: int, on: Runtime = runtime) -> int | None:
        return recovery._together(blobs(1, size=(side, side)), Job(runtime=on))

    assert [together(side) for side in (8, 32, 64, 100, 300)] == [16, 16, 4, 2, 1]
    assert together(32, Runtime(device=torch.device("cuda"))) is None
    with use_threads(3):
        assert together(32) == 48


def test_progress_moves_within_a_chunk(folder: Path, runtime: Runtime) -> None:
    told: list[tuple[str, int, int]] = []
    job = Job(runtime=runtime, progress=lambda *report: told.append(report))
    JCDP(prior=str(folder), rounds=1, time=2).recover(blobs(40), job)
    assert told == [("recovering", done, 40) for done in (16, 32, 40)]


def test_cores_share_what_is_denoised(
    folder: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior, noisy = load_prior(folder, runtime=runtime), torch.randn(40, 3, 8, 8)
    sizes: list[int] = []
    model = prior.model.forward

    def watch(piece: Tensor, *rest: Any) -> Any:
        sizes.append(len(piece))
        return model(piece, *rest)

    monkeypatch.setattr(prior.model, "forward", watch)
    expected = prior.noise(noisy, 20, runtime=runtime)
    assert sizes == [16, 16, 8]
    sizes.clear()
    with use_threads(4):
        torch.testing.assert_close(prior.noise(noisy, 20, runtime=runtime), expected, atol=1e-5, rtol=1e-4)
    assert sizes == [10, 10, 10, 10]


@pytest.mark.parametrize("size", [(30, 22), (5, 7)])
def test_sides_that_cannot_be_halved_are_learned_too(
    runtime: Runtime, tmp_path: Path, size: tuple[int, int]
) -> None:
    training = PriorTraining(scale="tiny", steps=2, batch_size=2)
    assert train_prior(blobs(4, size=size), training, tmp_path / "out", runtime=runtime).about["loss"] > 0


def test_a_training_that_diverges_ends_as_soon_as_it_is_seen(runtime: Runtime, tmp_path: Path) -> None:
    training = PriorTraining(scale="tiny", steps=50, batch_size=4, learning_rate=1e30)
    with pytest.raises(UsageError, match=r"no number any more after \d+ steps.* learning rate below 1e\+30"):
        train_prior(blobs(8), training, tmp_path / "out", runtime=runtime, checkpoint_seconds=0)
    assert not (tmp_path / "out/prior.json").exists()


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_learning_rate_that_teaches_nothing_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match="A prior needs a positive learning rate"):
        PriorTraining(learning_rate=rate)


@pytest.mark.parametrize(
    "settings", [{"scale": "huge"}, {"steps": 0}, {"max_t": 0}, {"max_t": 1001}, {"decay": 1.0}]
)
def test_trainings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="Unknown scale|A prior needs at least"):
        PriorTraining(**settings)  # type: ignore[arg-type]


def test_nothing_to_learn_from_is_an_error(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no image to learn from"):
        train_prior(blobs(0), TRAINING, tmp_path / "out", runtime=runtime)


def test_pixels_come_back_through_values() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_pixels(to_unit(pixels, torch.device("cpu"))), pixels)
    images = ImageSet.from_arrays(pixels.contiguous(), torch.tensor([0]))
    (same,) = compare_all(images.pixels, to_pixels(to_unit(pixels, torch.device("cpu"))), ssim=False)
    assert same.linf == 0
