"""`sync_mask` in Triton: the kernels, the launch configurations and the launcher.

    _one_pass_kernel  all patches of a head in one block: logits, softmax, both summaries, then the next head
    _two_pass_kernel  any size: statistics of the softmax by tiles of tokens, then patch scores by tiles of keys
    _finish_kernel    the mean over heads and the masks, where the heads of a sample were spread over programs

Key 0, the image's [CLS], has a block of its own, so that 256 patches fill 256 columns and not half of 512. Sums over
heads run from the first head to the last in every kernel, and there are no atomics: the same input gives the same bits
for any split. Launch configurations come from a table on (T, P, D, dtype), never from timing at run time: the same call
makes the same launch, and `aot.py` compiles every configuration ahead of time.
Source: our own; the online softmax is Milakov and Gimelshein's (2018), as in FlashAttention.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from syncmask_fast.kernels import library, sync_mask
from syncmask_fast.kernels.library import LaunchConfig

ONE_PASS_TOKENS = 64
ONE_PASS_PATCHES = {64: 256, 128: 64}  # by width: more spills registers on sm_80
_HALVES = (torch.bfloat16, torch.float16)

# As the kernels know the rules; "output" has a constant of its own, since it needs a second product.
TOKEN_RULES = {"peak": 0, "mass": 1, "cls": 2, "output": 3}
PATCH_RULES = {"mean": 0, "cls": 1, "weighted": 2, "max": 3}


# The interpreter's bfloat16 is a 16-bit integer, which its product takes at face value.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, total):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _column_of_cls(logits, columns):
    # [BLOCK_T, 16] -> [BLOCK_T]: the other columns are padding, which tl.dot needs.
    return tl.sum(tl.where(columns[None, :] == 0, logits, 0.0), 1)


@triton.jit
def _weighted_values(weights, v):
    # weights [BLOCK_T, BLOCK_P] float32 times v: as exact as float32, from products of v's own dtype.
    if v.dtype == tl.float32:
        total = _dot(weights, v, None)
    elif v.dtype == tl.bfloat16:  # three times 8 bits
        high = weights.to(tl.bfloat16)
        rest = weights - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = _dot(high, v, _dot(middle, v, _dot(low, v, None)))
    else:  # twice 11 bits; the factor keeps the second part out of float16's subnormal numbers
        high = weights.to(tl.float16)
        low = ((weights - high.to(tl.float32)) * 2048).to(tl.float16)
        total = _dot(high, v, _dot(low, v, None) * (1 / 2048))
    return total


@triton.jit
def _token_score(rule, peak, mass, cls):
    return tl.where(rule == 0, peak, tl.where(rule == 1, mass, cls))


@triton.jit
def _share(rule, from_cls, words, inverse, peak):
    # What a token's unnormalized weights are multiplied by before they are summed, or their maximum taken.
    weighted = tl.where((rule == 2) & ~from_cls, inverse * peak, inverse)
    return tl.where((rule == 3) | from_cls, weighted, weighted / tl.maximum(words, 1).to(tl.float32))


@triton.jit
def _column_score(rule, weights, share, eligible):
    # [BLOCK_T, BLOCK_P] -> [BLOCK_P]. Rows that are not eligible may hold NaN: replaced, never multiplied by 0.
    weights = tl.where(eligible[:, None], weights * share[:, None], 0.0)
    if rule == 3:
        # A maximum may pass over NaN. A softmax that holds one is NaN throughout, and so is its share.
        lost = tl.sum(tl.where(eligible & (share != share), float("nan"), 0.0), 0)
        column = tl.max(weights, 0) + lost
    else:
        column = tl.sum(weights, 0)
    return column


@triton.jit
def _masked_words(words, ratio_bits):
    # min(words, max(1, floor(ratio * words + 0.5))) in float64, as on the host. The 0.5 is compared, not added to
    # the product: a fused multiply-add would round once where the definition rounds twice.
    ratio = tl.cast(ratio_bits, tl.int64).to(tl.float64, bitcast=True)
    wanted = words.to(tl.float64) * ratio
    count = wanted.to(tl.int32)
    count += (wanted >= count.to(tl.float64) + 0.5).to(tl.int32)
    return tl.where(ratio == 0, 0, tl.minimum(words, tl.maximum(count, 1)))


@triton.jit
def _highest(score, eligible, count):
    # Marks the `count` highest eligible of score [N], which are >= 0 or NaN, so that their bits order as they do.
    key = tl.where(score == score, score.to(tl.int32, bitcast=True) + 1, 0)
    key = tl.where(eligible, key, -1)
    threshold = count * 0
    for step in range(31):  # ends as the count-th highest key
        candidate = threshold | (0x40000000 >> step)
        threshold = tl.where(tl.sum((key >= candidate).to(tl.int32), 0) >= count, candidate, threshold)
    above = key > threshold
    tied = key == threshold
    left = count - tl.sum(above.to(tl.int32), 0)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= left))


@triton.jit
def _finish_tokens(total, maskable, words, ratio_bits, heads, places, inside, score_ptr, mask_ptr):
    score = total / heads
    tl.store(score_ptr + places, tl.where(maskable, score, float("-inf")), mask=inside)
    tl.store(mask_ptr + places, _highest(score, maskable, _masked_words(words, ratio_bits)), mask=inside)


@triton.jit
def _finish_patches(total, count, heads, places, inside, score_ptr, mask_ptr):
    score = total / heads
    tl.store(score_ptr + places, score, mask=inside)
    tl.store(mask_ptr + places, _highest(score, inside, count), mask=inside)


@triton.jit(
    do_not_specialize=[
        "heads",
        "tokens",
        "patches",
        "program_heads",
        "patch_count",
        "ratio_bits",
        "token_rule",
        "patch_rule",
    ]
)
def _one_pass_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H, 1+P, D]
    maskable_ptr,  # [B, T]
    token_sum_ptr,  # [B, H, T] float32, one head each; written if the heads of a sample are split
    patch_sum_ptr,  # [B, H, P] float32, the same
    token_score_ptr,  # [B, T], written if they are not
    patch_score_ptr,  # [B, P]
    token_mask_ptr,  # [B, T]
    patch_mask_ptr,  # [B, P]
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,  # strides of q
    k_stride_b, k_stride_h, k_stride_p, k_stride_d,  # strides of k
    m_stride_b, m_stride_t,  # strides of maskable
    heads,
    tokens,
    patches,
    width,
    program_heads,  # heads of one program
    scale,  # of the logits, times log2(e)
    ratio_bits,  # token_ratio, the bits of a float64
    patch_count,
    token_rule,
    patch_rule,
    BLOCK_T: tl.constexpr,  # >= T
    BLOCK_P: tl.constexpr,  # >= P
    BLOCK_D: tl.constexpr,  # >= D
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * program_heads
    last = tl.minimum(first + program_heads, heads)
    split = tl.where(program_heads < heads, 1, 0)

    rows = tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_P)
    first_columns = tl.arange(0, 16)
    depth = tl.arange(0, BLOCK_D)
    in_depth = depth[None, :] < width
    maskable = (
        tl.load(maskable_ptr + sample * m_stride_b + rows.to(tl.int64) * m_stride_t, mask=rows < tokens, other=0) != 0
    )
    words = tl.sum(maskable.to(tl.int32), 0)
    from_cls = (patch_rule == 1) | (words == 0)
    eligible = tl.where(from_cls, rows == 0, maskable)

    # Rows that no score needs are not read.
    q_mask = (maskable | eligible)[:, None] & in_depth
    k_mask = (columns < patches)[:, None] & in_depth
    q_tile = q_ptr + sample * q_stride_b + rows.to(tl.int64)[:, None] * q_stride_t + depth[None, :] * q_stride_d
    k_cls = k_ptr + sample * k_stride_b + first_columns[:, None] * 0 + depth[None, :] * k_stride_d
    k_tile = (
        k_ptr + sample * k_stride_b + (columns + 1).to(tl.int64)[:, None] * k_stride_p + depth[None, :] * k_stride_d
    )

    token_sum = tl.zeros([BLOCK_T], tl.float32)
    patch_sum = tl.zeros([BLOCK_P], tl.float32)
    for head in tl.range(first, last):
        at = tl.cast(head, tl.int64)
        q = tl.load(q_tile + at * q_stride_h, mask=q_mask, other=0.0)
        k = tl.load(k_tile + at * k_stride_h, mask=k_mask, other=0.0)
        k_first = tl.load(k_cls + at * k_stride_h, mask=(first_columns == 0)[:, None] & in_depth, other=0.0)
        cls = _column_of_cls(_dot(q, tl.trans(k_first), None), first_columns) * scale
        logits = tl.where((columns < patches)[None, :], _dot(q, tl.trans(k), None) * scale, float("-inf"))

        highest = tl.max(logits, 1)
        top = tl.maximum(highest, cls)
        weights = tl.exp2(logits - top[:, None])
        cls = tl.exp2(cls - top)
        mass = tl.sum(weights, 1)
        inverse = 1.0 / (mass + cls)
        peak = tl.exp2(highest - top) * inverse
        token = _token_score(token_rule, peak, mass * inverse, cls * inverse)
        column = _column_score(patch_rule, weights, _share(patch_rule, from_cls, words, inverse, peak), eligible)

        place = sample * heads + head
        tl.store(token_sum_ptr + place * tokens + rows, token, mask=rows < tokens * split)
        tl.store(patch_sum_ptr + place * patches + columns, column, mask=columns < patches * split)
        token_sum += token
        patch_sum += column

    if program_heads >= heads:
        _finish_tokens(
            token_sum,
            maskable,
            words,
            ratio_bits,
            heads,
            sample * tokens + rows,
            rows < tokens,
            token_score_ptr,
            token_mask_ptr,
        )
        _finish_patches(
            patch_sum,
            patch_count,
            heads,
            sample * patches + columns,
            columns < patches,
            patch_score_ptr,
            patch_mask_ptr,
        )


@triton.jit
def _tile_logits(
    q_head,
    k_head,
    q_stride_t, q_stride_d,  # strides of q
    k_stride_p, k_stride_d,  # strides of k
    rows,
    row_mask,
    keys,
    key_mask,
    width,
    scale,
    CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # scale * q k^T of one tile, in chunks of the width: float32 products keep both operands in registers.
    logits = tl.zeros([rows.shape[0], keys.shape[0]], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        depth = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        q_tile = q_head + rows.to(tl.int64)[:, None] * q_stride_t + depth[None, :] * q_stride_d
        k_tile = k_head + keys.to(tl.int64)[:, None] * k_stride_p + depth[None, :] * k_stride_d
        q = tl.load(q_tile, mask=row_mask[:, None] & (depth < width)[None, :], other=0.0)
        k = tl.load(k_tile, mask=key_mask[:, None] & (depth < width)[None, :], other=0.0)
        logits = _dot(q, tl.trans(k), logits)
    return logits * scale


@triton.jit(do_not_specialize=["heads", "tokens", "patches", "phases", "token_rule", "patch_rule"])
def _two_pass_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H, 1+P, D]
    v_ptr,  # [B, H, 1+P, D], read if OUTPUT
    maskable_ptr,  # [B, T]
    token_sum_ptr,  # [B, H, T] float32, one head each
    patch_sum_ptr,  # [B, H, P] float32, the same
    top_ptr,  # [B, H, T] float32, the highest logit of each token
    share_ptr,  # [B, H, T] float32, what a token's unnormalized weights are multiplied by
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,  # strides of q
    k_stride_b, k_stride_h, k_stride_p, k_stride_d,  # strides of k
    v_stride_b, v_stride_h, v_stride_p, v_stride_d,  # strides of v
    m_stride_b, m_stride_t,  # strides of maskable
    heads,
    tokens,
    patches,
    width,
    scale,  # of the logits, times log2(e)
    phases,  # 1 the statistics, 2 the patch scores, 3 both; tiles are spread over the second axis of the grid
    token_rule,
    patch_rule,
    OUTPUT: tl.constexpr,
    ALL_T: tl.constexpr,  # >= T
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,  # CHUNKS * BLOCK_D >= D
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)  # of the sample and head
    sample = place // heads
    head = place % heads
    q_head = q_ptr + sample * q_stride_b + head * q_stride_h
    k_head = k_ptr + sample * k_stride_b + head * k_stride_h
    maskable_row = maskable_ptr + sample * m_stride_b
    all_rows = tl.arange(0, ALL_T)
    words = tl.sum(
        (tl.load(maskable_row + all_rows.to(tl.int64) * m_stride_t, mask=all_rows < tokens, other=0) != 0).to(tl.int32),
        0,
    )
    from_cls = (patch_rule == 1) | (words == 0)

    if phases % 2 == 1:
        for row_tile in range(tl.program_id(1), tl.cdiv(tokens, BLOCK_T), tl.num_programs(1)):
            rows = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
            maskable = tl.load(maskable_row + rows.to(tl.int64) * m_stride_t, mask=rows < tokens, other=0) != 0
            needed = maskable | tl.where(from_cls, rows == 0, False)
            if tl.max(needed.to(tl.int32), 0) > 0:
                first_keys = tl.arange(0, 16)
                first = _tile_logits(
                    q_head,
                    k_head,
                    q_stride_t,
                    q_stride_d,
                    k_stride_p,
                    k_stride_d,
                    rows,
                    needed,
                    first_keys,
                    first_keys == 0,
                    width,
                    scale,
                    CHUNKS,
                    BLOCK_D,
                )
                cls = _column_of_cls(first, first_keys)
                top = tl.maximum(cls, -3.4e38)  # finite, so that no difference is inf - inf
                mass = tl.zeros([BLOCK_T], tl.float32)
                highest = tl.full([BLOCK_T], float("-inf"), tl.float32)
                if OUTPUT:
                    depth = tl.arange(0, CHUNKS * BLOCK_D)
                    v_head = v_ptr + sample * v_stride_b + head * v_stride_h + depth[None, :] * v_stride_d
                    output = (
                        tl.load(v_head, mask=depth[None, :] < width, other=0.0).to(tl.float32)
                        * tl.exp2(cls - top)[:, None]
                    )
                for begin in range(0, patches, BLOCK_P):
                    columns = begin + tl.arange(0, BLOCK_P)
                    logits = _tile_logits(
                        q_head,
                        k_head,
                        q_stride_t,
                        q_stride_d,
                        k_stride_p,
                        k_stride_d,
                        rows,
                        needed,
                        columns + 1,
                        columns < patches,
                        width,
                        scale,
                        CHUNKS,
                        BLOCK_D,
                    )
                    logits += tl.where(columns < patches, 0.0, float("-inf"))[None, :]
                    highest = tl.maximum(highest, tl.max(logits, 1))
                    new_top = tl.maximum(top, highest)
                    rescale = tl.exp2(top - new_top)
                    weights = tl.exp2(logits - new_top[:, None])
                    mass = mass * rescale + tl.sum(weights, 1)
                    if OUTPUT:
                        v_tile = v_head + (columns + 1).to(tl.int64)[:, None] * v_stride_p
                        v = tl.load(v_tile, mask=(columns < patches)[:, None] & (depth < width)[None, :], other=0.0)
                        output = output * rescale[:, None] + _weighted_values(weights, v)
                    top = new_top
                cls = tl.exp2(cls - top)
                inverse = 1.0 / (mass + cls)
                peak = tl.exp2(highest - top) * inverse
                if OUTPUT:
                    output *= inverse[:, None]
                    token = tl.sqrt(tl.sum(output * output, 1))
                else:
                    token = _token_score(token_rule, peak, mass * inverse, cls * inverse)
                share = _share(patch_rule, from_cls, words, inverse, peak)
                tl.store(token_sum_ptr + place * tokens + rows, token, mask=rows < tokens)
                tl.store(top_ptr + place * tokens + rows, top, mask=rows < tokens)
                tl.store(share_ptr + place * tokens + rows, share, mask=rows < tokens)
        tl.debug_barrier()  # a program that does both phases reads what its other threads wrote

    if phases >= 2:
        for key_tile in range(tl.program_id(1), tl.cdiv(patches, BLOCK_P), tl.num_programs(1)):
            columns = key_tile * BLOCK_P + tl.arange(0, BLOCK_P)
            column = tl.zeros([BLOCK_P], tl.float32)
            for begin in range(0, tokens, BLOCK_T):
                rows = begin + tl.arange(0, BLOCK_T)
                maskable = tl.load(maskable_row + rows.to(tl.int64) * m_stride_t, mask=rows < tokens, other=0) != 0
                eligible = tl.where(from_cls, rows == 0, maskable)
                if tl.max(eligible.to(tl.int32), 0) > 0:
                    logits = _tile_logits(
                        q_head,
                        k_head,
                        q_stride_t,
                        q_stride_d,
                        k_stride_p,
                        k_stride_d,
                        rows,
                        eligible,
                        columns + 1,
                        columns < patches,
                        width,
                        scale,
                        CHUNKS,
                        BLOCK_D,
                    )
                    top = tl.load(top_ptr + place * tokens + rows, mask=eligible, other=0.0)
                    share = tl.load(share_ptr + place * tokens + rows, mask=eligible, other=0.0)
                    of_tile = _column_score(patch_rule, tl.exp2(logits - top[:, None]), share, eligible)
                    # Weights are >= 0, so that 0 is neutral for both; NaN must not be lost in a maximum.
                    larger = tl.where(of_tile > column, of_tile, column)
                    larger = tl.where(of_tile == of_tile, larger, of_tile)
                    column = tl.where(patch_rule == 3, larger, column + of_tile)
            tl.store(patch_sum_ptr + place * patches + columns, column, mask=columns < patches)


@triton.jit(do_not_specialize=["heads", "tokens", "patches", "patch_count", "ratio_bits"])
def _finish_kernel(
    token_sum_ptr,  # [B, H, T] float32
    patch_sum_ptr,  # [B, H, P] float32
    maskable_ptr,  # [B, T]
    token_score_ptr,  # [B, T]
    patch_score_ptr,  # [B, P]
    token_mask_ptr,  # [B, T]
    patch_mask_ptr,  # [B, P]
    m_stride_b, m_stride_t,  # strides of maskable
    heads,
    tokens,
    patches,
    ratio_bits,
    patch_count,
    BLOCK: tl.constexpr,  # >= T and P
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if tl.program_id(1) == 0:
        for begin in range(0, heads, 4):
            for head in tl.static_range(4):  # four loads in flight
                here = places < tl.where(begin + head < heads, tokens, 0)
                total += tl.load(
                    token_sum_ptr + (sample * heads + begin + head) * tokens + places, mask=here, other=0.0
                )
        inside = places < tokens
        maskable = (
            tl.load(maskable_ptr + sample * m_stride_b + places.to(tl.int64) * m_stride_t, mask=inside, other=0) != 0
        )
        words = tl.sum(maskable.to(tl.int32), 0)
        _finish_tokens(
            total, maskable, words, ratio_bits, heads, sample * tokens + places, inside, token_score_ptr, token_mask_ptr
        )
    else:
        for begin in range(0, heads, 4):
            for head in tl.static_range(4):
                here = places < tl.where(begin + head < heads, patches, 0)
                total += tl.load(
                    patch_sum_ptr + (sample * heads + begin + head) * patches + places, mask=here, other=0.0
                )
        _finish_patches(
            total, patch_count, heads, sample * patches + places, places < patches, patch_score_ptr, patch_mask_ptr
        )


# Launch configurations


def main_config(tokens: int, patches: int, width: int, dtype: torch.dtype, output: bool) -> LaunchConfig:
    """Return the kernel that reads q and k of one sample's heads, for [.., T, D] against P patches.

    One pass where a head's logits fit the registers and the product runs on tensor cores; otherwise two, as for
    the word score "output" (`output`). float32 products run on the ordinary units: small tiles, in chunks of the
    width.
    """
    half = dtype in _HALVES
    wide = 64 if width <= 64 else max(128, _power_of_2(width))
    if half and not output and tokens <= ONE_PASS_TOKENS and patches <= ONE_PASS_PATCHES.get(wide, 0):
        block_p = 64 if patches <= 64 else 256
        constants = {"BLOCK_T": 64, "BLOCK_P": block_p, "BLOCK_D": wide}
        # Two or three stages fetch the next heads meanwhile; two spill the largest block's registers on sm_100.
        stages = 3 if block_p == 256 else 1 if wide == 128 else 2
        return LaunchConfig("_one_pass_kernel", constants, 4 if block_p == 64 else 8, stages)
    constants = {"OUTPUT": output, "ALL_T": max(512, _power_of_2(tokens))}
    # The second product of "output" holds [BLOCK_T, D] more in registers, and parts of the weights.
    if half:
        block_t, block_p = (32, 32) if output else (64, 128)
        constants |= {"BLOCK_T": block_t, "BLOCK_P": block_p, "BLOCK_D": wide, "CHUNKS": 1}
        return LaunchConfig("_two_pass_kernel", constants, 8, 1 if output else 2)
    constants |= {"BLOCK_T": 32, "BLOCK_P": 16 if output else 64, "BLOCK_D": 16, "CHUNKS": wide // 16}
    return LaunchConfig("_two_pass_kernel", constants, 8, 1)


def finish_config(tokens: int, patches: int) -> LaunchConfig:
    """Return the kernel that makes the masks from the sums of each head."""
    block = next(
        size for size in (64, 256, 1024, 4096, _power_of_2(max(tokens, patches))) if size >= max(tokens, patches)
    )
    return LaunchConfig("_finish_kernel", {"BLOCK": block}, max(1, min(8, block // 256)), 1)


def configurations() -> Iterator[tuple[torch.dtype, LaunchConfig]]:
    """Yield every (dtype of q, LaunchConfig) that calls within T <= 512, P <= 4096 and D <= 128 can take, each once."""
    seen = []
    for dtype, output, tokens, patches, width in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), (False, True), (64, 512), (64, 256, 4096), (64, 128)
    ):
        seen.append((dtype, main_config(tokens, patches, width, dtype, output)))
    seen += [(torch.float32, finish_config(1, patches)) for patches in (64, 256, 1024, 4096)]
    for index, one in enumerate(seen):
        if one not in seen[:index]:
            yield one


def heads_per_program(batch: int, heads: int, processors: float) -> int:
    """Return how many heads of a sample one program of the one-pass kernel takes; all of them need no second launch.

    `processors` is about how many programs run at a time. A program costs its heads and about half a head to
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
    """Launch `sync_mask` in Triton; return its four results. Arguments are not checked.

    q, k, v:  as in `sync_mask`, any strides, never copied; float32, bfloat16 or float16.
    returns:  contiguous; bool [B, T] and [B, P], float32 [B, T] and [B, P].
    numerics: float32 throughout; products of half-precision inputs are summed in float32 on tensor cores, those
              of float32 inputs are not rounded to tf32. An infinite value in v counts as NaN for
              token_score="output" in half precision. Deterministic.
    memory:   4 * B * H * (3 * T + P) bytes at most, without the results, none where one program does a sample.
    runs:     on CUDA from sm_80, and on the CPU under TRITON_INTERPRET=1. One launch (large batches of T <= 64,
              P <= 256 in half precision) to three (small batches of long inputs).
    """
    batch, heads, tokens, width = q.shape
    patches = k.shape[2] - 1
    scores = [q.new_empty(batch, count, dtype=torch.float32) for count in (tokens, patches)]
    masks = [q.new_empty(batch, count, dtype=torch.bool) for count in (tokens, patches)]
    if batch == 0:
        return (*masks, *scores)
    output = token_score == "output"
    v = v if output else k  # not read
    config = main_config(tokens, patches, width, q.dtype, output)
    one_pass = config.kernel == "_one_pass_kernel"
    inputs = (q, k, maskable) if one_pass else (q, k, v, maskable)
    strides = [stride for x in inputs for stride in x.stride()]
    sizes = (heads, tokens, patches, width)
    rules = TOKEN_RULES[token_score], PATCH_RULES[patch_score]
    log2_scale = scale * math.log2(math.e)
    (ratio_bits,) = struct.unpack("<q", struct.pack("<d", token_ratio))
    patch_count = sync_mask.masked_patches(patches, patch_ratio)
    processors = library.num_sms(q.device)
    heads_each = heads_per_program(batch, heads, processors * 8 // config.num_warps) if one_pass else 1
    whole = one_pass and heads_each == heads

    def scratch(count: int) -> Tensor:
        return scores[0] if whole else q.new_empty(batch, heads, count, dtype=torch.float32)

    token_sum, patch_sum = scratch(tokens), scratch(patches)
    with torch.cuda.device(q.device) if q.is_cuda else torch.no_grad():
        if one_pass:
            _one_pass_kernel[batch, -(-heads // heads_each)](
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
                **config.options,
            )
        else:
            pairs = batch * heads
            launches = [(3, 1)]
            if pairs < 2 * processors:  # (phase, tiles side by side)
                launches = [
                    (1, -(-tokens // config.constants["BLOCK_T"])),
                    (2, -(-patches // config.constants["BLOCK_P"])),
                ]
            top, share = scratch(tokens), scratch(tokens)
            for phases, tiles in launches:
                _two_pass_kernel[pairs, tiles](
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
                    **config.options,
                )
        if not whole:
            finish = finish_config(tokens, patches)
            _finish_kernel[batch, 2](
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
                **finish.options,
            )
    return (*masks, *scores)


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()
