"""The keyed stem: what it takes away, exactly, and that nothing else does."""

from __future__ import annotations

import hashlib
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from privet.errors import InputError, UsageError
from privet.images import FlipCrop
from privet.models.keyed_stem import KeyedStem, key_stream
from privet.seeds import generator

KEY = bytes(range(32))
OTHER = bytes(range(1, 33))
PATTERN = "4d4b3f76f742a5b890b470c650531d65cddeacbd31ac0011c57018ce1ae5262f"  # of KEY, group 4, tile 8: it must never change

stems = st.builds(
    lambda key, group, tile, grey: KeyedStem.from_key(
        key, group=min(group, tile * tile * (1 if grey else 3) // 2 * 2), tile=tile, grey=grey
    ),
    st.binary(min_size=16, max_size=40),
    st.sampled_from([2, 4, 6, 16]),
    st.integers(2, 9),
    st.booleans(),
)
sizes = st.tuples(st.integers(1, 13), st.integers(1, 13))


def pictures(seed: int, size: tuple[int, int], count: int = 3) -> Tensor:
    """Return images of every kind: noise, saturated noise, one colour."""
    random = generator(seed, "pictures")
    pixels = torch.randint(0, 256, (count, 3, *size), generator=random)
    pixels[0] = (pixels[0] - 128) * 4 + 128
    pixels[1] = pixels[1, :, :1, :1]
    return pixels.clamp(0, 255).to(torch.uint8)


def slow(stem: KeyedStem, image: Tensor) -> Tensor:
    """The definition, a value at a time: one image (3, height, width), integers only."""
    result = image.clone().to(torch.int64)
    _, height, width = image.shape
    tile = stem.group.shape[1]
    found: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    for c in range(3):
        for y in range(height):
            for x in range(width):
                place = (y // tile, x // tile, int(stem.group[c, y % tile, x % tile]))
                found.setdefault(place, []).append((c, y, x))
    for members in found.values():
        signs = [int(stem.sign[c, y % tile, x % tile]) for c, y, x in members]
        values = [int(image[place]) for place in members]
        doubled = sum(s * (2 * v - 255) for s, v in zip(signs, values, strict=True))
        moves = [
            a
            for a in range(-255, 256)
            if all(0 <= v + a * s <= 255 for s, v in zip(signs, values, strict=True))
        ]
        wanted = -((doubled + len(members)) // (2 * len(members)))
        move = min(max(wanted, moves[0]), moves[-1])
        for place, s in zip(members, signs, strict=True):
            result[place] += move * s
    return result.to(torch.uint8)


@settings(max_examples=40, deadline=None)
@given(stems, sizes, st.integers(0, 99), st.integers(1, 127))
def test_what_it_removes_it_removes_exactly(
    stem: KeyedStem, size: tuple[int, int], seed: int, epsilon: int
) -> None:
    pixels = pictures(seed, size)
    wanted = torch.randn(pixels.shape, generator=generator(seed, "delta")) * 1.5 * epsilon
    delta = stem.project(wanted, pixels, epsilon=epsilon)
    changed = pixels + delta
    assert 0 <= float(changed.min()) and float(changed.max()) <= 255
    assert float(delta.abs().max()) <= epsilon
    assert torch.equal(delta, delta.round())
    changed = changed.to(torch.uint8)
    assert torch.equal(stem(changed), stem(pixels))
    assert torch.equal(stem(changed.float() / 255), stem(pixels.float() / 255))
    assert torch.equal((stem(changed.float() / 255) * 255).round().to(torch.uint8), stem(pixels))
    assert torch.equal(stem(stem(pixels)), stem(pixels))


@settings(max_examples=25, deadline=None)
@given(stems, sizes, st.integers(0, 99))
def test_group_arithmetic_against_a_loop(stem: KeyedStem, size: tuple[int, int], seed: int) -> None:
    pixels = pictures(seed, size)
    assert torch.equal(stem(pixels), torch.stack([slow(stem, image) for image in pixels]))


def test_freedom_is_whole_and_another_key_leaves_it() -> None:
    stem, other = KeyedStem.from_key(KEY), KeyedStem.from_key(OTHER)
    assert stem.groups((32, 32)) == 3 * 32 * 32 // 4
    pixels = torch.randint(40, 200, (8, 3, 32, 32), generator=generator(0, "x"), dtype=torch.uint8)
    delta = stem.project(100 * torch.randn(8, 3, 32, 32, generator=generator(0, "d")), pixels, epsilon=8)
    assert float(delta.abs().mean()) > 7.5  # nearly every group can take the whole budget
    changed = (pixels + delta).to(torch.uint8)
    assert torch.equal(stem(changed), stem(pixels))
    left = (other(changed).int() - other(pixels).int()).float()
    # Another pattern takes a quarter of the energy of what it knows nothing about.
    assert 0.7 < float(left.square().mean() / delta.square().mean()) < 0.8


def test_projection_is_the_nearest() -> None:
    stem = KeyedStem.from_key(KEY, group=6, tile=3)
    pixels = pictures(3, (3, 3))
    wanted = 9 * torch.randn(pixels.shape, generator=generator(3, "delta"))
    best = stem.project(wanted, pixels, epsilon=5)
    group = stem.group.flatten().long()
    for image in range(len(pixels)):
        for number in range(int(group.max()) + 1):
            mine = group == number
            s, w, v = (t.flatten()[mine].float() for t in (stem.sign, wanted[image], pixels[image]))
            allowed = [a for a in range(-5, 6) if 0 <= (v + a * s).min() and (v + a * s).max() <= 255]
            errors = {a: float((a * s - w).square().sum()) for a in allowed}
            chosen = best[image].flatten()[mine]
            assert float((chosen - w).square().sum()) <= min(errors.values()) + 1e-3


def test_one_colour_stays_as_it_is() -> None:
    for grey in (False, True):
        stem = KeyedStem.from_key(KEY, grey=grey)
        pixels = torch.full((1, 3, 16, 16), 201, dtype=torch.uint8)
        assert torch.equal(stem(pixels), pixels)


def test_grey_images_stay_grey() -> None:
    stem = KeyedStem.from_key(KEY, grey=True)
    pixels = pictures(1, (8, 8))[:, :1].expand(-1, 3, -1, -1)
    delta = stem.project(9 * torch.randn(pixels.shape), pixels, epsilon=4)
    assert torch.equal(delta, delta[:, :1].expand_as(delta)) and float(delta.abs().sum()) > 0
    assert torch.equal(stem(pixels), stem(pixels)[:, :1].expand_as(pixels))


def test_the_same_key_gives_the_same_pattern_everywhere() -> None:
    stem = KeyedStem.from_key(KEY, group=4, tile=8)
    torch.manual_seed(7)
    again = KeyedStem.from_key(KEY, group=4, tile=8)
    assert torch.equal(stem.group, again.group) and torch.equal(stem.sign, again.sign)
    pattern = stem.group.to(torch.int32).numpy().astype("<i4").tobytes() + stem.sign.numpy().tobytes()
    assert hashlib.sha256(pattern).hexdigest() == PATTERN
    assert sorted(torch.bincount(stem.group.flatten())) == [4] * 48
    assert int(stem.sign.sum()) == 0
    for other in (KeyedStem.from_key(OTHER), KeyedStem.from_key(KEY, grey=True)):
        assert float((stem.sign == other.sign).float().mean()) < 0.7


def test_key_stream_is_hkdf() -> None:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    long = key_stream(KEY, "stem", 9000)
    block = HKDF(algorithm=SHA256(), length=9000 - 8160, salt=None, info=b"privet/1/1/stem").derive(KEY)
    assert long[8160:] == block and len(set(long)) == 256
    assert key_stream(KEY, "stem", 100) == long[:100]
    with pytest.raises(UsageError, match="at least 16 bytes, got 15"):
        key_stream(bytes(15), "stem", 1)


def test_views_come_after_the_stem() -> None:
    """A transform of stored images: what crops and flips then see is the same for both sets."""
    stem = KeyedStem.from_key(KEY)
    pixels = pictures(0, (32, 32), 4)
    changed = (pixels + stem.project(9 * torch.randn(pixels.shape), pixels, epsilon=8)).to(torch.uint8)
    views = FlipCrop(4).draw(4, (32, 32), generator(0, "views"))
    assert torch.equal(views.apply(stem(changed)), views.apply(stem(pixels)))
    assert not torch.equal(stem(views.apply(changed)), stem(views.apply(pixels)))
    loader = torch.utils.data.DataLoader(
        list(changed), batch_size=2, collate_fn=lambda b: torch.stack([stem(x) for x in b])
    )
    assert torch.equal(torch.cat(list(loader)), stem(pixels))
    assert torch.equal(stem.apply_to(pixels), stem(pixels)) and stem.apply_to(pixels[:0]).shape == (
        0,
        3,
        32,
        32,
    )
    assert torch.equal(pickle.loads(pickle.dumps(stem))(pixels), stem(pixels))  # noqa: S301


def test_gradient_is_that_of_the_projection() -> None:
    stem = KeyedStem.from_key(KEY, group=4, tile=2)
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(x)
    (found,) = torch.autograd.grad(stem(x), x, g)
    expected = g - stem.spread(stem.amplitude(g), (5, 5))  # an orthogonal projection is its own adjoint
    torch.testing.assert_close(found, expected)


def test_what_is_no_stem_is_refused() -> None:
    for group, tile in ((3, 8), (0, 8), (4, 1), (4, 0), (200, 8)):
        with pytest.raises(UsageError, match="Expected an even group"):
            KeyedStem.from_key(KEY, group=group, tile=tile)
    good = KeyedStem.from_key(KEY)
    for x in (torch.zeros(3, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16)):
        with pytest.raises(InputError, match="uint8, float32 or float64"):
            good(x)
    for pattern in (
        (good.group[:1], good.sign[:1]),
        (good.group, good.sign[:, :4]),
        (good.group, good.sign * 0),
        (good.group - 1, good.sign),
        (good.group + 10_000, good.sign),
        (good.group.float(), good.sign),
    ):
        with pytest.raises(InputError):
            KeyedStem(*pattern)
