"""The choice of a decoder."""

from __future__ import annotations

import torch

from syncmask_fast.data.decode.base import Decoder
from syncmask_fast.data.decode.dali import DaliDecoder, why_dali_unavailable
from syncmask_fast.data.decode.threads import ThreadedDecoder
from syncmask_fast.data.decode.transform import CppTransform, TorchvisionTransform, why_cpp_unavailable
from syncmask_fast.data.images import PIXEL_MEAN, PIXEL_STD
from syncmask_fast.utils.device import cpu_cores
from syncmask_fast.utils.errors import UserError

BACKENDS = ("auto", "cpp", "dali", "torchvision")
MAX_THREADS = 16


def make_decoder(
    backend: str,
    *,
    batch_size: int,
    size: int,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    jitter: bool = True,
    mean: tuple[float, float, float] = PIXEL_MEAN,
    std: tuple[float, float, float] = PIXEL_STD,
) -> Decoder:
    """Return the decoder of a backend; see `choose_backend`. All give the same pixels up to rounding.

    size:      width and height of the pixels; crops do not keep their aspect ratio.
    threads:   None takes the cores that this process may use, at most MAX_THREADS.
    jitter:    whether colors may change; without, DALI is faster.
    mean, std: of red, green and blue on a scale of 0 to 1, for normalization.
    errors:    UserError if the backend cannot be used here.
    """
    if min(batch_size, size) < 1:
        raise ValueError(f"batch_size {batch_size} and size {size} must be at least 1")
    device = torch.device(device)
    backend = choose_backend(backend, device)
    threads = threads or min(MAX_THREADS, cpu_cores())
    if backend == "dali":
        return DaliDecoder(batch_size, size, device, threads, jitter, mean, std)
    transform = (CppTransform if backend == "cpp" else TorchvisionTransform)(mean, std)
    return ThreadedDecoder(backend, transform, batch_size, size, device, threads)


def choose_backend(backend: str, device: torch.device) -> str:
    """Return "cpp", "dali" or "torchvision"; for "auto" the first that runs here.

    errors: UserError for an unknown name, or for one that does not run here.
    """
    if backend not in BACKENDS:
        raise UserError(f"--decoder {backend} is not known. Choose {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}.")
    if backend == "auto":
        # On CUDA DALI decodes on the GPU; on the CPU our operator is faster.
        order = ("dali", "cpp") if device.type == "cuda" else ("cpp", "dali")
        return next((name for name in order if why_unavailable(name) is None), "torchvision")
    reason = why_unavailable(backend)
    if reason is not None:
        raise UserError(f"--decoder {backend} does not run here ({reason}). Install it, or choose torchvision.")
    return backend


def why_unavailable(backend: str) -> str | None:
    """Return why a backend cannot be used here and how to get it, or None if it can."""
    if backend == "dali":
        reason = why_dali_unavailable()
        return reason and f"{reason}; `pip install nvidia-dali-cuda130`"
    if backend == "cpp":
        return why_cpp_unavailable()
    return None
