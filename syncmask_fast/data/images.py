"""Encoded images: which format, how large, whether whole, and decoding one by one."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

MAX_PIXELS = 64_000_000
_NOT_SIZES = frozenset(b"\xc4\xc8\xcc")  # of the JPEG markers C0 to CF, those that are no start of frame
_PLAIN = frozenset(b"\x01\xd0\xd1\xd2\xd3\xd4\xd5\xd6\xd7\xd8")  # JPEG markers without a length


def image_format(data: bytes) -> str | None:
    """ "jpg", "png" or "webp" by the first bytes; None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def check_image(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded image, after checking that it is whole, without decoding it.

    The check reads the headers and looks for the end mark: 2 microseconds for a 21 KB JPEG (256 px), where
    decoding takes 350. It finds truncated files, which are what broken data sets hold; damage in the middle
    is left to the decoder.
    errors: ValueError with the reason: no known format, truncated, without size, or more than MAX_PIXELS.
    """
    kind = image_format(data)
    if not data:
        raise ValueError("the image is empty")
    if kind is None:
        raise ValueError("the image is neither JPEG, PNG nor WebP")
    try:
        width, height, whole = {"jpg": _check_jpeg, "png": _check_png, "webp": _check_webp}[kind](data)
    except IndexError:
        width, height, whole = 0, 0, False
    if not whole:
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
            return 0, 0, True  # no marker where one must be
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _PLAIN:
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in _NOT_SIZES:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            return (width, height, data.rfind(b"\xff\xd9") > at)  # the end mark; it cannot occur within coded data
        elif marker == 0xDA or marker == 0xD9:  # the picture or its end before its size
            return 0, 0, True
        else:
            at += 2 + max(2, data[at + 2] << 8 | data[at + 3])


def _check_png(data: bytes) -> tuple[int, int, bool]:
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"), data.rfind(b"IEND") > 24


def _check_webp(data: bytes) -> tuple[int, int, bool]:
    whole = int.from_bytes(data[4:8], "little") + 8 <= len(data) and len(data) >= 30
    if data[12:16] == b"VP8 ":
        size = int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    elif data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        size = int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return *size, whole


def decode_image(jpeg: bytes, size: int | None = None) -> np.ndarray:
    """Decodes one image, for reports and evaluation pictures.

    jpeg:    an encoded JPEG, PNG or WebP of at most MAX_PIXELS.
    size:    width and height of the result in pixels (bilinear, the aspect ratio is not kept: what the model
             sees); None keeps the own.
    returns: uint8 [H, W, 3] RGB, C-contiguous. Transparency is dropped, EXIF rotation is not applied (boxes
             mean stored pixels).
    errors:  ValueError where the image is damaged or too large.
    """
    check_image(jpeg)
    try:
        with Image.open(io.BytesIO(jpeg)) as image:
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            image = image.convert("RGB") if image.mode != "RGB" else image
            image.load()
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, IndexError and more
        raise ValueError(f"the image cannot be decoded ({error})") from None
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def as_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, 3] without loss, fast rather than small."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()
