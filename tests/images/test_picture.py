from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from privet.errors import UsageError
from privet.images import Picture, PictureError
from privet.images.picture import decode, encode, measure

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (20, 30, 4)).astype(np.uint8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


RGB = Image.fromarray(PIXELS[..., :3])
GREY = Image.fromarray(PIXELS[..., 0])
DEEP = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 251)
PALETTE = RGB.quantize(16)

KINDS = {
    "rgb": (file(RGB), "RGB"),
    "rgba": (file(Image.fromarray(PIXELS)), "RGBA"),
    "grey": (file(GREY), "L"),
    "grey with alpha": (file(Image.fromarray(PIXELS[..., :2])), "LA"),
    "bilevel": (file(GREY.convert("1")), "L"),
    "palette": (file(PALETTE), "RGB"),
    "palette with transparency": (file(PALETTE, transparency=3), "RGBA"),
    "rgb with a transparent colour": (file(RGB, transparency=tuple(map(int, PIXELS[0, 0, :3]))), "RGBA"),
    "16-bit grey": (file(DEEP), "I;16"),
    "16-bit grey tiff": (file(DEEP, "TIFF"), "I;16"),
    "cmyk": (file(RGB.convert("CMYK"), "JPEG"), "RGB"),
    "jpeg": (file(RGB, "JPEG"), "RGB"),
    "grey jpeg": (file(GREY, "JPEG"), "L"),
    "webp": (file(Image.fromarray(PIXELS), "WEBP"), "RGBA"),
    "gif": (file(RGB, "GIF"), "RGB"),
    "bmp": (file(RGB, "BMP"), "RGB"),
    "ycbcr tiff": (file(RGB.convert("YCbCr"), "TIFF"), "RGB"),
}


@pytest.mark.parametrize("format", ["png", "webp"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_carried_through(kind: str, format: str) -> None:
    data, mode = KINDS[kind]
    before = decode(data)
    assert before.size == measure(data) == (20, 30)
    delta = RANDOM.integers(-8, 9, (20, 30, 3)).astype(np.int16)
    if before.grey:
        delta[:] = delta[..., :1]
    changed = before.perturbed(delta)
    assert np.abs(changed.rgb.astype(int) - before.rgb).max() == 8
    if before.deep is not None and format == "webp":
        with pytest.raises(PictureError, match="16 bits do not fit into WebP; use png"):
            encode(changed, format=format)
        return
    written = encode(changed, format=format)
    after = decode(written)
    np.testing.assert_array_equal(after.rgb, changed.rgb)
    if before.alpha is not None:
        np.testing.assert_array_equal(after.alpha, before.alpha)
    if before.deep is not None:
        np.testing.assert_array_equal(after.deep, changed.deep)
    if format == "png":
        assert opened(written).mode == mode


def test_networks_see_what_viewers_show() -> None:
    for kind in ("rgb", "palette", "webp", "gif", "bmp"):
        expected = np.asarray(opened(KINDS[kind][0]).convert("RGB"))
        np.testing.assert_array_equal(decode(KINDS[kind][0]).rgb, expected)


def test_sixteen_bits_keep_their_lower_half() -> None:
    before = decode(KINDS["16-bit grey"][0])
    assert before.deep is not None
    after = before.perturbed(np.full((20, 30, 3), 5, np.int16))
    assert after.deep is not None
    np.testing.assert_array_equal(after.deep, np.minimum(before.deep.astype(int) + 5 * 257, 65535))


@given(st.integers(0, 65535), st.integers(-127, 127))
@settings(max_examples=200)
def test_a_step_on_16_bits_is_at_most_that_step_on_8(value: int, step: int) -> None:
    deep = np.array([[value]], np.uint16)
    grey = (deep.astype(np.uint32) + 128) // 257
    before = Picture(rgb=np.repeat(grey.astype(np.uint8)[:, :, None], 3, 2), grey=True, deep=deep)
    after = before.perturbed(np.full((1, 1, 3), step, np.int16))
    assert abs(int(after.rgb[0, 0, 0]) - int(before.rgb[0, 0, 0])) <= abs(step)


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_applied_once(turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = file(RGB, "TIFF", exif=exif)
    before = decode(data)
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(opened(data))
    np.testing.assert_array_equal(before.rgb, np.asarray(upright))
    assert measure(data) == before.size
    written = encode(before)
    assert 0x0112 not in opened(written).getexif()
    np.testing.assert_array_equal(decode(written).rgb, before.rgb)


def test_metadata_are_kept_without_location_and_thumbnails() -> None:
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif[0x0112] = 6
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    exif.get_ifd(0x8769).update({0x9286: "comment", 0x927C: b"maker note"})
    data = file(RGB, "JPEG", exif=exif, icc_profile=SRGB, dpi=(300, 300))
    before = decode(data)

    kept = opened(encode(before))
    assert kept.getexif()[0x010F] == "Maker"
    assert kept.getexif().get_ifd(0x8769) == {0x9286: "comment"}
    assert kept.getexif().get_ifd(0x8825) == {}
    assert kept.info["icc_profile"] == SRGB
    assert kept.info["dpi"] == pytest.approx((300, 300), abs=0.1)

    located = opened(encode(before, gps=True))
    assert located.getexif().get_ifd(0x8825)[2] == (1.0, 2.0, 3.0)

    stripped = opened(encode(before, metadata="strip"))
    assert len(stripped.getexif()) == 0
    assert stripped.info["icc_profile"] == SRGB  # without it the colours would change


XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<r:Description xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/" xmlns:dji="http://www.dji.com/drone-dji/1.0/"
 xmlns:core="http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/" xmlns:ext="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 photoshop:City="Delft" photoshop:Credit="Ada &amp; Sons" dji:GpsLatitude="52.01">
<core:Location>12 Home Street</core:Location>
<ext:LocationCreated><r:Bag><r:li><ext:Sublocation>the attic</ext:Sublocation></r:li></r:Bag></ext:LocationCreated>
<dc:rights><r:Alt><r:li xml:lang="x-default">all reserved</r:li></r:Alt></dc:rights>
<core:CreatorContactInfo core:CiAdrCity="Rotterdam"/>
<xmp:Thumbnails><r:Alt><r:li>small copy</r:li></r:Alt></xmp:Thumbnails>
</r:Description></r:RDF></x:xmpmeta>
<?xpacket end="w"?>"""
SAID = ("Ada &amp; Sons", "all reserved", "Rotterdam", "W5M0MpCehiHzreSzNTczkc9d")
WHERE = ("Delft", "52.01", "12 Home Street", "the attic")


def xmp(data: bytes) -> str:
    info = opened(data).info
    found = info.get("xmp") or info.get("XML:com.adobe.xmp") or ""
    return found.decode() if isinstance(found, bytes) else str(found)


@pytest.mark.parametrize("format", ["png", "webp"])
@pytest.mark.parametrize("source", ["WEBP", "JPEG"])
def test_xmp_keeps_credits_without_places_and_thumbnails(source: str, format: str) -> None:
    picture = decode(file(RGB, source, xmp=XMP.encode()))
    kept = xmp(encode(picture, format=format))
    assert all(word in kept for word in SAID)
    assert not any(word in kept for word in (*WHERE, "small copy"))
    located = xmp(encode(picture, format=format, gps=True))
    assert all(word in located for word in (*SAID, *WHERE)) and "small copy" not in located
    assert xmp(encode(picture, format=format, metadata="strip")) == ""
    plain = "<x><dc:title xmlns:dc='http://purl.org/dc/elements/1.1/'>title</dc:title></x>\n"
    assert xmp(encode(decode(file(RGB, source, xmp=plain.encode())), format=format)) == plain


@pytest.mark.parametrize("format", ["png", "webp"])
@pytest.mark.parametrize("source", ["WEBP", "JPEG", "TIFF"])
@pytest.mark.parametrize(
    "property", [' tiff:Orientation="6"/>', "><tiff:Orientation>6</tiff:Orientation></d>"]
)
def test_what_xmp_tells_of_the_old_orientation_does_not_turn_the_new_file(
    property: str, source: str, format: str
) -> None:
    packet = f'<d xmlns:tiff="http://ns.adobe.com/tiff/1.0/"{property}'.encode()
    tags = {"tiffinfo": {700: packet}} if source == "TIFF" else {"xmp": packet}
    data = file(RGB, source, **tags)
    picture = decode(data)
    assert picture.size == measure(data) == (30, 20)
    assert np.array_equal(decode(encode(picture, format=format)).rgb, picture.rgb)


@pytest.mark.parametrize(
    "packet",
    [
        b"no packet",
        b"<x>",
        b"<!DOCTYPE x [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;'>]><x>&b;</x>",
        b"<a>" * 5000 + b"<City>Delft</City>" + b"</a>" * 5000,
        b"<x y:City='Delft'/>",
        b"<City>Delft</City>",
    ],
)
def test_xmp_that_cannot_be_read_is_dropped(packet: bytes) -> None:
    picture = decode(file(RGB, "WEBP", xmp=packet))
    assert b"Delft" not in encode(picture) and b"aaaa" not in encode(picture)


@given(st.binary(max_size=64))
def test_any_xmp_is_kept_or_dropped(packet: bytes) -> None:
    opened(encode(decode(file(RGB, "WEBP", xmp=packet)))).load()


def test_text_chunks_are_kept() -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Title", "a title")
    info.add_text("Location", "12 Home Street")
    written = encode(decode(file(RGB, pnginfo=info)))
    assert opened(written).text == {"Title": "a title"}  # type: ignore[attr-defined]


def header(width: int, height: int) -> bytes:
    """A PNG that claims to be this large and holds nothing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (chunk, end)
    )


FRAMES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]

UNUSABLE = {
    "empty": (b"", "empty file"),
    "text": (b"hello there" * 9, "not an image of a kind that privet reads"),
    "truncated": (file(RGB)[:900], "damaged: image file is truncated"),
    "truncated jpeg": (file(RGB, "JPEG")[:-200], "damaged: image file is truncated"),
    "bomb": (header(30_000, 30_000), "too large to decode safely"),
    "larger than the limit": (header(9_500, 9_500), "too large to decode safely"),
    "animated": (
        file(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
        "animated or of several pages: 2 frames",
    ),
    "pages": (
        file(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]),
        "2 frames, of which only one",
    ),
    "float": (file(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"), "no defined white"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_files_say_why(kind: str) -> None:
    data, reason = UNUSABLE[kind]
    with pytest.raises(PictureError, match=reason):
        measure(data)
        decode(data)


def png16(kind: int, channels: int) -> bytes:
    """Return a PNG of 16 bits a channel, which Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in FINE[..., :channels])
    header = struct.pack(">IIBBBBB", 4, 4, 16, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def ppm(magic: str, white: int, channels: int) -> bytes:
    """Return a binary or plain PPM or PGM whose largest value is `white`."""
    values = (FINE[..., :channels] * (white / 65535)).round().astype(int)
    body = values.astype(">u2" if white > 255 else "u1").tobytes()
    if magic in ("P2", "P3"):
        body = (" ".join(map(str, values.ravel())) + "\n").encode()
    return f"{magic} 4 4 {white}\n".encode() + body


FINE = np.linspace(0, 65535, 64).astype(np.uint16).reshape(4, 4, 4)


@pytest.mark.parametrize(
    ("data", "reduced"),
    [
        (png16(2, 3), True),
        (png16(6, 4), True),
        (png16(4, 2), True),
        (png16(0, 1), False),
        (ppm("P6", 65535, 3), True),
        (ppm("P6", 1023, 3), True),
        (ppm("P3", 1023, 3), True),
        (ppm("P6", 255, 3), False),
        (ppm("P3", 15, 3), False),
        (ppm("P5", 65535, 1), False),
        (ppm("P5", 1023, 1), False),
        (ppm("P2", 1023, 1), False),
    ],
)
def test_lost_bits_are_noted(data: bytes, reduced: bool) -> None:
    picture = decode(data)
    assert picture.notes == (("reduced to 8 bits",) if reduced else ())
    coloured = np.ptp(picture.rgb.astype(int), axis=2).max() > 0
    wanted = FINE[..., : 3 if coloured else 1] / 257
    assert np.abs(picture.rgb - wanted).max() <= (
        1 if picture.notes or picture.deep is not None else 255 / 15
    )
    if picture.deep is not None:
        assert np.abs(picture.deep - FINE[..., 0].astype(int)).max() <= 33  # half a step of 1,023


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(PictureError, match="too large"):
        measure(UNUSABLE["bomb"][0])


def test_jpeg_is_refused_with_its_reason() -> None:
    with pytest.raises(
        UsageError, match="JPEG output is refused: its compression removes most of the protection"
    ):
        encode(decode(KINDS["rgb"][0]), format="jpeg")
    with pytest.raises(UsageError, match="Unknown image format 'gif'; expected png or webp"):
        encode(decode(KINDS["rgb"][0]), format="gif")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning:PIL")
@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    edits=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=12),
    end=st.integers(0, 5000),
)
def test_fuzzed_files_decode_or_say_why(kind: str, edits: list[tuple[int, int]], end: int) -> None:
    data = bytearray(KINDS[kind][0])
    for place, value in edits:
        data[place % len(data)] = value
    damaged = bytes(data[: max(8, len(data) - end)] if end % 3 == 0 else data)
    try:
        measure(damaged)
        picture = decode(damaged)
    except PictureError as error:
        assert str(error)
        return
    try:
        after = decode(encode(picture))
    except PictureError as error:
        assert str(error)
        return
    np.testing.assert_array_equal(after.rgb, picture.rgb)
