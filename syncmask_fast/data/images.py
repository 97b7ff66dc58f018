"""Encoded images: format, size, a check for truncation, and decoding one by one."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from syncmask_fast.utils.errors import one_line

MAX_PIXELS = 64_000_000
PIXEL_MEAN = PIXEL_STD = (0.5, 0.5, 0.5)  # of red, green and blue on a scale of 0 to 1
# JPEG markers: C0 to CF start a frame and hold its size, except these; the next ones have no length.
_NO_FRAME = frozenset(b"\xc4\xc8\xcc")
_NO_LENGTH = frozenset(b"\x01\xd0\xd1\xd2\xd3\xd4\xd5\xd6\xd7\xd8")


def image_format(data: bytes) -> str | None:
    """Return "jpg", "png" or "webp" by the first bytes; None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def check_image(data: bytes) -> tuple[int, int]:
    """Return width and height of an encoded image after checking, without decoding, that it is not truncated.

    errors: ValueError with the reason: unknown format, truncated, without size, or more than MAX_PIXELS.
    """
    # Headers and end mark only: 2 microseconds for a 21 KB JPEG (256 px), where decoding takes 350. Truncated files
    # are what broken datasets hold; the decoder finds damage in the middle.
    if not data:
        raise ValueError("the image is empty")
    check = _CHECKS.get(image_format(data))
    if check is None:
        raise ValueError("the image is neither JPEG, PNG nor WebP")
    try:
        width, height, complete = check(data)
    except IndexError:
        width, height, complete = 0, 0, False
    if not complete:
        raise ValueError("the image is truncated")
    if width < 1 or height < 1:
        raise ValueError("the image has no size")
    if width * height > MAX_PIXELS:
        raise ValueError(f"the image has {width} x {height} pixels, more than {MAX_PIXELS:,}")
    return width, height


def _check_jpeg(data: bytes) -> tuple[int, int, bool]:
    at = 2
    while True:
        if data[at] != 0xFF:
            return 0, 0, True  # no marker at its place
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _NO_LENGTH:
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            return width, height, data.rfind(b"\xff\xd9") > at  # the end mark, which coded data cannot contain
        elif marker == 0xDA or marker == 0xD9:  # image data or the end before the size
            return 0, 0, True
        else:
            at += 2 + max(2, data[at + 2] << 8 | data[at + 3])


def _check_png(data: bytes) -> tuple[int, int, bool]:
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"), data.rfind(b"IEND") > 24


def _check_webp(data: bytes) -> tuple[int, int, bool]:
    complete = int.from_bytes(data[4:8], "little") + 8 <= len(data) and len(data) >= 30
    if data[12:16] == b"VP8 ":
        size = int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    elif data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        size = int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return *size, complete


_CHECKS = {"jpg": _check_jpeg, "png": _check_png, "webp": _check_webp}


def decode_image(encoded: bytes, size: int | None = None) -> np.ndarray:
    """Decode one image with Pillow.

    encoded: a JPEG, PNG or WebP of at most MAX_PIXELS.
    size:    width and height of the result (bilinear, without the aspect ratio: what the model sees); None keeps both.
    returns: uint8 [H, W, 3] RGB, C-contiguous. Transparency is dropped and EXIF rotation is not applied (boxes refer to
             stored pixels).
    errors:  ValueError if the image is damaged or too large.
    """
    check_image(encoded)
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image = _to_rgb(image)
            image.load()
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, IndexError and more
        raise ValueError(f"the image cannot be decoded ({one_line(error)})") from None
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB; 16-bit gray keeps its upper 8 bits."""
    if image.mode.startswith("I"):  # Pillow would clip 16-bit gray at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB") if image.mode != "RGB" else image


def as_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3] losslessly, with little compression because that is fast."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()
