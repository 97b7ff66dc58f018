"""DALI's way from encoded images to pixels: on the GPU's JPEG decoder where there is one, else on CPU.

Whatever is random comes in as numbers (`AugmentParams`); DALI's own generators are not used. A damaged image
makes DALI give up the whole pipeline (on CPU: an error for truncated files, no error for damage within the
coded data, both as libjpeg-turbo has it). So truncated files are kept out beforehand (`check_image`), and
when it still fails, the batch is looked through with Pillow, then image by image with DALI, the pipeline is built anew, and everything that was
under way is fed again: the consumer sees at most that the batch is shorter.
"""

from __future__ import annotations

import sys
from collections import deque

import numpy as np
import torch
from torch import Tensor

from syncmask_fast.data.decode.base import DecodeRequest, check_crop
from syncmask_fast.data.images import as_png, decode_image
from syncmask_fast.utils.errors import UserError

QUEUE_DEPTH = 2  # batches that DALI works on ahead of the consumer
MAX_FAILURES = 3  # of one batch: for a damaged image, for one that only Pillow reads, for anything else


def why_dali_unavailable() -> str | None:
    """Why DALI cannot be used here, or None if it can."""
    try:
        import nvidia.dali.fn  # noqa: F401
    except Exception as error:  # a missing CUDA library raises OSError or RuntimeError, not ImportError
        return str(error) or type(error).__name__
    return None


class DaliDecoder:
    """One DALI pipeline that is kept from epoch to epoch. See `Decoder`."""

    depth = QUEUE_DEPTH

    def __init__(
        self,
        *,
        batch_size: int,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        jitter: bool,
        device: torch.device,
        threads: int,
    ) -> None:
        self.batch_size, self.size, self.mean, self.std, self.jitter = batch_size, size, mean, std, jitter
        self.device, self.threads = device, threads
        self._feed: deque[DecodeRequest] = deque()  # to be read by the pipeline
        self._started: deque[tuple[DecodeRequest, dict[int, str]]] = deque()
        self._waiting: deque[DecodeRequest] = deque()  # the last of those started, until the one that failed is through
        self._recode: set[int] = set()  # samples that Pillow reads and DALI does not
        self._failures = 0  # of the oldest batch
        self._pipeline = self._build()

    def submit(self, job: DecodeRequest) -> None:
        if self._recode:
            job.encoded = self._recoded(job)
        self._started.append((job, {}))
        self._waiting.append(job)
        if len(self._waiting) == 1:
            self._schedule_waiting()

    def result(self) -> tuple[DecodeRequest, Tensor, dict[int, str]]:
        while True:
            job, refused = self._started[0]
            if len(job) == 0:
                pixels = torch.empty(0, 3, self.size, self.size, device=self.device)
            else:
                try:
                    if self._failed:
                        raise RuntimeError("the DALI pipeline stopped")
                    pixels = self._outputs()
                except (
                    Exception
                ) as error:  # DALI raises RuntimeError, IndexError, StopIteration ... for the same damage
                    self._recover(error)
                    continue
            self._started.popleft()
            self._failures = 0
            self._schedule_waiting()
            return job, pixels, refused

    def flush(self) -> None:
        if sys.is_finalizing():  # a loader that nobody closed: there is nothing left to build a pipeline with
            return
        try:
            for job, _ in list(self._started)[: len(self._started) - len(self._waiting)]:
                if len(job) and not self._failed:
                    self._outputs()
        except Exception:  # a damaged image among those that nobody wants any more
            self._failed = True
        self._started.clear()
        self._waiting.clear()
        self._feed.clear()
        if self._failed:
            self._pipeline = self._build()

    def close(self) -> None:
        self._started.clear()
        self._waiting.clear()
        self._feed.clear()
        self._pipeline = None  # its destructor stops the threads

    def _build(self):
        """The pipeline, ready and empty."""
        from nvidia.dali import fn, pipeline_def, types

        self._failed = False
        on_gpu = self.device.type == "cuda"

        @pipeline_def(
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=QUEUE_DEPTH,
            exec_dynamic=True,
        )
        def images():
            colours = 3 if self.jitter else 0
            encoded, start, extent, flip, *factors = fn.external_source(
                source=self._next_inputs,
                num_outputs=4 + colours,
                batch=True,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32] + [types.FLOAT] * colours,
                ndim=[1, 1, 1] + [0] * (1 + colours),
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
        """Called by the pipeline within `schedule_run`."""
        if not self._feed:
            raise StopIteration
        job = self._feed.popleft()
        params = job.params
        return (
            [np.frombuffer(data, np.uint8) for data in job.encoded],
            np.stack([params.x, params.y], 1),
            np.stack([params.width, params.height], 1),
            params.flip.astype(np.int32),
            *((params.brightness, params.contrast, params.saturation) if self.jitter else ()),
        )

    def _schedule_waiting(self) -> None:
        while self._waiting:
            job = self._waiting.popleft()
            try:
                self._schedule(job)
            except Exception:  # an earlier batch has failed meanwhile, which `finish` will find
                self._failed = True

    def _schedule(self, job: DecodeRequest) -> None:
        if len(job) == 0:
            return
        self._feed.append(job)
        self._pipeline.reset()  # the source may have said "no more", which the pipeline would keep believing
        self._pipeline.schedule_run()

    def _outputs(self) -> Tensor:
        """Zero-copy: with the dynamic executor an output lives as long as its tensor."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                (pixels,) = self._pipeline.outputs(torch.cuda.current_stream())
                return torch.from_dlpack(pixels.as_tensor())
        (pixels,) = self._pipeline.outputs()
        return torch.from_dlpack(pixels.as_tensor())

    def _recover(self, error: Exception) -> None:
        """Finds what the oldest batch failed on, takes it out, or has Pillow decode it, and starts over with all batches under way.

        What an image becomes hangs on the image alone, so that a run that is resumed meets the same pixels. A failure that no image explains is
        met by a new pipeline. errors: UserError where that does not help.
        """
        self._failures += 1
        if self._failures > MAX_FAILURES:
            raise UserError(
                f"DALI failed {self._failures} times on the same images, at last with: {' '.join(str(error).split())[:300]}; "
                "choose --decoder torchvision, or start again where something else may have used up its memory"
            ) from error
        job, refused = self._started[0]
        damaged: dict[int, str] = {}
        for row, (sample, data) in enumerate(zip(job.samples, job.encoded, strict=True)):
            try:
                check_crop(job.params, row, decode_image(data))
            except ValueError as reason:
                damaged[int(sample)] = str(reason)
        self._feed.clear()
        self._pipeline = self._build()
        if damaged:
            job = job.without(damaged)
        else:  # those that Pillow can read and DALI cannot, if that is the cause
            unreadable = self._unreadable(job)
            self._recode |= unreadable
            job.encoded = self._recoded(job)
        self._started[0] = job, refused | damaged
        self._waiting = deque(later for later, _ in list(self._started)[1:])
        self._schedule(job)

    def _unreadable(self, job: DecodeRequest) -> set[int]:
        """The samples that DALI fails on one by one. The pipeline is new before and after."""
        found = set()
        for sample in job.samples.tolist():
            try:
                self._schedule(job.without(set(job.samples.tolist()) - {sample}))
                self._outputs()
            except Exception:  # whatever DALI raises
                found.add(sample)
                self._feed.clear()
                self._pipeline = self._build()
        return found

    def _recoded(self, job: DecodeRequest) -> list[bytes]:
        """The encoded images, with those that DALI cannot read as PNG."""
        return [
            as_png(decode_image(data)) if int(sample) in self._recode else data
            for sample, data in zip(job.samples, job.encoded, strict=True)
        ]
