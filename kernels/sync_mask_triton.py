"""Launches the Triton kernels of `sync_mask`, and says which blocks they take.

The blocks come from a table on (T, P, D, dtype), never from timing at run time: the same call makes the same
launch, and every configuration can be compiled ahead of time (`ahead_of_time.py`).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from syncmask_fast.kernels import common, sync_mask

ONE_PASS_TOKENS = 64
ONE_PASS_PATCHES = {64: 256, 128: 64}  # by width: more spills registers on sm_80
_HALVES = (torch.bfloat16, torch.float16)


class Blocks(NamedTuple):
    """Constants and launch options of one kernel."""

    kernel: str
    constants: dict[str, int | bool]
    num_warps: int
    num_stages: int


def main_blocks(tokens: int, patches: int, width: int, dtype: torch.dtype, output: bool) -> Blocks:
    """The kernel that reads q and k of one sample's heads, for [.., T, D] against P patches.

    One pass where a head's logits fit the registers and the product runs on tensor cores; otherwise two, as for
    the word score "output" (`output`). float32 products run on the ordinary units: small tiles, in chunks of the
    width.
    """
    half = dtype in _HALVES
    wide = 64 if width <= 64 else max(128, _power_of_2(width))
    if half and not output and tokens <= ONE_PASS_TOKENS and patches <= ONE_PASS_PATCHES.get(wide, 0):
        block_p = 64 if patches <= 64 else 256
        constants = {"BLOCK_T": 64, "BLOCK_P": block_p, "BLOCK_D": wide}
        # Two or three stages fetch the next heads while this one is worked on; two spill the largest block's registers on sm_100.
        return Blocks(
            "_one_pass_kernel", constants, 4 if block_p == 64 else 8, 3 if block_p == 256 else 1 if wide == 128 else 2
        )
    constants = {"OUTPUT": output, "ALL_T": max(512, _power_of_2(tokens))}
    # The second product of "output" holds [BLOCK_T, D] more in registers, and parts of the weights.
    if half:
        block_t, block_p = (32, 32) if output else (64, 128)
        constants |= {"BLOCK_T": block_t, "BLOCK_P": block_p, "BLOCK_D": wide, "CHUNKS": 1}
        return Blocks("_two_pass_kernel", constants, 8, 1 if output else 2)
    constants |= {"BLOCK_T": 32, "BLOCK_P": 16 if output else 64, "BLOCK_D": 16, "CHUNKS": wide // 16}
    return Blocks("_two_pass_kernel", constants, 8, 1)


def finish_blocks(tokens: int, patches: int) -> Blocks:
    """The kernel that makes the masks from the sums of each head."""
    block = next(
        size for size in (64, 256, 1024, 4096, _power_of_2(max(tokens, patches))) if size >= max(tokens, patches)
    )
    return Blocks("_finish_kernel", {"BLOCK": block}, max(1, min(8, block // 256)), 1)


def configurations() -> Iterator[tuple[torch.dtype, Blocks]]:
    """Every (dtype of q, Blocks) that calls within T <= 512, P <= 4096 and D <= 128 can take, each once."""
    seen = []
    for dtype, output, tokens, patches, width in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), (False, True), (64, 512), (64, 256, 4096), (64, 128)
    ):
        seen.append((dtype, main_blocks(tokens, patches, width, dtype, output)))
    seen += [(torch.float32, finish_blocks(1, patches)) for patches in (64, 256, 1024, 4096)]
    for index, one in enumerate(seen):
        if one not in seen[:index]:
            yield one


def split_heads(batch: int, heads: int, processors: float) -> int:
    """How many heads of a sample one program of the one-pass kernel takes; all of them need no second launch.

    `processors` is how many programs run at a time, about. A program costs its heads and about half a head to
    start and end; a split below all heads costs about one head for the second launch.
    """

    def cost(count: int) -> float:
        programs = batch * math.ceil(heads / count)
        return math.ceil(programs / processors) * (count + 0.5) + (count < heads)

    return min(range(heads, 0, -1), key=cost)


def sync_mask_triton(
    q: Tensor,
    k: Tensor,
    maskable: Tensor,
    v: Tensor | None,
    token_ratio: float,
    patch_ratio: float,
    token_score: str,
    patch_score: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sync_mask` by Triton: (token_mask, patch_mask, token_score, patch_score); arguments are not checked.

    q, k, v:  as in `sync_mask`, any strides, never copied; float32, bfloat16 or float16.
    returns:  contiguous; bool [B, T] and [B, P], float32 [B, T] and [B, P].
    numerics: float32 throughout; products of half-precision inputs are summed in float32 on tensor cores, those
              of float32 inputs are not rounded to tf32. An infinite value in v counts as NaN for
              token_score="output" in half precision. Deterministic.
    memory:   4 * B * H * (3 * T + P) bytes at most beside the results, none where one program does a sample.
    runs:     on CUDA from sm_80, and on the CPU under TRITON_INTERPRET=1. One launch (large batches of T <= 64,
              P <= 256 in half precision) to three (small batches of long inputs).
    source:   own (`sync_mask_triton_kernels.py`).
    """
    from syncmask_fast.kernels import sync_mask_triton_kernels as kernels  # needs triton

    batch, heads, tokens, width = q.shape
    patches = k.shape[2] - 1
    scores = [q.new_empty(batch, count, dtype=torch.float32) for count in (tokens, patches)]
    masks = [q.new_empty(batch, count, dtype=torch.bool) for count in (tokens, patches)]
    if batch == 0:
        return (*masks, *scores)
    output = token_score == "output"
    v = v if output else k  # not read
    blocks = main_blocks(tokens, patches, width, q.dtype, output)
    one_pass = blocks.kernel == "_one_pass_kernel"
    inputs = (q, k, maskable) if one_pass else (q, k, v, maskable)
    strides = [stride for x in inputs for stride in x.stride()]
    sizes = (heads, tokens, patches, width)
    rules = kernels.TOKEN_RULES[token_score], kernels.PATCH_RULES[patch_score]
    log2_scale = scale * math.log2(math.e)
    (ratio_bits,) = struct.unpack("<q", struct.pack("<d", token_ratio))
    patch_count = sync_mask.masked_patches(patches, patch_ratio)
    processors = common.processors(q.device)
    heads_each = split_heads(batch, heads, processors * 8 // blocks.num_warps) if one_pass else 1
    whole = one_pass and heads_each == heads
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}

    def scratch(count: int) -> Tensor:
        return scores[0] if whole else q.new_empty(batch, heads, count, dtype=torch.float32)

    token_sum, patch_sum = scratch(tokens), scratch(patches)
    with torch.cuda.device(q.device) if q.is_cuda else torch.no_grad():
        if one_pass:
            kernels._one_pass_kernel[batch, -(-heads // heads_each)](
                *inputs,
                token_sum,
                patch_sum,
                *scores,
                *masks,
                *strides,
                *sizes,
                heads_each,
                log2_scale,
                ratio_bits,
                patch_count,
                *rules,
                **blocks.constants,
                **options,
            )
        else:
            pairs = batch * heads
            launches = [(3, 1)]
            if pairs < 2 * processors:  # (phase, tiles side by side)
                launches = [
                    (1, -(-tokens // blocks.constants["BLOCK_T"])),
                    (2, -(-patches // blocks.constants["BLOCK_P"])),
                ]
            top, share = scratch(tokens), scratch(tokens)
            for phases, tiles in launches:
                kernels._two_pass_kernel[pairs, tiles](
                    *inputs,
                    token_sum,
                    patch_sum,
                    top,
                    share,
                    *strides,
                    *sizes,
                    log2_scale,
                    phases,
                    *rules,
                    **blocks.constants,
                    **options,
                )
        if not whole:
            finish = finish_blocks(tokens, patches)
            kernels._finish_kernel[batch, 2](
                token_sum,
                patch_sum,
                maskable,
                *scores,
                *masks,
                *maskable.stride(),
                heads,
                tokens,
                patches,
                ratio_bits,
                patch_count,
                **finish.constants,
                num_warps=finish.num_warps,
                num_stages=finish.num_stages,
            )
    return (*masks, *scores)


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()
