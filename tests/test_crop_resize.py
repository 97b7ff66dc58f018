"""crop_resize against a resize in float64, and what the loader's threads build on it."""

from __future__ import annotations

import gc
import io
import random
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from syncmask_fast.data.augment import AugmentParams
from syncmask_fast.data.decode.threads import BufferPool
from syncmask_fast.data.decode.transform import (
    CppTransform,
    JpegDecoder,
    TorchvisionTransform,
    change_colors,
    why_cpp_unavailable,
)
from syncmask_fast.data.images import decode_image
from syncmask_fast.kernels.crop_resize import LARGEST_SIDE, OPS, crop_resize
from tests.faults.mutations import edited, random_edits

pytestmark = pytest.mark.skipif(why_cpp_unavailable() is not None, reason=f"not built: {why_cpp_unavailable()}")
ONE, ZERO = torch.ones(3), torch.zeros(3)
# height and width of the image; x, y, width and height of the crop; S
CASES = [
    (1, 1, (0, 0, 1, 1), 1),
    (1, 1, (0, 0, 1, 1), 37),
    (5, 300, (0, 0, 300, 5), 1),
    (256, 256, (10, 20, 230, 200), 224),
    (256, 256, (0, 0, 224, 224), 224),
    (61, 53, (52, 60, 1, 1), 19),
    (61, 53, (0, 7, 1, 54), 31),
    (61, 53, (7, 0, 46, 1), 17),
    (97, 101, (3, 5, 94, 89), 13),
    (300, 200, (0, 0, 200, 300), 16),
    (13, 11, (2, 1, 5, 7), 127),
    (1000, 30, (0, 0, 30, 1000), 33),
]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def matrix(source: int, target: int) -> np.ndarray:
    """float64 [target, source]: how much of each pixel of a line is in each pixel of the resized line."""
    scale = source / target
    distance = np.abs(np.arange(source) + 0.5 - (np.arange(target)[:, None] + 0.5) * scale) / max(scale, 1)
    weights = np.clip(1 - distance, 0, None)
    return weights / weights.sum(1, keepdims=True)


def resized(image: np.ndarray, crop: tuple[int, int, int, int], size: int) -> np.ndarray:
    """float64 [3, S, S], not rounded."""
    x, y, width, height = crop
    part = image[y : y + height, x : x + width].astype(np.float64)
    return np.einsum("ih,hwc,jw->cij", matrix(height, size), part, matrix(width, size), optimize=True)


def run(
    image: np.ndarray,
    crop,
    size: int,
    backend: str,
    *,
    flip: bool = False,
    factors=(1.0, 1.0, 1.0),
    scale=ONE,
    shift=ZERO,
) -> np.ndarray:
    batch = torch.full((3, 3, size, size), -7.0)
    crop_resize(torch.from_numpy(image), *crop, flip, *factors, scale, shift, batch[1], backend=backend)
    assert (batch[0] == -7).all()
    assert (batch[2] == -7).all()
    return batch[1].numpy()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("height", "width", "crop", "size"), CASES)
def test_matches_reference(height, width, crop, size, flip, backend):
    image = noise(height, width)
    exact = resized(image, crop, size)[:, :, :: -1 if flip else 1]
    levels = run(image, crop, size, backend, flip=flip)
    assert (levels == np.rint(levels)).all()
    assert np.abs(levels - exact).max() < 0.5 + 1e-4


@pytest.mark.parametrize("factors", [(1.3, 0.7, 0.6), (0.2, 1.9, 1.0), (1.0, 1.0, 0.0), (2.0, 1.0, 1.0)])
def test_colors(factors, backend):
    image, crop, size = noise(50, 70), (3, 4, 60, 41), 27
    levels = run(image, crop, size, backend)
    brightness, contrast, saturation = factors
    grey = np.tensordot([0.299, 0.587, 0.114], levels.astype(np.float64), 1)
    exact = brightness * (contrast * (saturation * levels + (1 - saturation) * grey - 128) + 128)
    changed = run(image, crop, size, backend, factors=factors)
    assert np.abs(changed - exact.clip(0, 255)).max() < 0.5 + 1e-3
    change_colors(levels, *np.array(factors, np.float32))
    assert np.abs(levels - exact.clip(0, 255)).max() < 0.5 + 1e-3
    assert (changed == np.rint(changed)).all()
    assert changed.min() >= 0
    assert changed.max() <= 255
    scale, shift = torch.tensor([0.1, 2.0, 0.5]), torch.tensor([-3.0, 0.0, 7.0])
    normalized = run(image, crop, size, backend, factors=factors, scale=scale, shift=shift)
    np.testing.assert_allclose(
        normalized, changed * scale.numpy()[:, None, None] + shift.numpy()[:, None, None], rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 1}, "one within the image of 6 x 5"),
        ({"y": -1}, "one within the image"),
        ({"width": 0}, "one within the image"),
        ({"height": 2**62, "y": 2**62}, "one within the image"),
        ({"image": torch.zeros(5, 6, 4, dtype=torch.uint8)}, "expected contiguous uint8"),
        ({"image": torch.zeros(3, 5, 6, dtype=torch.uint8).permute(1, 2, 0)}, "expected contiguous uint8"),
        ({"image": torch.zeros(5, 6, 3)}, "expected contiguous uint8"),
        ({"out": torch.zeros(3, 4, 5)}, "expected contiguous float32"),
        ({"out": torch.zeros(3, 4, 4, dtype=torch.float64)}, "expected contiguous float32"),
        ({"out": torch.zeros(4, 4, 3).permute(2, 0, 1)}, "expected contiguous float32"),
        ({"out": torch.zeros(3, 0, 0)}, "expected contiguous float32"),
        ({"scale": torch.ones(4)}, "scale is float32 "),
        (
            {"image": torch.zeros(1, LARGEST_SIDE + 1, 3, dtype=torch.uint8), "width": LARGEST_SIDE + 1, "height": 1},
            "expected at most 65536",
        ),
    ],
)
def test_errors(changes, message):
    image, out = torch.zeros(5, 6, 3, dtype=torch.uint8), torch.zeros(3, 4, 4)
    arguments = dict(
        image=image,
        x=0,
        y=0,
        width=6,
        height=5,
        flip=False,
        brightness=1,
        contrast=1,
        saturation=1,
        scale=ONE,
        shift=ZERO,
        out=out,
    )
    with pytest.raises(ValueError, match=message):
        crop_resize(**(arguments | changes))


@pytest.mark.parametrize("op", [OPS.auto, OPS.reference], ids=str)
def test_opcheck(op):
    image, out = torch.from_numpy(noise(9, 7)), torch.zeros(3, 4, 4)
    torch.library.opcheck(op, (image, 1, 2, 5, 6, True, 1.1, 0.9, 0.8, ONE, ZERO, out))


def test_other_threads_run_meanwhile():
    """The interpreter is free while an image is resized: another thread counts on."""
    image, out, counted, stop = (
        torch.zeros(8000, 8000, 3, dtype=torch.uint8),
        torch.zeros(3, 64, 64),
        [0],
        threading.Event(),
    )

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    before = counted[0]
    crop_resize(image, 0, 0, 8000, 8000, False, 1, 1, 1, ONE, ZERO, out)
    during = counted[0] - before
    stop.set()
    thread.join()
    assert during > 20, during


def params(width: int, height: int, flip: bool = False, factors=(1.0, 1.0, 1.0)) -> AugmentParams:
    whole = (np.array([n], np.int32) for n in (0, 0, width, height))
    return AugmentParams(*whole, np.array([flip]), *(np.array([n], np.float32) for n in factors))


def jpeg(width: int, height: int, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    coarse = Image.fromarray(noise(height // 8 + 2, width // 8 + 2)).resize((width, height), Image.Resampling.BICUBIC)
    coarse.convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


JPEGS = {
    f"{subsampling} {width} x {height}{' progressive' if progressive else ''}": jpeg(
        width, height, quality=90, subsampling=subsampling, progressive=progressive
    )
    for subsampling in ("4:4:4", "4:2:2", "4:2:0")
    for width, height in ((64, 48), (37, 53), (1, 1), (3, 200))
    for progressive in (False, True)
} | {
    "grey": jpeg(50, 61, mode="L"),
    "CMYK": jpeg(50, 61, mode="CMYK"),
    "RGB": jpeg(50, 61, keep_rgb=True),
    "restarts": jpeg(90, 91, restart_marker_blocks=3),
}


@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_have_the_bytes_of_pillow(name):
    decoder = JpegDecoder()
    decoder(jpeg(200, 200))  # leaves its pixels in the memory
    assert np.array_equal(decoder(JPEGS[name]), decode_image(JPEGS[name]))
    if name != "CMYK":
        import simplejpeg

        assert np.array_equal(
            simplejpeg.decode_jpeg(JPEGS[name], "RGB"), decode_image(JPEGS[name])
        )  # not by Pillow after all


def test_damaged_jpegs_are_judged_by_pillow():
    """Whatever is damaged gives Pillow's pixels, or is refused in Pillow's words."""
    decoder, draw, refused, same = JpegDecoder(), random.Random(5), 0, 0
    originals = [JPEGS["4:2:0 64 x 48"], JPEGS["4:4:4 37 x 53 progressive"], JPEGS["grey"]]
    for _ in range(600):
        damaged = edited(draw.choice(originals), random_edits(draw))
        outcomes = []
        for decode in (decode_image, decoder):
            try:
                outcomes.append(decode(damaged))
            except ValueError as error:
                outcomes.append(str(error).split(" object at ")[0])
        assert type(outcomes[0]) is type(outcomes[1]), outcomes
        if isinstance(outcomes[0], str):
            assert outcomes[0] == outcomes[1]
            refused += 1
        else:
            assert np.array_equal(*outcomes)
            same += 1
    assert min(refused, same) > 50


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("factors", [(1, 1, 1), (1.2, 0.9, 0.8)])
def test_transforms_agree(flip, factors):
    """torchvision rounds between its two directions, the compiled way does not.

    Measured: a mean of up to 0.17 levels of 255, at most 1 level, after a change of colors 2.
    """
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.5, 0.3)
    for name in JPEGS:
        height, width = decode_image(JPEGS[name]).shape[:2]
        pixels = torch.empty(2, 3, 32, 32)
        for row, way in enumerate((TorchvisionTransform(mean, std), CppTransform(mean, std))):
            way(JPEGS[name], params(width, height, flip, factors), 0, pixels[row])
        levels = (pixels[0] - pixels[1]).abs() * 255 * torch.tensor(std)[:, None, None]
        assert levels.max() < (1.001 if factors == (1, 1, 1) else 2.001), name
        assert levels.mean() < 0.2, name


def test_images_too_wide_for_the_compiled_way():
    out = io.BytesIO()
    Image.fromarray(noise(1, LARGEST_SIDE + 10)).save(out, "PNG")
    pixels = torch.empty(2, 3, 8, 8)
    for row, way in enumerate((TorchvisionTransform(*[(0.5,) * 3] * 2), CppTransform(*[(0.5,) * 3] * 2))):
        way(out.getvalue(), params(LARGEST_SIDE + 10, 1), 0, pixels[row])
    assert pixels[0].equal(pixels[1])


HOLDERS = {
    "the tensor": lambda x: x,
    "a view": lambda x: x[1:],
    "a view of a view": lambda x: x.view(-1)[3:5].reshape(2),
    "detached": lambda x: x.detach(),
    "an array": lambda x: x.numpy()[1],
    "another tensor of an array": lambda x: torch.from_numpy(x[1:].numpy()),
    "a capsule": lambda x: torch.from_dlpack(x),
    "autograd": lambda x: (x * torch.ones(1, requires_grad=True)).sum(),
    "the storage": lambda x: x.untyped_storage(),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_memory_that_is_held_is_not_used_again(name):
    memory = BufferPool((2, 3), 1)
    first = memory.take(2)
    address = first.data_ptr()
    held = HOLDERS[name](first)
    del first
    gc.collect()
    assert memory.take(2).data_ptr() != address
    del held
    gc.collect()
    assert memory.take(1).data_ptr() == address
    copy = memory.take(2).clone()
    assert memory.take(2).data_ptr() == address  # a copy holds nothing
    assert copy.shape == (2, 3)
    assert memory.take(0).shape == (0, 3)
