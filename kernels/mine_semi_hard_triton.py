"""`mine_semi_hard` in Triton: the kernels, the launch configurations and the launcher.

    _search_kernel  a block of anchors against all candidates, or a split of them: tiles of similarities, of which each
                    anchor keeps the best; writes them unordered
    _finish_kernel  the k best of what the splits kept, in order

What an anchor keeps are keys, int64 [BLOCK_N, SLOTS]: the rank in the upper half, as an integer that orders as the
float does, and in the lower half the index counted down. So one comparison ranks, ties go to the lowest index, no two
keys are equal, and the order of tiles and splits does not show in the result. The lowest key is the anchor's floor.

A tile costs a comparison with the limit and a maximum over each row. Only where a row's maximum rises above its floor
are ids compared; then the highest of each row goes in, until no row has one above its floor. For draws the maximum is
taken over upper bounds of the ranks, which need no logarithm, and the rank is computed for what goes in.

Launch configurations come from a table on (D, k, dtype, draws), never from timing at run time: the same call makes the
same launch, and `aot.py` compiles every configuration ahead of time.
Source: our own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from syncmask_fast.kernels import library, mine_semi_hard
from syncmask_fast.kernels.library import LaunchConfig

_HALVES = (torch.bfloat16, torch.float16)
MAX_KEPT = 1024  # keys of an anchor from all splits; each one is compared with each
# The interpreter's bfloat16 is a 16-bit integer, which its product takes at face value.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOWEST = tl.constexpr(
    -3.4028234663852886e38
)  # of float32: where an eligible -inf counts as, above what is not eligible
EMPTY = tl.constexpr((0x807FFFFF - (1 << 32)) << 32)  # from here on: keys that rank -inf
WORD = tl.constexpr(0xFFFFFFFF)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _mix(x):  # uint32; "lowbias32" of the operator's definition
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _column_key(index):
    return _mix(index.to(tl.uint32) ^ 0x85EBCA6B)


@triton.jit
def _noise(hashed):
    u = tl.minimum((hashed.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    rest = 1 - u
    series = u * (1 + u * (0.5 + u * (1 / 3 + u * (0.25 + u * 0.2))))
    # log(rest) is the logarithm of what 1 - u was rounded to; the factor undoes that.
    minus_log1p = tl.where(u < 2.0**-6, series, -tl.log(rest) * u / tl.maximum(1 - rest, 2.0**-24))
    return -tl.log(minus_log1p)


@triton.jit
def _noise_bound(hashed):
    # At least the noise, and at most about 0.06 more where it is large: -log(-log1p(-u)) is below -log(u), and the bits
    # of a float, read as an integer, are below its binary logarithm. 1e-4 is more than all rounding.
    half = (hashed >> 1).to(tl.int32).to(tl.float32)  # 2^31 u, about
    return (127 + 31) * LN2 + 1e-4 - half.to(tl.int32, bitcast=True).to(tl.float32) * (LN2 * 2.0**-23)


@triton.jit
def _key(rank, index):
    bits = (rank + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (WORD - index.to(tl.int64))


@triton.jit
def _rank_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, total):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, tl.trans(b), total, input_precision="tf32x3")


@triton.jit
def _keep_best(
    similarity,  # [BLOCK_N, BLOCK_M], of candidates begin ...
    keys,
    scores,
    floor,  # what the anchors keep; scores for draws only; floor is below the lowest rank kept
    limit,
    anchor_id,
    row_key,  # of the anchors
    candidate_ids_ptr,
    id_stride,
    begin,
    candidates,
    temperature,
    inverse_temperature,
    DRAWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    places = tl.arange(0, BLOCK_M)
    columns = begin + places
    inside = columns < candidates
    bound = similarity
    if DRAWS:
        bound = similarity * inverse_temperature + _noise_bound(_mix(row_key[:, None] + _column_key(columns)[None, :]))
    bound = tl.where((similarity < limit[:, None]) & inside[None, :], tl.maximum(bound, LOWEST), float("-inf"))
    top = tl.max(bound, 1)
    rising = tl.max((top > floor).to(tl.int32), 0)
    if rising > 0:
        candidate_id = tl.load(candidate_ids_ptr + columns.to(tl.int64) * id_stride, mask=inside, other=0)
        bound = tl.where(anchor_id[:, None] == candidate_id[None, :], float("-inf"), bound)
        top = tl.max(bound, 1)
        rising = tl.max((top > floor).to(tl.int32), 0)
        while rising > 0:
            place = tl.min(tl.where(bound == top[:, None], places[None, :], BLOCK_M), 1)
            here = places[None, :] == place[:, None]
            rank = top
            if DRAWS:
                score = tl.max(tl.where(here, similarity, float("-inf")), 1)
                rank = tl.maximum(score / temperature + _noise(_mix(row_key + _column_key(begin + place))), LOWEST)
            key = _key(rank, begin + place)
            worst = tl.min(keys, 1)
            replaced = ((top > floor) & (key > worst))[:, None] & (keys == worst[:, None])
            keys = tl.where(replaced, key[:, None], keys)
            if DRAWS:
                scores = tl.where(replaced, score[:, None], scores)
            floor = _rank_of(tl.min(keys, 1))
            if DRAWS:  # lower by the rounding of the bounds
                floor = tl.where(floor >= LOWEST, floor - tl.abs(floor) * 2.0**-19 - 1e-4, floor)
            bound = tl.where(here, float("-inf"), bound)
            top = tl.max(bound, 1)
            rising = tl.max((top > floor).to(tl.int32), 0)
    return keys, scores, floor


@triton.jit(
    do_not_specialize=[
        "anchors",
        "candidates",
        "split_tiles",
        "margin",
        "temperature",
        "inverse_temperature",
        "seed_key",
    ]
)
def _search_kernel(
    anchors_ptr,  # [N, D]
    candidates_ptr,  # [M, D]
    anchor_ids_ptr,  # [N] int64
    candidate_ids_ptr,  # [M] int64
    positive_ptr,  # [N] float32
    keys_ptr,  # [N, splits, SLOTS] int64
    scores_ptr,  # [N, splits, SLOTS] float32, written for draws
    a_stride_n, a_stride_d,  # strides of anchors
    c_stride_m, c_stride_d,  # strides of candidates
    a_id_stride_n,  # strides of anchor_ids
    c_id_stride_m,  # strides of candidate_ids
    p_stride_n,  # strides of positive
    anchors,
    candidates,
    width,
    split_tiles,  # tiles of candidates of one program; splits are along the second axis of the grid
    margin,
    temperature,
    inverse_temperature,
    seed_key,  # int32, the bits of mix(seed_low ^ mix(seed_high ^ 0x9e3779b9))
    DRAWS: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK_D >= D: the anchors are read once
    SLOTS: tl.constexpr,  # >= k
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < anchors
    limit = tl.load(positive_ptr + rows * p_stride_n, mask=in_rows, other=0.0) - margin
    limit = tl.where(in_rows, limit, float("-inf"))
    anchor_id = tl.load(anchor_ids_ptr + rows * a_id_stride_n, mask=in_rows, other=0)
    row_key = _mix(rows.to(tl.uint32) ^ tl.cast(seed_key, tl.int32).to(tl.uint32))
    depth = tl.arange(0, BLOCK_D)
    places = tl.arange(0, BLOCK_M)
    a_tile = anchors_ptr + rows[:, None] * a_stride_n + depth[None, :] * a_stride_d

    slots = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    keys = tl.full([BLOCK_N, SLOTS], EMPTY, tl.int64) + slots[None, :]
    scores = tl.zeros([BLOCK_N, SLOTS], tl.float32)
    floor = tl.full([BLOCK_N], float("-inf"), tl.float32)
    first = tl.program_id(1) * split_tiles
    tiles = tl.minimum(split_tiles, tl.cdiv(candidates, BLOCK_M) - first)
    if WHOLE:
        a = tl.load(a_tile, mask=in_rows[:, None] & (depth < width)[None, :], other=0.0)
        for tile in tl.range(0, tiles):
            begin = (first + tile) * BLOCK_M
            columns = begin + places
            b_tile = candidates_ptr + columns.to(tl.int64)[:, None] * c_stride_m + depth[None, :] * c_stride_d
            b = tl.load(b_tile, mask=(columns < candidates)[:, None] & (depth < width)[None, :], other=0.0)
            keys, scores, floor = _keep_best(
                _dot(a, b, None),
                keys,
                scores,
                floor,
                limit,
                anchor_id,
                row_key,
                candidate_ids_ptr,
                c_id_stride_m,
                begin,
                candidates,
                temperature,
                inverse_temperature,
                DRAWS,
                BLOCK_M,
            )
    else:  # tiles and their chunks of D in one loop, so that the next tile is fetched while one is searched
        chunks = tl.maximum(tl.cdiv(width, BLOCK_D), 1)
        similarity = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for step in tl.range(0, tiles * chunks):
            begin = (first + step // chunks) * BLOCK_M
            chunk = step % chunks
            inside = chunk * BLOCK_D + depth < width
            columns = begin + places
            offset = (chunk * BLOCK_D).to(tl.int64)
            a = tl.load(a_tile + offset * a_stride_d, mask=in_rows[:, None] & inside[None, :], other=0.0)
            b_tile = (
                candidates_ptr + columns.to(tl.int64)[:, None] * c_stride_m + (offset + depth)[None, :] * c_stride_d
            )
            b = tl.load(b_tile, mask=(columns < candidates)[:, None] & inside[None, :], other=0.0)
            similarity = _dot(a, b, similarity)
            if chunk == chunks - 1:
                keys, scores, floor = _keep_best(
                    similarity,
                    keys,
                    scores,
                    floor,
                    limit,
                    anchor_id,
                    row_key,
                    candidate_ids_ptr,
                    c_id_stride_m,
                    begin,
                    candidates,
                    temperature,
                    inverse_temperature,
                    DRAWS,
                    BLOCK_M,
                )
                similarity = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)

    place = rows[:, None] * (tl.num_programs(1) * SLOTS) + slots[None, :]
    tl.store(keys_ptr + place, keys, mask=in_rows[:, None])
    if DRAWS:
        tl.store(scores_ptr + place, scores, mask=in_rows[:, None])


@triton.jit(do_not_specialize=["anchors", "kept", "k"])
def _finish_kernel(
    keys_ptr,  # [N, kept] int64
    scores_ptr,  # [N, kept] float32, read for draws
    index_ptr,  # [N, k] int64
    score_ptr,  # [N, k] float32
    anchors,
    kept,
    k,
    DRAWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,  # >= kept
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    slots = tl.arange(0, BLOCK)
    in_rows = rows < anchors
    inside = in_rows[:, None] & (slots < kept)[None, :]
    key = tl.load(keys_ptr + rows[:, None] * kept + slots[None, :], mask=inside, other=0)
    place = tl.zeros([BLOCK_N, BLOCK], tl.int32)  # how many are better
    for other in range(kept):
        place += (tl.load(keys_ptr + rows * kept + other, mask=in_rows, other=0)[:, None] > key).to(tl.int32)
    rank = _rank_of(key)
    found = rank >= LOWEST
    score = rank
    if DRAWS:
        score = tl.load(scores_ptr + rows[:, None] * kept + slots[None, :], mask=inside, other=0.0)
    else:
        score = tl.where(rank > LOWEST, rank, float("-inf"))
    to = rows[:, None] * k + place
    tl.store(index_ptr + to, tl.where(found, WORD - (key & WORD), -1), mask=inside & (place < k))
    tl.store(score_ptr + to, tl.where(found, score, float("-inf")), mask=inside & (place < k))


# Launch configurations


def search_config(width: int, k: int, dtype: torch.dtype, draws: bool) -> LaunchConfig:
    """Return the kernel that compares anchors [.., D] with candidates and keeps k <= 64 or some more for each."""
    slots = 1 if k == 1 else 16 if k <= 16 else 64
    half = dtype in _HALVES
    whole = half and 128 < width <= 256
    constants = {"DRAWS": draws, "WHOLE": whole, "SLOTS": slots, "BLOCK_N": 64 if slots == 64 else 128}
    # Wider blocks of candidates spill registers: on sm_100, and on sm_80 where float32 takes three products.
    constants["BLOCK_M"] = 64 if half or slots == 1 or (slots == 16 and not draws) else 32
    constants["BLOCK_D"] = 256 if whole else 64 if half else 32
    return LaunchConfig("_search_kernel", constants, 8, 2 if whole and slots < 64 else 3)


def finish_config(kept: int, draws: bool) -> LaunchConfig:
    """Return the kernel that puts what was kept in order."""
    block = next(size for size in (1, 16, 64, 256, 1024) if size >= kept)
    return LaunchConfig("_finish_kernel", {"DRAWS": draws, "BLOCK_N": max(1, 256 // block), "BLOCK": block}, 4, 1)


def configurations() -> Iterator[tuple[torch.dtype, LaunchConfig]]:
    """Yield every (dtype of the features, LaunchConfig) that a call can take, each once."""
    seen = []
    for dtype, draws, k, width in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), (False, True), (1, 16, 64), (64, 256)
    ):
        seen.append((dtype, search_config(width, k, dtype, draws)))
    seen += [
        (torch.float32, finish_config(kept, draws))
        for kept, draws in itertools.product((1, 16, 64, 256, 1024), (False, True))
    ]
    for index, one in enumerate(seen):
        if one not in seen[:index]:
            yield one


def candidate_splits(blocks: int, tiles: int, slots: int, processors: int) -> int:
    """Return how many programs split the candidates of a block of anchors, so that each processor has two programs."""
    wanted = max(1, 2 * processors // blocks)
    each = -(-tiles // min(wanted, tiles, MAX_KEPT // slots))
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
    """Launch `mine_semi_hard` in Triton; return (index, score). Arguments are not checked, k is at most 64.

    inputs:   as of `mine_semi_hard`, any strides, never copied; positive_score float32.
    returns:  contiguous; int64 and float32 [N, k].
    numerics: products of half-precision features are summed in float32 on tensor cores; those of float32 features are
              sums of three tf32 products, about as exact as float32. Deterministic; the same for any number of splits.
    memory:   8 bytes (12 for draws) for each of N anchors, each of 1, 16 or 64 places and each split; there is one
              split where N fills the device.
    runs:     on CUDA from sm_80, and on the CPU under TRITON_INTERPRET=1. Two launches.
    """
    rows, width = anchors.shape
    columns = candidates.shape[0]
    index = anchors.new_full((rows, k), -1, dtype=torch.int64)
    score = anchors.new_full((rows, k), -math.inf, dtype=torch.float32)
    if rows == 0 or columns == 0:
        return index, score
    draws = temperature is not None
    temperature = temperature or 1.0
    search = search_config(width, k, anchors.dtype, draws)
    slots, block = search.constants["SLOTS"], -(-rows // search.constants["BLOCK_N"])
    tiles = -(-columns // search.constants["BLOCK_M"])
    splits = candidate_splits(block, tiles, slots, library.num_sms(anchors.device))
    kept = splits * slots
    keys = anchors.new_empty(rows, kept, dtype=torch.int64)
    scores = anchors.new_empty(rows, kept, dtype=torch.float32) if draws else score  # not read
    finish = finish_config(kept, draws)
    with torch.cuda.device(anchors.device) if anchors.is_cuda else torch.no_grad():
        _search_kernel[block, splits](
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
            -(-tiles // splits),
            margin,
            temperature,
            1 / temperature,
            mine_semi_hard.seed_key(seed),
            **search.options,
        )
        _finish_kernel[(-(-rows // finish.constants["BLOCK_N"]),)](
            keys, scores, index, score, rows, kept, k, **finish.options
        )
    return index, score
