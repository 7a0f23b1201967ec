"""One image file: decode it without losing what it carries, add a perturbation, encode it again.

Networks see upright 8-bit RGB. What else the file holds (transparency, 16 bits, a colour profile,
metadata) travels beside those pixels and goes back into the file that is written.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from privet.errors import UsageError
from privet.images.xmp import is_place, is_stale, without

# What Pillow may open, where it was built with it. Formats that run another program or describe
# vectors stay out.
Image.init()
KINDS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
READABLE = tuple(kind for kind in KINDS if kind in Image.OPEN)
FORMATS = {"png": ".png", "webp": ".webp"}
METADATA = ("keep", "strip")

# Pillow's own limit against decompression bombs, checked here before anything is decoded.
MAX_PIXELS = 89_478_485
WEBP_SIDE = 16_383

SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
ORIENTATION, GPS, EXIF_IFD, MAKER_NOTE, INTEROPERABILITY = 0x0112, 0x8825, 0x8769, 0x927C, 0xA005
# The EXIF tags that describe the picture: ImageDescription, Make, Model, Software, DateTime, Artist,
# HostComputer, Copyright, Rating, XPTitle to XPSubject. Any other may describe the old file's
# structure, or hold a thumbnail: a small copy of the image without its protection.
DESCRIPTIVE = frozenset(
    (
        0x010E,
        0x010F,
        0x0110,
        0x0131,
        0x0132,
        0x013B,
        0x013C,
        0x8298,
        0x4746,
        0x4749,
        *range(0x9C9B, 0x9CA0),
    )
)


class PictureError(Exception):
    """One file that cannot be used; the message is the reason it is skipped with."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A decoded image file.

    Attributes:
        rgb: uint8, (height, width, 3), upright: what networks see.
        grey: the file has one channel; the three of `rgb` are equal and must stay so.
        alpha: uint8, (height, width), or None.
        deep: uint16, (height, width), the values of a 16-bit grey file, or None.
        profile: ICC colour profile of the pixels, or None.
        exif: EXIF that describes the picture, without orientation, location and thumbnails, or None.
        location: the GPS part of the EXIF, by tag.
        xmp: XMP packet, or None.
        text: textual chunks of a PNG.
        dpi: resolution, or None.
        notes: what could not be kept, in words.
    """

    rgb: NDArray[np.uint8]
    grey: bool = False
    alpha: NDArray[np.uint8] | None = None
    deep: NDArray[np.uint16] | None = None
    profile: bytes | None = None
    exif: bytes | None = None
    location: dict[int, Any] = field(default_factory=dict)
    xmp: bytes | None = None
    text: dict[str, str] = field(default_factory=dict)
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.rgb.shape[0], self.rgb.shape[1]

    def perturbed(self, delta: NDArray[np.int16]) -> Self:
        """Return the picture with `delta`, (height, width, 3) in 1/255, added and clipped."""
        rgb = np.clip(self.rgb.astype(np.int16) + delta, 0, 255).astype(np.uint8)
        deep = self.deep
        if deep is not None:
            # 65535 is 257 times 255, so a step of 1/255 is 257 of a 16-bit file's steps.
            deep = np.clip(deep.astype(np.int32) + 257 * delta[:, :, 0].astype(np.int32), 0, 65535).astype(
                np.uint16
            )
            rgb = _eight_bits(deep)
        return replace(self, rgb=rgb, deep=deep)


def measure(data: bytes) -> tuple[int, int]:
    """Return height and width, upright, without decoding.

    Raises:
        PictureError: not an image, one too large to decode safely, or animated.
    """
    with _open(data) as image:
        _frames(image)  # what is skipped later must not decide at which size the others are seen
        width, height = image.size
        try:  # by its own tag Pillow has turned a TIFF file already
            turned = (
                ORIENTATION not in getattr(image, "tag_v2", ())
                and image.getexif().get(ORIENTATION) in SIDEWAYS
            )
        except Exception:
            turned = False
    return (width, height) if turned else (height, width)


def _frames(image: Image.Image) -> int:
    """Return how many pictures a file holds: one, or several of which the first will do."""
    try:
        frames = int(getattr(image, "n_frames", 1))
    except Exception as error:
        raise PictureError(f"damaged: {_words(error)}") from error
    if frames > 1 and image.format not in ("MPO", "ICO"):
        raise PictureError(
            f"animated or of several pages: {frames} frames, of which only one could be protected"
        )
    return frames


def decode(data: bytes) -> Picture:
    """Decode an image file.

    Raises:
        PictureError: not an image, damaged, too large, animated, or of a kind without 8-bit pixels.
    """
    with _open(data) as image:
        notes = []
        if (frames := _frames(image)) > 1:
            notes.append(f"the first of {frames} pictures was kept")
        if _reduced(image):
            notes.append("reduced to 8 bits")
        try:
            image.load()
        except Exception as error:
            raise PictureError(f"damaged: {_words(error)}") from error
        metadata = _metadata(image, notes)
        try:
            upright = ImageOps.exif_transpose(image)
        except Exception:
            upright = image
        if image.format == "PPM" and image.mode == "I":  # Pillow widens grey of 9 to 16 bits to all 16
            upright = Image.fromarray(np.array(image).astype(np.uint16))
        try:
            return Picture(**_pixels(upright, metadata, notes), **metadata, notes=tuple(notes))
        except PictureError:
            raise
        except Exception as error:
            raise PictureError(f"damaged: {_words(error)}") from error


def encode(picture: Picture, *, format: str = "png", metadata: str = "keep", gps: bool = False) -> bytes:
    """Return the picture as a lossless file.

    Args:
        picture: what to write.
        format: "png" or "webp" (lossless).
        metadata: "keep" or "strip"; the colour profile is part of the pixels and always kept.
        gps: whether kept metadata include the location.

    Raises:
        PictureError: the format cannot hold this picture.
    """
    check_format(format)
    image = _image(picture, format)
    options: dict[str, Any] = {"icc_profile": picture.profile}
    kept = metadata == "keep"
    exif = _exif(picture, gps) if kept else None
    if exif is not None:
        options["exif"] = exif
    xmp = picture.xmp if kept else None
    if xmp and not gps:
        xmp = without(xmp, is_place)
    if format == "webp":
        if max(image.size) > WEBP_SIDE:
            raise PictureError(f"larger than WebP's {WEBP_SIDE} pixels a side; use png")
        options.update(lossless=True, exact=True, method=2, quality=50)
        if xmp:
            options["xmp"] = xmp
    else:
        info = PngImagePlugin.PngInfo()
        if xmp:
            info.add_itxt("XML:com.adobe.xmp", xmp.decode("utf-8", "replace"))
        for key, value in (picture.text if kept else {}).items():
            if gps or not is_place(key):
                info.add_itxt(key, value)
        options.update(pnginfo=info, compress_level=6)
        if kept and picture.dpi:
            options["dpi"] = picture.dpi
    buffer = io.BytesIO()
    image.save(buffer, format.upper(), **options)
    return buffer.getvalue()


def check_format(format: str) -> None:
    """Raise UsageError unless images can be written in this format without loss."""
    if format.lower() in ("jpg", "jpeg"):
        raise UsageError(
            "JPEG output is refused: its compression removes most of the protection that was just added "
            "(an audit's jpeg rows show how much). Write png or webp; both are lossless."
        )
    if format not in FORMATS:
        raise UsageError(f"Unknown image format {format!r}; expected {' or '.join(FORMATS)}.")


def _open(data: bytes) -> Image.Image:
    if not data:
        raise PictureError("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=READABLE)
    except Image.DecompressionBombError as error:
        raise PictureError(f"too large to decode safely: {_words(error)}") from error
    except Exception as error:
        raise PictureError("not an image of a kind that privet reads, or its header is damaged") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(
            f"too large to decode safely: {width} x {height} pixels; the limit is {MAX_PIXELS}"
        )
    if width < 1 or height < 1:
        raise PictureError("an image without pixels")
    return image


def _pixels(image: Image.Image, metadata: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the fields of a Picture that hold pixels."""
    mode = image.mode
    if mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        deep = np.array(image).astype(np.uint16)
        return {"rgb": _eight_bits(deep), "grey": True, "deep": deep}
    if mode in ("I", "F"):
        raise PictureError("pixels of 32 bits have no defined white; convert the file to 8 or 16 bits")
    if mode in ("P", "PA"):
        image = image.convert("RGBA" if "A" in mode or "transparency" in image.info else "RGB")
    elif mode == "1":
        image = image.convert("L")
        notes.append("two colours widened to grey")
    elif mode == "CMYK":
        image = _from_cmyk(image, metadata, notes)
    elif mode in ("YCbCr", "LAB", "HSV", "RGBX", "La", "RGBa"):
        image = image.convert("RGBA" if mode in ("La", "RGBa") else "RGB")
        metadata["profile"] = None
    elif "transparency" in image.info and mode in ("RGB", "L"):
        image = image.convert("RGBA" if mode == "RGB" else "LA")
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise PictureError(f"pixels of the kind {image.mode} are not read")
    array = np.array(image)
    if image.mode == "L":
        return {"rgb": np.repeat(array[:, :, None], 3, 2), "grey": True}
    if image.mode == "LA":
        return {
            "rgb": np.repeat(array[:, :, :1], 3, 2),
            "grey": True,
            "alpha": array[:, :, 1].copy(),
        }
    alpha = array[:, :, 3].copy() if image.mode == "RGBA" else None
    return {"rgb": np.ascontiguousarray(array[:, :, :3]), "alpha": alpha}


def _from_cmyk(image: Image.Image, metadata: dict[str, Any], notes: list[str]) -> Image.Image:
    """Convert print colours to sRGB, by the embedded profile if there is one."""
    profile, metadata["profile"] = metadata["profile"], None
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                ImageCms.createProfile("sRGB"),
                outputMode="RGB",
            )
            if converted is not None:
                notes.append("CMYK converted to sRGB by its profile")
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass
    notes.append("CMYK converted to RGB without a profile")
    return image.convert("RGB")


def _metadata(image: Image.Image, notes: list[str]) -> dict[str, Any]:
    """Collect what travels beside the pixels; broken metadata are dropped, with a note."""
    found: dict[str, Any] = {"profile": image.info.get("icc_profile") or None}
    try:
        exif, kept = image.getexif(), Image.Exif()
        for tag, value in exif.items():
            if tag in DESCRIPTIVE:
                kept[tag] = value
        details = {
            tag: value
            for tag, value in exif.get_ifd(EXIF_IFD).items()
            if tag not in (MAKER_NOTE, INTEROPERABILITY)
        }
        if details:
            kept.get_ifd(EXIF_IFD).update(details)
        found["location"] = dict(exif.get_ifd(GPS))
        found["exif"] = kept.tobytes() if len(kept) or details else None
    except Exception:
        found.update(location={}, exif=None)
        notes.append("unreadable EXIF dropped")
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if isinstance(xmp, str):
        xmp = xmp.encode()
    found["xmp"] = None
    if isinstance(xmp, bytes) and xmp.strip():
        found["xmp"] = without(xmp, is_stale)
        if found["xmp"] is None:
            notes.append("unreadable XMP dropped")
    text = getattr(image, "text", {}) if image.format == "PNG" else {}
    found["text"] = {
        str(key): str(value)
        for key, value in text.items()
        if key != "XML:com.adobe.xmp" and not key.startswith("Raw profile")
    }
    dpi = image.info.get("dpi")
    try:
        found["dpi"] = (float(dpi[0]), float(dpi[1])) if dpi and min(dpi) >= 1 else None
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        found["dpi"] = None
    return found


def _exif(picture: Picture, gps: bool) -> Image.Exif | None:
    exif = Image.Exif()
    if picture.exif:
        exif.load(picture.exif)
    if gps and picture.location:
        exif.get_ifd(GPS).update(picture.location)
    elif not picture.exif:
        return None
    return exif


def _image(picture: Picture, format: str) -> Image.Image:
    """Return the picture as Pillow's image in the narrowest mode that holds it."""
    if picture.deep is not None:
        if format == "webp":
            raise PictureError("16 bits do not fit into WebP; use png")
        return Image.fromarray(picture.deep)
    if picture.grey and format == "png":
        grey = picture.rgb[:, :, 0]
        if picture.alpha is None:
            return Image.fromarray(grey)
        return Image.fromarray(np.dstack((grey, picture.alpha)))
    if picture.alpha is not None:
        return Image.fromarray(np.dstack((picture.rgb, picture.alpha)))
    return Image.fromarray(picture.rgb)


def _eight_bits(deep: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Return 16-bit grey as RGB, (height, width, 3), rounded to the nearest 1/255."""
    grey = ((deep.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, 2)


def _reduced(image: Image.Image) -> bool:
    """Say whether loading an opened image drops bits: Pillow keeps more than 8 of one channel alone."""
    if image.mode.startswith("I"):
        return False
    for tile in getattr(image, "tile", ()):
        arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if any(isinstance(one, str) and ";16" in one for one in arguments):
            return True
        if tile.codec_name.startswith("ppm") and isinstance(arguments[-1], int) and arguments[-1] > 255:
            return True
    return False


def _words(error: Exception) -> str:
    """Return an error's message in one line, or its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
