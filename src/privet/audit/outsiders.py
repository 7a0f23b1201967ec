"""What those without a licence make of a release before they train on it.

They know the design, the files and their labels, and never the key. Some have more, which their names say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.audit.licence_plan import (
    ANOTHER_KEY,
    CLEAN,
    CLEAN_PART,
    DISTILLED,
    LEARNED,
    LICENSEE,
    MIXED,
    PAIRS,
    PLAIN,
    RECOVERY,
)
from privet.images import ImageSet
from privet.learning import Job, Runtime, training_step
from privet.models import create_model
from privet.models.keyed_stem import KeyedStem
from privet.recovery import create_recovery
from privet.seeds import generator

Sets = tuple[ImageSet, ImageSet]
"""What a learner is trained and tested on."""
LAYER_EPOCHS, LAYER_RATE = 6, 0.05  # in which a layer is learned together with a network
NATURAL = 2000  # images that natural statistics are taken from
BLUR = 5  # pixels; what varies more slowly than this differs between classes by nature


@dataclass(frozen=True, kw_only=True)
class Released:
    """A release, and what its licence makes of it.

    Attributes:
        clean: the originals.
        protected: the release.
        test: clean test images.
        unlocked: the release as the licensee's network gets it.
        presented: the test images likewise.
        asked: the release as somebody shows it to the licensee's finished network.
        stem: of the release, or None. Outsiders know its sizes only.
        lock: whether each class has a pattern of its own.
        prior: for recoveries that denoise with one.
    """

    clean: ImageSet
    protected: ImageSet
    test: ImageSet
    unlocked: ImageSet
    presented: ImageSet
    asked: ImageSet
    stem: KeyedStem | None
    lock: bool
    prior: str | None


def prepare(who: str, release: Released, *, architecture: str, share: float, runtime: Runtime) -> Sets:
    """Return what somebody trains on, and the test images as their network gets them.

    Args:
        who: as in `Seat`.
        release: the files.
        architecture: of the network, for those who need one before.
        share: of the originals that an outsider has.
        runtime: where recoveries run.
    """
    kind, _, what = who.partition(" ")
    if who == CLEAN:
        return release.clean, release.test
    if who == LICENSEE:
        return release.unlocked, release.presented
    if who in (PLAIN, DISTILLED):
        return release.protected, release.test
    if who in (CLEAN_PART, MIXED):
        return _part(release, share, mixed=who == MIXED), release.test
    if kind == RECOVERY:
        recovery = create_recovery(what, prior=release.prior)
        job = Job(runtime=runtime)
        return recovery.recover(release.protected, job), recovery.present(release.test, job.facts)
    if release.stem is None:
        known = int(what) if kind == PAIRS else None
        return _subtract(release.protected, _class_patterns(release, known)), release.test
    if who == ANOTHER_KEY:
        return _through(_another(release.stem).apply_to, release)
    if who == LEARNED:
        return _through(_learned_layer(release, architecture, runtime), release)
    count = release.stem.groups(
        (release.stem.group.shape[1],) * 2
    )  # directions of a tile that the design takes
    basis = _span_of_pairs(release, int(what), count) if kind == PAIRS else _span_of_files(release, count)
    return _through(lambda pixels: _remove(pixels, basis, _tile(release)), release)


def _part(release: Released, share: float, *, mixed: bool) -> ImageSet:
    """Return a share of the originals, alone or in place of their protected files."""
    order = torch.randperm(len(release.clean), generator=generator(0, "clean part"))
    known = order[: max(2, round(share * len(order)))]
    if not mixed:
        return release.clean.subset(known)
    pixels = release.protected.pixels.clone()
    pixels[known] = release.clean.pixels[known]
    return release.protected.with_pixels(pixels)


def _through(change: Callable[[Tensor], Tensor], release: Released) -> Sets:
    """Pass files and test images through the same change."""
    images, test = release.protected, release.test
    return images.with_pixels(change(images.pixels)), test.with_pixels(change(test.pixels))


def _another(stem: KeyedStem) -> KeyedStem:
    """Return a stem of the same design: the same pattern, its places in the tile shuffled, all channels' or each's."""
    random = generator(0, "another key")
    shape = stem.group.shape
    tied = bool((stem.group == stem.group[:1]).all() and (stem.sign == stem.sign[:1]).all())
    count = shape[1] * shape[2] if tied else stem.group.numel()
    order = torch.randperm(count, generator=random)
    parts = [
        part.reshape(3, -1)[:, order] if tied else part.flatten()[order] for part in (stem.group, stem.sign)
    ]
    return KeyedStem(parts[0].reshape(shape), parts[1].reshape(shape))


class TileLayer(nn.Module):
    """A linear layer over the values of every tile; the identity at first."""

    def __init__(self, tile: int) -> None:
        super().__init__()
        self.tile = tile
        self.weight = nn.Parameter(torch.eye(3 * tile**2))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) to images of the same size; tiles at the edge are filled up."""
        height, width = x.shape[2:]
        filled = F.pad(x, (0, -width % self.tile, 0, -height % self.tile), mode="replicate")
        tiles = F.pixel_unshuffle(filled, self.tile)
        mapped = F.conv2d(tiles, self.weight[:, :, None, None])
        return F.pixel_shuffle(mapped, self.tile)[:, :, :height, :width]


def _learned_layer(release: Released, architecture: str, runtime: Runtime) -> Callable[[Tensor], Tensor]:
    """Train a linear layer over the stem's tiles together with a network behind it, and return the layer."""
    images, front = release.protected, TileLayer(_tile(release))
    network = create_model(architecture, classes=images.classes, size=images.size, seed=1)
    model = runtime.place(nn.Sequential(front, network))
    optimizer = torch.optim.SGD(model.parameters(), LAYER_RATE, momentum=0.9, weight_decay=5e-4)
    for epoch in range(LAYER_EPOCHS):
        order = torch.randperm(len(images), generator=generator(0, "learned layer", epoch))
        for index in torch.split(order, 128):
            x = images.pixels[index].to(runtime.device).float() / 255
            y = images.labels[index].to(runtime.device)
            training_step(model, optimizer, x, y, rate=LAYER_RATE, runtime=runtime)

    @torch.no_grad()
    def change(pixels: Tensor) -> Tensor:
        parts = torch.split(pixels, 512)
        seen = [front(part.to(runtime.device).float() / 255).cpu() * 255 for part in parts]
        return torch.cat(seen).round_().clamp_(0, 255).to(torch.uint8)

    return change


def _tile(release: Released) -> int:
    assert release.stem is not None
    return int(release.stem.group.shape[1])


def _span_of_files(release: Released, count: int) -> Tensor:
    """Return the directions of a tile that the noise takes, looked for in the files alone, (values, count).

    Natural images have the same statistics wherever tiles begin, the noise only where the stem's do. So the
    directions in which tiles at the stem's places vary most, relative to tiles at all other places, are the noise's.
    A tile as large as the image has no other places; then other images, the test images, stand for nature.
    """
    tile, pixels = _tile(release), release.protected.pixels
    free = [range(min(tile, side - tile + 1)) for side in release.protected.size]
    places = [(top, left) for top in free[0] for left in free[1] if (top, left) != (0, 0)]
    seen = [_tiles(pixels[:NATURAL], tile, top=top, left=left) for top, left in places[::4]]
    natural = torch.stack([_covariance(one) for one in seen or [_tiles(release.test.pixels, tile)]]).mean(0)
    factor = torch.linalg.cholesky(natural + 0.1 * torch.eye(len(natural), dtype=torch.float64))
    half = torch.linalg.solve_triangular(factor, _covariance(_tiles(pixels, tile)), upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
    vectors = torch.linalg.eigh(whitened)[1][:, -count:]
    # Along a direction of the noise tiles vary more by the noise's energy: covariance = natural + Q D Q'.
    basis: Tensor = torch.linalg.qr((factor @ vectors).float())[0]
    return basis


def _span_of_pairs(release: Released, pairs: int, count: int) -> Tensor:
    """Return the directions that the differences of so many pairs span, (values, count)."""
    change = release.protected.pixels[:pairs].float() - release.clean.pixels[:pairs].float()
    basis: Tensor = torch.linalg.eigh(_covariance(_tiles(change, _tile(release))))[1][:, -count:].float()
    return basis


def _remove(pixels: Tensor, basis: Tensor, tile: int) -> Tensor:
    """Project an orthonormal basis, (values, directions), out of every tile of images, uint8."""
    found = []
    for part in pixels.split(512):  # type: ignore[no-untyped-call]
        values = part.float()
        flat = F.unfold(values, tile, stride=tile).transpose(1, 2)
        taken = ((flat - 127.5) @ basis) @ basis.T
        size = (part.shape[2] // tile * tile, part.shape[3] // tile * tile)
        values[:, :, : size[0], : size[1]] -= F.fold(taken.transpose(1, 2), size, tile, stride=tile)
        found.append(values.round_().clamp_(0, 255).to(torch.uint8))
    return torch.cat(found)


def _tiles(pixels: Tensor, tile: int, *, top: int = 0, left: int = 0) -> Tensor:
    """Return the tiles of images from an offset on, (images, places, values), float."""
    height, width = (pixels.shape[2] - top) // tile * tile, (pixels.shape[3] - left) // tile * tile
    part = pixels[:, :, top : top + height, left : left + width].float()
    return F.unfold(part, tile, stride=tile).transpose(1, 2)


def _covariance(samples: Tensor) -> Tensor:
    flat = samples.reshape(-1, samples.shape[-1]).double()
    flat = flat - flat.mean(0)
    return flat.T @ flat / len(flat)


def _class_patterns(release: Released, pairs: int | None) -> Tensor:
    """Return what an outsider takes for the patterns of the classes, (classes, 3, height, width), in 1/255.

    With pairs, the mean change of those of each class. Without, the class's mean, as far as it varies quickly:
    the mean of many photographs varies slowly.
    """
    images = release.protected
    if pairs is not None:
        change = images.pixels[:pairs].float() - release.clean.pixels[:pairs].float()
        return _means(change, images.labels[:pairs], images.classes)
    means = _means(images.pixels.float(), images.labels, images.classes)
    slow = F.avg_pool2d(means, BLUR, stride=1, padding=BLUR // 2, count_include_pad=False)
    return means - slow


def _means(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the mean of each class, zero where it has no member."""
    member = F.one_hot(labels, classes).float()
    total = (member.T @ values.flatten(1)).view(classes, *values.shape[1:])
    return total / member.sum(0).clamp(min=1).view(-1, 1, 1, 1)


def _subtract(images: ImageSet, patterns: Tensor) -> ImageSet:
    cleaned = images.pixels.float() - patterns[images.labels]
    return images.with_pixels(cleaned.round_().clamp_(0, 255).to(torch.uint8))
