"""Decoding by DALI: on the GPU's JPEG decoder where there is one, else on the CPU.

DALI's random generators are not used: all random numbers come in as `AugmentParams`. A damaged image makes DALI give up
the whole pipeline. Truncated files are filtered before (`check_image`); when DALI still fails, `DaliDecoder._recover`
finds the images, builds a new pipeline and submits all pending batches again.
"""

from __future__ import annotations

import sys
from collections import deque

import numpy as np
import torch
from torch import Tensor

from syncmask_fast.data.decode.base import DecodeRequest, check_crop
from syncmask_fast.data.images import as_png, decode_image
from syncmask_fast.utils.errors import UserError, one_line

QUEUE_DEPTH = 2  # batches that DALI decodes ahead of the consumer
MAX_FAILURES = 3  # of one batch: a damaged image, one that only Pillow reads, anything else


def why_dali_unavailable() -> str | None:
    """Return why DALI cannot be used here, or None if it can."""
    try:
        import nvidia.dali.fn  # noqa: F401
    except Exception as error:  # a missing CUDA library raises OSError or RuntimeError, not ImportError
        return one_line(error)
    return None


class DaliDecoder:
    """A `Decoder` that keeps one DALI pipeline for all epochs."""

    backend, depth = "dali", QUEUE_DEPTH

    def __init__(
        self,
        batch_size: int,
        size: int,
        device: torch.device,
        threads: int,
        jitter: bool,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        self.batch_size, self.size, self.device, self.threads = batch_size, size, device, threads
        self.jitter, self.mean, self.std = jitter, mean, std
        self._feed: deque[DecodeRequest] = deque()  # to be read by the pipeline
        self._submitted: deque[tuple[DecodeRequest, dict[int, str]]] = deque()  # with the images that failed
        self._waiting: deque[DecodeRequest] = deque()  # the last of the submitted, not yet given to the pipeline
        self._recode: set[int] = set()  # samples that Pillow reads and DALI does not
        self._failures = 0  # of the oldest batch
        self._pipeline = self._build()

    def submit(self, request: DecodeRequest) -> None:
        if self._recode:
            request.encoded = self._recoded(request)
        self._submitted.append((request, {}))
        self._waiting.append(request)
        if len(self._waiting) == 1:
            self._schedule_waiting()

    def result(self) -> tuple[DecodeRequest, Tensor, dict[int, str]]:
        while True:
            request, failed = self._submitted[0]
            if len(request) == 0:
                pixels = torch.empty(0, 3, self.size, self.size, device=self.device)
            else:
                try:
                    if self._broken:
                        raise RuntimeError("the DALI pipeline stopped")
                    pixels = self._outputs()
                except Exception as error:  # RuntimeError, IndexError, StopIteration ... for the same damage
                    self._recover(error)
                    continue
            self._submitted.popleft()
            self._failures = 0
            self._schedule_waiting()
            return request, pixels, failed

    def flush(self) -> None:
        if sys.is_finalizing():  # a loader that nobody closed: a pipeline can no longer be built
            return
        try:
            for request, _ in list(self._submitted)[: len(self._submitted) - len(self._waiting)]:
                if len(request) and not self._broken:
                    self._outputs()
        except Exception:  # a damaged image among the forgotten ones
            self._broken = True
        self._clear()
        if self._broken:
            self._pipeline = self._build()

    def close(self) -> None:
        self._clear()
        self._pipeline = None  # its destructor stops the threads

    def _clear(self) -> None:
        for requests in (self._submitted, self._waiting, self._feed):
            requests.clear()

    def _build(self):
        """Return a new, empty pipeline."""
        from nvidia.dali import fn, pipeline_def, types

        self._broken = False
        on_gpu = self.device.type == "cuda"

        @pipeline_def(
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=QUEUE_DEPTH,
            exec_dynamic=True,
        )
        def images():
            factor_count = 3 if self.jitter else 0
            encoded, start, extent, flip, *factors = fn.external_source(
                source=self._next_inputs,
                num_outputs=4 + factor_count,
                batch=True,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32] + [types.FLOAT] * factor_count,
                ndim=[1, 1, 1] + [0] * (1 + factor_count),
            )
            pixels = fn.decoders.image_slice(
                encoded,
                start=start,
                shape=extent,
                axis_names="WH",
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
            )
            pixels = fn.resize(pixels, size=[self.size, self.size], interp_type=types.INTERP_LINEAR, antialias=True)
            if self.jitter:
                pixels = fn.color_twist(pixels, brightness=factors[0], contrast=factors[1], saturation=factors[2])
            return fn.crop_mirror_normalize(
                pixels,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * value for value in self.mean],
                std=[255 * value for value in self.std],
                mirror=flip,
            )

        pipeline = images()
        pipeline.build()
        return pipeline

    def _next_inputs(self) -> tuple:
        """Return one batch of inputs; called by the pipeline within `schedule_run`."""
        if not self._feed:
            raise StopIteration
        request = self._feed.popleft()
        params = request.params
        return (
            [np.frombuffer(data, np.uint8) for data in request.encoded],
            np.stack([params.x, params.y], 1),
            np.stack([params.width, params.height], 1),
            params.flip.astype(np.int32),
            *((params.brightness, params.contrast, params.saturation) if self.jitter else ()),
        )

    def _schedule_waiting(self) -> None:
        while self._waiting:
            request = self._waiting.popleft()
            try:
                self._schedule(request)
            except Exception:  # an earlier batch has failed meanwhile; `result` recovers
                self._broken = True

    def _schedule(self, request: DecodeRequest) -> None:
        if len(request) == 0:
            return
        self._feed.append(request)
        self._pipeline.reset()  # after a StopIteration the pipeline would not ask the source again
        self._pipeline.schedule_run()

    def _outputs(self) -> Tensor:
        """Return the oldest batch's pixels, without a copy: a dynamic executor's output lives as long as its tensor."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                (pixels,) = self._pipeline.outputs(torch.cuda.current_stream())
                return torch.from_dlpack(pixels.as_tensor())
        (pixels,) = self._pipeline.outputs()
        return torch.from_dlpack(pixels.as_tensor())

    def _recover(self, error: Exception) -> None:
        """Leave out or recode the images that the oldest batch failed on, and schedule all pending batches again.

        errors: UserError if the batch has failed MAX_FAILURES times.
        """
        self._failures += 1
        if self._failures > MAX_FAILURES:
            raise UserError(
                f"DALI failed {self._failures} times on the same images, at last with: {one_line(error)}. "
                "Choose --decoder torchvision, or free memory and start again."
            ) from error
        # 1. Images that Pillow cannot read either are damaged.
        request, failed = self._submitted[0]
        damaged: dict[int, str] = {}
        for row, (sample, data) in enumerate(zip(request.sample_ids.tolist(), request.encoded, strict=True)):
            try:
                check_crop(request.params, row, decode_image(data))
            except ValueError as reason:
                damaged[sample] = str(reason)
        self._feed.clear()
        self._pipeline = self._build()
        # 2. Otherwise recode those that only Pillow reads, each by itself: its pixels must not depend on its batch,
        #    because a resumed run has other batches.
        if damaged:
            request = request.without(damaged)
        else:
            self._recode |= self._unreadable(request)
            request.encoded = self._recoded(request)
        # 3. All batches once more. If no image explains the failure, the new pipeline may.
        self._submitted[0] = request, failed | damaged
        self._waiting = deque(later for later, _ in list(self._submitted)[1:])
        self._schedule(request)

    def _unreadable(self, request: DecodeRequest) -> set[int]:
        """Return the samples that DALI fails on one by one. The pipeline is new before and after."""
        unreadable, samples = set(), request.sample_ids.tolist()
        for sample in samples:
            try:
                self._schedule(request.without(set(samples) - {sample}))
                self._outputs()
            except Exception:  # DALI raises many kinds
                unreadable.add(sample)
                self._feed.clear()
                self._pipeline = self._build()
        return unreadable

    def _recoded(self, request: DecodeRequest) -> list[bytes]:
        """Return the encoded images, as PNG where DALI cannot read them."""
        return [
            as_png(decode_image(data)) if sample in self._recode else data
            for sample, data in zip(request.sample_ids.tolist(), request.encoded, strict=True)
        ]
