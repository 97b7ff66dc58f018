"""Semi-hard negatives: for each anchor the most similar candidates of other products, but not too similar.

    s[i, j]    = anchors[i] . candidates[j]
    eligible   = candidate_ids[j] != anchor_ids[i]  and  s[i, j] < positive_score[i] - margin
    temperature None: the k eligible with the highest s. Otherwise the k eligible with the highest
    s / temperature + g[i, j] with Gumbel noise g, which is k draws without replacement with probability
    proportional to exp(s / temperature).

The noise depends only on (seed, i, j), in 32-bit unsigned arithmetic, so that every backend draws the same:

    mix(x):  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16      ("lowbias32")
    row(i)    = mix(i ^ mix(seed_low ^ mix(seed_high ^ 0x9e3779b9)))         the halves of the 64-bit seed
    column(j) = mix(j ^ 0x85ebca6b)
    h         = mix(row(i) + column(j))
    u         = min((float32(h) + 0.5) * 2**-32, 1 - 2**-24)             uniform in (0, 1), finest near 0
    g         = -log(-log1p(-u))                                         a small u is a large g, which wins

The bits of h agree everywhere; log and log1p may differ in the last place between backends, which only near
ties can show.

Letters: N anchors, M candidates, D features. Source: our own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from syncmask_fast.kernels import checks, library

_TILE_ELEMENTS = 1 << 21  # similarities alive at a time in the reference (8 MiB of float32)
_WORD = 0xFFFFFFFF
TRITON_LARGEST_K = 64


def mine_semi_hard_reference(
    anchors: Tensor,
    candidates: Tensor,
    anchor_ids: Tensor,
    candidate_ids: Tensor,
    positive_score: Tensor,
    *,
    k: int = 1,
    margin: float = 0.0,
    temperature: float | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return `mine_semi_hard` by its definition in plain PyTorch; float64 for float64 features.

    Computes tiles of anchors: about two million similarities exist at a time, or one anchor's where these are more.
    """
    dtypes = checks.FLOATS_AND_DOUBLE
    _check(anchors, candidates, anchor_ids, candidate_ids, positive_score, k, margin, temperature, seed, dtypes)
    rows, columns = anchors.shape[0], candidates.shape[0]
    dtype = library.reference_dtype(anchors)
    index = torch.full((rows, k), -1, dtype=torch.int64, device=anchors.device)
    score = torch.full((rows, k), -math.inf, dtype=dtype, device=anchors.device)
    found = min(k, columns)
    if found == 0:
        return index, score
    threshold = positive_score.to(dtype) - margin
    targets = candidates.to(dtype).T
    tile = max(1, _TILE_ELEMENTS // columns)
    for begin in range(0, rows, tile):
        part = slice(begin, min(begin + tile, rows))
        with library.autocast_off(anchors):
            similarity = anchors[part].to(dtype) @ targets
        eligible = (candidate_ids != anchor_ids[part, None]) & (similarity < threshold[part, None])
        rank = similarity
        if temperature is not None:
            rank = similarity / temperature + gumbel_noise(seed, part.start, part.stop, columns, anchors.device, dtype)
        # An eligible -inf (only from overflow) still stands above what is not eligible.
        rank = rank.clamp(min=torch.finfo(dtype).min).masked_fill(~eligible, -math.inf)
        chosen = _highest_indices(rank, found)
        valid = eligible.gather(1, chosen)
        index[part, :found] = chosen.masked_fill(~valid, -1)
        score[part, :found] = similarity.gather(1, chosen).masked_fill(~valid, -math.inf)
    return index, score


def _highest_indices(rank: Tensor, k: int) -> Tensor:
    """Return the columns of the k highest entries of each row of rank [R, M], k <= M, without NaN.

    Descending, ties to the lowest column. `topk` returns any of several equal entries, and sorting whole rows is slow.
    """
    if k == 1:
        return rank.argmax(1, keepdim=True)  # documented to return the first maximum
    last = rank.topk(k, dim=1).values[:, -1:]
    above, level = rank > last, rank == last
    free = k - above.sum(1, keepdim=True)
    columns = (above | (level & (level.cumsum(1, dtype=torch.int32) <= free))).nonzero()[:, 1].view(-1, k)
    order = rank.gather(1, columns).argsort(dim=1, descending=True, stable=True)
    return columns.gather(1, order)


def gumbel_noise(
    seed: int, begin: int, end: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the noise g (module docstring) of anchors begin..end-1 with all candidates, [end - begin, columns]."""
    row = _mix(torch.arange(begin, end, device=device) ^ (seed_key(seed) & _WORD))
    column = _mix(torch.arange(columns, device=device) ^ 0x85EBCA6B)
    bits = _mix((row[:, None] + column) & _WORD)
    uniform = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).to(dtype)
    return -torch.log(-torch.log1p(-uniform))


def seed_key(seed: int) -> int:
    """Return mix(seed_low ^ mix(seed_high ^ 0x9e3779b9)) as a signed 32-bit integer."""
    key = _mix_int((seed & _WORD) ^ _mix_int((seed >> 32 & _WORD) ^ 0x9E3779B9))
    return key - 2**32 if key >= 2**31 else key


def _mix(x: Tensor) -> Tensor:
    """x int64 with values below 2**32; products wrap at 2**64, which leaves their lower 32 bits right."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)


def _mix_int(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)


def _fake(anchors, candidates, anchor_ids, candidate_ids, positive_score, k, margin, temperature, seed):
    shape = anchors.shape[0], k
    dtype = library.reference_dtype(anchors)
    return anchors.new_empty(shape, dtype=torch.int64), anchors.new_empty(shape, dtype=dtype)


def _triton_takes(anchors, candidates, anchor_ids, candidate_ids, positive_score, k, *rest) -> bool:
    return k <= TRITON_LARGEST_K


OPS = library.define(
    "mine_semi_hard",
    "(Tensor anchors, Tensor candidates, Tensor anchor_ids, Tensor candidate_ids, Tensor positive_score, SymInt k, "
    "float margin, float? temperature, int seed) -> (Tensor index, Tensor score)",
    fake=_fake,
    reference=mine_semi_hard_reference,
    triton="mine_semi_hard_triton:mine_semi_hard_triton",
    triton_takes=_triton_takes,
)


def mine_semi_hard(
    anchors: Tensor,
    candidates: Tensor,
    anchor_ids: Tensor,
    candidate_ids: Tensor,
    positive_score: Tensor,
    *,
    k: int = 1,
    margin: float = 0.0,
    temperature: float | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return for each anchor k semi-hard negatives among the candidates: the highest, or k draws.

    anchors:        [N, D] float32, bfloat16 or float16, any strides; normalized by the caller.
    candidates:     [M, D], dtype of anchors.
    anchor_ids:     int64 [N] product ids; candidate_ids: int64 [M].
    positive_score: float32 [N], the similarity of each anchor to its own positive.
    k:              negatives per anchor, at least 1; may exceed M.
    temperature:    None: the k eligible with the highest similarity, descending. A number above 0: k draws
                    without replacement, in the order drawn, with probability proportional to
                    exp(similarity / temperature).
    seed:           any 64-bit integer; the same seed gives the same draw, whatever else happened before.
    returns:        (index int64 [N, k], score float32 [N, k]); -1 and -inf where fewer than k are eligible.
    eligible:       another product, and similarity (accumulated in float32) < positive_score - margin. NaN is
                    not eligible.
    ties:           to the lowest index.      grad: none, inputs are detached.
    memory:         O(N k) and a tile of similarities for each thread or program; never [N, M].
    errors:         ValueError for shape, dtype or device mismatch, k < 1, temperature <= 0, a backend that
                    is not built.
    runs:           C++ on CPU, Triton on CUDA for k <= 64 (and on the CPU for backend="triton" under
                    TRITON_INTERPRET=1); the reference otherwise, with one warning where one of these is missing.
    source:         our own.
    """
    dtypes = checks.FLOATS
    _check(anchors, candidates, anchor_ids, candidate_ids, positive_score, k, margin, temperature, seed, dtypes)
    op = OPS.pick(backend, anchors.device)
    if backend == "triton" and k > TRITON_LARGEST_K:
        raise ValueError(f"k is {k}; expected at most {TRITON_LARGEST_K} for backend='triton'")
    tensors = (t.detach() for t in (anchors, candidates, anchor_ids, candidate_ids, positive_score.float()))
    temperature = None if temperature is None else float(temperature)
    return op(*tensors, int(k), float(margin), temperature, _as_int64(int(seed)))


def _as_int64(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63


def _check(
    anchors, candidates, anchor_ids, candidate_ids, positive_score, k, margin, temperature, seed, dtypes
) -> None:
    checks.check_tensor("anchors", anchors, "N, D", dtypes)
    checks.check_tensor("candidates", candidates, "M, D", dtypes)
    checks.check_tensor("anchor_ids", anchor_ids, "N", (torch.int64,))
    checks.check_tensor("candidate_ids", candidate_ids, "M", (torch.int64,))
    checks.check_tensor("positive_score", positive_score, "N", dtypes)
    rows, width = anchors.shape
    checks.check_shape("candidates", candidates, (candidates.shape[0], width), "D of anchors")
    checks.check_shape("anchor_ids", anchor_ids, (rows,), "N of anchors")
    checks.check_shape("candidate_ids", candidate_ids, (candidates.shape[0],), "M of candidates")
    checks.check_shape("positive_score", positive_score, (rows,), "N of anchors")
    checks.check_same("candidates", candidates, "anchors", anchors, dtype=True)
    for name, value in (
        ("anchor_ids", anchor_ids),
        ("candidate_ids", candidate_ids),
        ("positive_score", positive_score),
    ):
        checks.check_same(name, value, "anchors", anchors)
    checks.check_integer("k", k, 1, 2**31 - 1, "an integer of at least 1")
    checks.check_margin(margin)
    checks.check_integer("seed", seed, -(2**63), 2**64 - 1, "an integer of at most 64 bits")
    if temperature is not None:
        smallest = torch.finfo(torch.float32).tiny
        largest = torch.finfo(torch.float32).max
        checks.check_number("temperature", temperature, smallest, largest, "None or a finite number above 0")
