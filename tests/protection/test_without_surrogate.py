"""LSP, AR, OPS and CUDA against slow versions of what their papers say."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from tests.conftest import blobs
from torch import Tensor

from privet.errors import InputError, UsageError
from privet.images import ImageSet, open_images
from privet.learning import Runtime, chunks
from privet.protection import AR, CUDA, LSP, OPS, Job, RandomNoise, ar, publish
from privet.protection.ar import find_filters, respond, run
from privet.protection.lsp import corners
from privet.protection.ops import scores
from privet.seeds import generator


def grey_noise(count: int, classes: int, size: int = 32) -> ImageSet:
    """Return images in the middle of the range, so that nothing is clipped."""
    draws = torch.Generator().manual_seed(3)
    pixels = torch.randint(90, 160, (count, 3, size, size), dtype=torch.uint8, generator=draws)
    return ImageSet.from_arrays(
        pixels, torch.arange(count) % classes, class_names=[str(n) for n in range(classes)]
    )


def change(images: ImageSet, method: LSP | AR | OPS | CUDA | RandomNoise, runtime: Runtime) -> Tensor:
    return (method.protect(images, Job(runtime=runtime)).pixels.short() - images.pixels.short()).float()


def test_a_straight_line_tells_lsp_noise_apart(runtime: Runtime) -> None:
    images = grey_noise(600, 5)
    delta = change(images, LSP(), runtime)
    assert torch.equal(delta[:, :, ::8, ::8], delta[:, :, 7::8, 7::8])  # patches of one colour
    features = np.c_[delta[:, :, ::8, ::8].flatten(1).numpy(), np.ones(600)]
    targets = np.eye(5)[images.labels.numpy()]
    weights = np.linalg.lstsq(features[:300], targets[:300], rcond=None)[0]
    right = (features[300:] @ weights).argmax(1) == images.labels.numpy()[300:]
    assert right.mean() > 0.99


def lsp_codes(method: LSP, images: ImageSet, runtime: Runtime, *, draw: int = 0) -> Tensor:
    """Return one value for each patch of each image's noise, of length 1, (images, features)."""
    perturb = method._perturb(images, Job(runtime=runtime))
    noise = perturb(torch.arange(len(images)), torch.Generator().manual_seed(draw))
    return torch.nn.functional.normalize(noise[:, :, :: method.patch, :: method.patch].flatten(1))


def test_lsp_noise_lies_around_the_corner_of_its_class(runtime: Runtime) -> None:
    images = grey_noise(12, 3, 8)
    far = lsp_codes(LSP(patch=4, separation=1e4), images, runtime)
    assert torch.allclose(far.abs(), torch.full_like(far, 12**-0.5), atol=0.01)
    alike = far @ far.T > 0.99
    assert torch.equal(alike, images.labels[:, None] == images.labels)
    nearer, near = (
        lsp_codes(LSP(patch=4, separation=separation), images, runtime) for separation in (5.0, 1.0)
    )
    own = (far * nearer).sum(1), (far * near).sum(1)
    assert 0.99 > float(own[0].mean()) > float(own[1].mean()) + 0.1


def test_lsp_mixes_all_samples_by_one_matrix(runtime: Runtime) -> None:
    """Around the origin nothing but the mixing gives samples a shape, the same for every image and chunk."""
    images = grey_noise(4000, 2, 8)
    codes = lsp_codes(LSP(patch=4, separation=0.0), images, runtime)
    again = lsp_codes(LSP(patch=4, separation=0.0), images, runtime, draw=1)
    shapes = [one.T @ one / len(one) for one in (codes[::2], codes[1::2], again)]
    assert float(codes.mean(0).abs().max()) < 0.03
    for shape in shapes[1:]:
        assert float((shape - shapes[0]).norm()) < 0.15 * float(shapes[0].norm())
    strengths = torch.linalg.eigvalsh(shapes[0])  # they sum to 1
    assert float(strengths[0]) < 0.2 * float(strengths[-1])
    assert 0.2 < float((shapes[0] < 0).float().mean()) < 0.8  # weights have either sign


def test_corners_are_distinct() -> None:
    found = corners(8, 3, torch.Generator().manual_seed(0))
    assert len(set(map(tuple, found.tolist()))) == 8
    assert set(found.unique().tolist()) == {-1.0, 1.0}
    with pytest.raises(UsageError, match="9 classes cannot be told apart by 3 patches"):
        corners(9, 3, torch.Generator())


def test_a_process_is_the_weighted_sum_of_what_came_before() -> None:
    draws = np.random.default_rng(0)
    taps = draws.normal(size=(2, 3, 8)).astype(np.float32) / 4
    start = draws.normal(size=(2, 3, 7, 6)).astype(np.float32)
    expected = start.astype(np.float64)
    for which in np.ndindex(2, 3):
        for row in range(2, 7):
            for column in range(2, 6):
                window = expected[(*which, slice(row - 2, row + 1), slice(column - 2, column + 1))].ravel()
                expected[(*which, row, column)] = window[:8] @ taps[which]
    assert np.allclose(run(taps, start), expected, atol=1e-5)


def test_filters_respond_to_each_other_and_not_to_their_own() -> None:
    taps = find_filters(6, 0.3, generator(0, "filters"))
    assert torch.allclose(taps.sum(2), torch.ones(6, 3), atol=1e-5)
    start = np.random.default_rng(1).normal(size=(6, 3, 36, 36)).astype(np.float32)
    processes = torch.from_numpy(run(taps.numpy(), start))
    table = np.array([[respond(one, process) for process in processes] for one in taps])
    assert table.diagonal().max() < 1e-5
    assert (table + np.eye(6)).min() > 0.15
    assert float(processes.flatten(2).norm(dim=2).max()) < 1000  # bounded, whatever they start from
    with pytest.raises(UsageError, match=r"Only \d of 9 filters respond .* lower it with --set response=50"):
        find_filters(9, 100.0, generator(0, "filters"))


def test_filters_are_accepted_when_each_responds_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two classes, whichever comes first: an answer in one direction is not enough."""
    for one_way in ([0.1, 0.9], [0.9, 0.1]):
        answers = iter([*one_way, 0.9, 0.9])
        monkeypatch.setattr(ar, "respond", lambda *_, answers=answers: next(answers))
        assert len(find_filters(2, 0.3, generator(0, "filters"))) == 2
        assert not list(answers)


def test_filters_name_the_class_of_written_ar_noise(runtime: Runtime, tmp_path: Path) -> None:
    images = grey_noise(60, 6)
    publish(images, AR(), tmp_path / "out", runtime=runtime)
    protected = open_images(tmp_path / "out")
    order = [images.names.index(name) for name in protected.names]
    delta = protected.pixels.float() - images.pixels[order].float()
    taps = find_filters(6, 0.3, generator(0, "filters"))
    named = torch.tensor([min(range(6), key=lambda n: respond(taps[n], one)) for one in delta])
    assert float((named == protected.labels).float().mean()) > 0.95


def test_ar_noise_follows_the_filter_of_its_class_in_every_channel(runtime: Runtime) -> None:
    images = grey_noise(6, 3)
    noise = AR()._perturb(images, Job(runtime=runtime))(torch.arange(6), torch.Generator().manual_seed(1))
    taps = find_filters(3, 0.3, generator(0, "filters"))
    for one, label in zip(noise, images.labels, strict=True):
        assert respond(taps[label], one) < 1e-4
        assert respond(taps[label], one[[1, 2, 0]]) > 0.1


def test_the_start_of_an_ar_process_is_cut_off(runtime: Runtime) -> None:
    """Two classes that start from the same numbers: not a row or column that is delivered shows it."""
    perturb = AR()._perturb(grey_noise(2, 2), Job(runtime=runtime))
    one, other = (perturb(torch.tensor([n]), torch.Generator().manual_seed(1))[0] for n in (0, 1))
    for first, second in ((one[:, 0], other[:, 0]), (one[:, :, 0], other[:, :, 0])):
        assert float(torch.cosine_similarity(first, second, dim=1).abs().max()) < 0.99


def test_ar_tiles_are_equally_strong_and_none_is_a_copy(runtime: Runtime) -> None:
    perturb = AR()._perturb(grey_noise(3, 3, 64), Job(runtime=runtime))
    noise = perturb(torch.arange(3), torch.Generator().manual_seed(1))
    tiles = noise.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    lengths = tiles.norm(dim=2)
    assert torch.allclose(lengths, lengths[:1, :1].expand_as(lengths), rtol=1e-3)
    for image in tiles:
        assert len((image / image.norm(dim=1, keepdim=True)).mul(1e3).round().unique(dim=0)) == 4


@pytest.mark.parametrize("size", [(40, 33), (224, 224)])
def test_ar_noise_covers_larger_images_too(runtime: Runtime, size: tuple[int, int]) -> None:
    images = ImageSet.from_arrays(torch.full((10, 3, *size), 128, dtype=torch.uint8), torch.arange(10))
    delta = change(images, AR(), runtime)
    for part in delta.split(32, 2):
        for tile in part.split(32, 3):
            assert float((tile != 0).any(1).float().mean((1, 2)).min()) > 0.8


def test_ops_scores_are_those_of_the_definition() -> None:
    images = blobs(14, size=(3, 4))
    colours = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 1]], dtype=torch.float64)
    found = list(scores(images, colours))
    for label in range(3):
        x = images.pixels[images.labels == label].double().numpy() / 255
        for number, colour in enumerate(colours.numpy()):
            distance = np.abs(colour[None, :, None, None] - x)
            expected = distance.mean((0, 1)) / distance.std((0, 1))
            assert np.allclose(found[label][number].view(3, 4).numpy(), expected)


def test_ops_sets_one_pixel_of_one_colour_for_each_class(runtime: Runtime) -> None:
    images = blobs(30, size=(6, 6), classes=5)
    protected = OPS().protect(images, Job(runtime=runtime)).pixels
    changed = (protected != images.pixels).any(1).flatten(1)
    places = changed.int().argmax(1)
    assert changed.sum(1).tolist() == [1] * 30
    for label in range(5):
        members = images.labels == label
        assert len(places[members].unique()) == 1
        pixel = protected[members].flatten(2)[:, :, places[members][0]]
        assert bool((pixel == pixel[0]).all())
        assert set(pixel[0].tolist()) <= {0, 255}
    assert len({int(places[images.labels == label][0]) for label in range(5)}) == 5


def test_ops_takes_the_best_pixel_and_no_pixel_twice(runtime: Runtime) -> None:
    one = blobs(8, size=(5, 5), classes=1).pixels
    images = ImageSet.from_arrays(torch.cat((one, one)), torch.arange(16) // 8)  # both classes want the same
    protected = OPS().protect(images, Job(runtime=runtime)).pixels
    colours = torch.tensor([[n >> 2 & 1, n >> 1 & 1, n & 1] for n in range(8)], dtype=torch.float64)
    best = next(scores(images, colours)).max(0).values.argsort(descending=True)  # of each position
    places = (protected != images.pixels).any(1).flatten(1).int().argmax(1)
    assert places.tolist() == [int(best[0])] * 8 + [int(best[1])] * 8


@pytest.mark.parametrize("grey", [0, 1, 14])
@pytest.mark.parametrize("pixels", [1, 2])
def test_ops_is_the_best_of_all_pixels_and_colours_tried(runtime: Runtime, pixels: int, grey: int) -> None:
    images = blobs(14, size=(3, 5), grey=grey == 14)
    images = replace(images, grey=torch.arange(14) < grey)
    images.pixels[images.grey] = images.pixels[images.grey, :1].expand(-1, 3, -1, -1)
    protected = OPS(epsilon=pixels).protect(images, Job(runtime=runtime)).pixels.numpy()
    colours = [np.array(one) for one in product((0, 1), repeat=3) if not grey or len(set(one)) == 1]
    taken: list[tuple[int, int]] = []
    for label in range(3):
        x = images.pixels[images.labels == label].double().numpy() / 255

        def score(y: int, column: int, colour: np.ndarray) -> float:  # type: ignore[type-arg]
            distance = np.abs(colour - x[:, :, y, column])
            return float(distance.mean() / distance.std())

        ranked = sorted(product(range(3), range(5), colours), key=lambda one: -score(*one))
        expected = images.pixels[images.labels == label].numpy().copy()
        for _ in range(pixels):
            y, column, colour = next(one for one in ranked if one[:2] not in taken)
            taken.append((y, column))
            expected[:, :, y, column] = 255 * colour
        assert np.array_equal(protected[images.labels.numpy() == label], expected)


def test_ops_needs_a_pixel_for_each_class(runtime: Runtime) -> None:
    images = blobs(5, size=(2, 2), classes=5)
    with pytest.raises(InputError, match="5 classes need 5 pixels of their own, but images have 4"):
        OPS().protect(images, Job(runtime=runtime))


@pytest.mark.parametrize(("kernel", "blur"), [(3, 0.3), (5, 0.1)])
def test_cuda_filters_each_class_in_its_own_way(runtime: Runtime, kernel: int, blur: float) -> None:
    images = blobs(6, size=(9, 7))
    protected = CUDA(kernel=kernel, blur=blur).protect(images, Job(runtime=runtime)).pixels
    draws = generator(0, "filters")
    filters = torch.rand(3, kernel**2, generator=draws) * blur
    filters.scatter_(1, torch.randint(0, kernel**2, (3, 1), generator=draws), 1.0)
    for before, after, label in zip(images.pixels.double().numpy(), protected, images.labels, strict=True):
        own = filters[label].view(kernel, kernel).double().numpy()
        seen = np.stack([scipy.ndimage.correlate(channel, own, mode="nearest") for channel in before])
        assert np.abs(after.numpy() - (255 * seen / seen.max()).round()).max() <= 1


@pytest.mark.parametrize(
    "method",
    [LSP(patch=4), AR(), RandomNoise(), RandomNoise(norm="l2", epsilon=1.0), RandomNoise(norm="l0")],
    ids=["lsp", "ar", "random", "random, l2", "random, l0"],
)
def test_no_two_images_get_the_same_noise(
    runtime: Runtime, method: LSP | AR | RandomNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 4)  # nor do those at the same place of two chunks
    images = grey_noise(1, 1, 8)
    same = ImageSet.from_arrays(images.pixels.expand(12, -1, -1, -1).clone(), torch.arange(12) % 2)
    assert len(change(same, method, runtime).flatten(1).unique(dim=0)) == 12


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_noise_of_channels_and_images_is_unrelated(runtime: Runtime, norm: str) -> None:
    method = RandomNoise(norm=norm, epsilon=8 if norm == "linf" else 3.0)
    delta = change(grey_noise(4, 2), method, runtime).flatten(2).flatten(0, 1)
    related = torch.corrcoef(delta) - torch.eye(12)
    assert float(related.abs().max()) < 0.15  # of 1,024 pixels: 5 standard errors
    kurtosis = float((delta**4).mean() / (delta**2).mean() ** 2)
    assert kurtosis == pytest.approx(1 if norm == "linf" else 3, abs=0.2)  # two values, or a normal one


def test_random_pixels_are_anywhere_and_of_any_corner_colour(runtime: Runtime) -> None:
    images = grey_noise(60, 2, 8)
    protected = RandomNoise(norm="l0", epsilon=2).protect(images, Job(runtime=runtime)).pixels
    chosen = (protected != images.pixels).any(1)
    assert len(chosen.flatten(1).unique(dim=0)) > 50 and int(chosen.any(0).sum()) > 50
    colours = protected.permute(0, 2, 3, 1)[chosen]
    assert sorted(map(tuple, colours.unique(dim=0).tolist())) == list(product((0, 255), repeat=3))


@pytest.mark.parametrize("pixels", [1, 3])
def test_random_pixels_are_as_many_as_asked(runtime: Runtime, pixels: int) -> None:
    images = grey_noise(20, 2, 8)
    delta = change(images, RandomNoise(norm="l0", epsilon=pixels), runtime)
    assert (delta != 0).any(1).flatten(1).sum(1).tolist() == [pixels] * 20


def test_random_pixels_are_as_many_as_asked_where_two_draw_the_same(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.ones(shape))
    delta = change(grey_noise(4, 2, 8), RandomNoise(norm="l0", epsilon=2), runtime)
    assert (delta != 0).any(1).flatten(1).sum(1).tolist() == [2] * 4


def test_random_pixels_are_no_more_than_there_are(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="random cannot change 65 pixels of images that have 64"):
        change(grey_noise(4, 2, 8), RandomNoise(norm="l0", epsilon=65), runtime)


def test_random_noise_of_an_l2_budget_uses_it(runtime: Runtime) -> None:
    delta = change(grey_noise(5, 2), RandomNoise(norm="l2", epsilon=1.0), runtime) / 255
    assert 0.97 < float(delta.flatten(1).norm(dim=1).min()) <= 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LSP(patch=0), "lsp needs a patch of at least 1 pixel, got 0"),
        (lambda: LSP(epsilon=0), "Expected a positive budget, got 0"),
        (lambda: AR(epsilon=-1), "Expected a positive budget, got -1"),
        (lambda: OPS(epsilon=0), "Expected a whole number of pixels, at least 1, got 0"),
        (lambda: CUDA(kernel=4), "cuda needs an odd kernel of at least 3 and a positive blur, got 4 and"),
        (lambda: CUDA(kernel=1), "cuda needs an odd kernel of at least 3"),
        (lambda: LSP(separation=float("nan")), "lsp needs separation as a number of at least 0, got nan"),
        (lambda: AR(epsilon=float("inf")), "ar needs epsilon as a number of at least 0, got inf"),
        (lambda: AR(response=-0.1), "ar needs response as a number of at least 0, got -0.1"),
        (lambda: RandomNoise(norm="none"), "a norm of linf, l2 or l0, got 'none'"),
        (lambda: RandomNoise(norm="l3"), "Unknown norm 'l3'; expected one of linf, l2, l0, none"),
    ],
)
def test_settings_out_of_range_are_refused(make: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()  # type: ignore[operator]
