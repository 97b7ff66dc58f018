"""The Triton kernels of `mine_semi_hard`; `mine_semi_hard_triton.py` launches them and says which blocks they take.

    _search_kernel  a block of anchors against all candidates, or a share of them: tiles of similarities, of which each
                    anchor keeps the best; writes them unordered
    _finish_kernel  the k best of what the shares kept, in order

What an anchor keeps are keys, int64 [BLOCK_N, SLOTS]: the rank in the upper half, as an integer that orders as the
float does, and in the lower half the index counted down. So one comparison ranks, ties go to the lowest index, no two
keys are alike, and no order of tiles or shares shows in the result. The lowest key is the anchor's floor.

A tile costs a comparison with the limit and a maximum over each row; only where a row's maximum rises above its floor
are ids compared, and then the highest of each row goes in, until no row has one above its floor. For draws the maximum
is taken over upper bounds of the ranks, which need no logarithm, and the rank is computed for what goes in.
Source: own.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
    do_not_specialize=["anchors", "candidates", "share", "margin", "temperature", "inverse_temperature", "seed_key"]
)
def _search_kernel(
    anchors_ptr,  # [N, D]
    candidates_ptr,  # [M, D]
    anchor_ids_ptr,  # [N] int64
    candidate_ids_ptr,  # [M] int64
    positive_ptr,  # [N] float32
    keys_ptr,  # [N, shares, SLOTS] int64
    scores_ptr,  # [N, shares, SLOTS] float32, written for draws
    a_stride_n,
    a_stride_d,
    c_stride_m,
    c_stride_d,
    a_id_stride,
    c_id_stride,
    p_stride,
    anchors,
    candidates,
    width,
    share,  # tiles of candidates of one program; shares lie along the second axis of the grid
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
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < anchors
    limit = tl.load(positive_ptr + rows * p_stride, mask=in_rows, other=0.0) - margin
    limit = tl.where(in_rows, limit, float("-inf"))
    anchor_id = tl.load(anchor_ids_ptr + rows * a_id_stride, mask=in_rows, other=0)
    row_key = _mix(rows.to(tl.uint32) ^ tl.cast(seed_key, tl.int32).to(tl.uint32))
    depth = tl.arange(0, BLOCK_D)
    places = tl.arange(0, BLOCK_M)
    a_tile = anchors_ptr + rows[:, None] * a_stride_n + depth[None, :] * a_stride_d

    slots = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    keys = tl.full([BLOCK_N, SLOTS], EMPTY, tl.int64) + slots[None, :]
    scores = tl.zeros([BLOCK_N, SLOTS], tl.float32)
    floor = tl.full([BLOCK_N], float("-inf"), tl.float32)
    first = tl.program_id(1) * share
    tiles = tl.minimum(share, tl.cdiv(candidates, BLOCK_M) - first)
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
                c_id_stride,
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
                    c_id_stride,
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
