"""Launches the Triton kernels of `mine_semi_hard`, and says which blocks they take.

The blocks come from a table on (D, k, dtype, draws), never from timing at run time: the same call makes the same
launch, and every configuration can be compiled ahead of time (`ahead_of_time.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from syncmask_fast.kernels import common, mine_semi_hard
from syncmask_fast.kernels.sync_mask_triton import Blocks

_HALVES = (torch.bfloat16, torch.float16)
_MOST_KEPT = 1024  # keys of an anchor from all shares of the candidates; each one is compared with each


def search_blocks(width: int, k: int, dtype: torch.dtype, draws: bool) -> Blocks:
    """The kernel that compares anchors [.., D] with candidates and keeps k <= 64 or some more for each."""
    slots = 1 if k == 1 else 16 if k <= 16 else 64
    half = dtype in _HALVES
    whole = half and 128 < width <= 256
    constants = {"DRAWS": draws, "WHOLE": whole, "SLOTS": slots, "BLOCK_N": 64 if slots == 64 else 128}
    # Wider blocks of candidates spill registers: on sm_100, and on sm_80 where float32 takes three products.
    constants["BLOCK_M"] = 64 if half or slots == 1 or (slots == 16 and not draws) else 32
    constants["BLOCK_D"] = 256 if whole else 64 if half else 32
    return Blocks("_search_kernel", constants, 8, 2 if whole and slots < 64 else 3)


def finish_blocks(kept: int, draws: bool) -> Blocks:
    """The kernel that puts what was kept in order."""
    block = next(size for size in (1, 16, 64, 256, 1024) if size >= kept)
    return Blocks("_finish_kernel", {"DRAWS": draws, "BLOCK_N": max(1, 256 // block), "BLOCK": block}, 4, 1)


def configurations() -> Iterator[tuple[torch.dtype, Blocks]]:
    """Every (dtype of the features, Blocks) that a call can take, each once."""
    seen = []
    for dtype, draws, k, width in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), (False, True), (1, 16, 64), (64, 256)
    ):
        seen.append((dtype, search_blocks(width, k, dtype, draws)))
    seen += [
        (torch.float32, finish_blocks(kept, draws))
        for kept, draws in itertools.product((1, 16, 64, 256, 1024), (False, True))
    ]
    for index, one in enumerate(seen):
        if one not in seen[:index]:
            yield one


def shares_of(blocks: int, tiles: int, slots: int, processors: int) -> int:
    """Among how many programs the candidates of a block of anchors are shared out, so that all processors have two."""
    wanted = max(1, 2 * processors // blocks)
    each = -(-tiles // min(wanted, tiles, _MOST_KEPT // slots))
    return -(-tiles // each)


def mine_semi_hard_triton(
    anchors: Tensor,
    candidates: Tensor,
    anchor_ids: Tensor,
    candidate_ids: Tensor,
    positive_score: Tensor,
    k: int,
    margin: float,
    temperature: float | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """`mine_semi_hard` by Triton: (index, score); arguments are not checked, k is at most 64.

    inputs:   as of `mine_semi_hard`, any strides, never copied; positive_score float32.
    returns:  contiguous; int64 and float32 [N, k].
    numerics: products of half-precision features are summed in float32 on tensor cores; those of float32 features are
              sums of three tf32 products, about as exact as float32. Deterministic; the same for any shares.
    memory:   8 bytes (12 for draws) for each of N anchors, each of 1, 16 or 64 places and each share; there is one
              share where N fills the device.
    runs:     on CUDA from sm_80, and on the CPU under TRITON_INTERPRET=1. Two launches.
    source:   own (`mine_semi_hard_triton_kernels.py`).
    """
    from syncmask_fast.kernels import mine_semi_hard_triton_kernels as kernels  # needs triton

    rows, width = anchors.shape
    columns = candidates.shape[0]
    index = anchors.new_full((rows, k), -1, dtype=torch.int64)
    score = anchors.new_full((rows, k), -math.inf, dtype=torch.float32)
    if rows == 0 or columns == 0:
        return index, score
    draws = temperature is not None
    temperature = temperature or 1.0
    search = search_blocks(width, k, anchors.dtype, draws)
    slots, block = search.constants["SLOTS"], -(-rows // search.constants["BLOCK_N"])
    tiles = -(-columns // search.constants["BLOCK_M"])
    shares = shares_of(block, tiles, slots, common.processors(anchors.device))
    kept = shares * slots
    keys = anchors.new_empty(rows, kept, dtype=torch.int64)
    scores = anchors.new_empty(rows, kept, dtype=torch.float32) if draws else score  # not read
    finish = finish_blocks(kept, draws)
    with torch.cuda.device(anchors.device) if anchors.is_cuda else torch.no_grad():
        kernels._search_kernel[block, shares](
            anchors,
            candidates,
            anchor_ids,
            candidate_ids,
            positive_score,
            keys,
            scores,
            *anchors.stride(),
            *candidates.stride(),
            *anchor_ids.stride(),
            *candidate_ids.stride(),
            *positive_score.stride(),
            rows,
            columns,
            width,
            -(-tiles // shares),
            margin,
            temperature,
            1 / temperature,
            mine_semi_hard.seed_key(seed),
            **search.constants,
            num_warps=search.num_warps,
            num_stages=search.num_stages,
        )
        kernels._finish_kernel[(-(-rows // finish.constants["BLOCK_N"]),)](
            keys,
            scores,
            index,
            score,
            rows,
            kept,
            k,
            **finish.constants,
            num_warps=finish.num_warps,
            num_stages=finish.num_stages,
        )
    return index, score
