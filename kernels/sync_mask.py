"""Synchronized masks: the words and the patches that a teacher's cross-attention ties together.

    A[h, i, j]  = softmax over the 1+P keys j of scale * q[h, i] . k[h, j]     (key 0 is the image's [CLS])
    peak[h, i]  = max over patches j of A[h, i, 1+j]
    token_score = for each word, a summary of its row of A; patch_score = for each patch, of its column
    the masks   = the words and the patches with the highest scores, a fixed share of each sample

Letters: B samples, H heads, T text tokens ([CLS] first), P patches, D head width.
Source: SyncMask (CVPR 2024) names the idea; its formulas are not public, so the score rules are our own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from syncmask_fast.kernels import checks, library

TOKEN_SCORES = ("peak", "mass", "cls", "output")
PATCH_SCORES = ("mean", "cls", "weighted", "max")
_TILE_ELEMENTS = 1 << 20  # attention weights alive at a time in the reference (4 MiB of float32: fits a CPU's cache)


class SyncMask(NamedTuple):
    """token_mask bool [B, T], patch_mask bool [B, P], token_score [B, T], patch_score [B, P]."""

    token_mask: Tensor
    patch_mask: Tensor
    token_score: Tensor
    patch_score: Tensor


def sync_mask_reference(
    q: Tensor,
    k: Tensor,
    maskable: Tensor,
    *,
    v: Tensor | None = None,
    token_ratio: float = 0.15,
    patch_ratio: float = 0.5,
    token_score: str = "peak",
    patch_score: str = "max",
    scale: float | None = None,
) -> SyncMask:
    """Return `sync_mask` by its definition in plain PyTorch; float64 for float64 inputs.

    Computes tiles of samples and single heads: about a million attention weights exist at a time, or those of one
    sample and head where these are more.
    """
    _check(q, k, maskable, v, token_ratio, patch_ratio, token_score, patch_score, scale, checks.FLOATS_AND_DOUBLE)
    batch, heads, tokens, width = q.shape
    patches = k.shape[2] - 1
    dtype = library.reference_dtype(q)
    scale = width**-0.5 if scale is None else scale
    word_score = torch.zeros(batch, tokens, dtype=dtype, device=q.device)
    patch_total = torch.zeros(batch, patches, dtype=dtype, device=q.device)
    tile = max(1, _TILE_ELEMENTS // (tokens * (patches + 1)))
    with library.autocast_off(q):
        for begin in range(0, batch, tile):
            rows = slice(begin, begin + tile)
            for head in range(heads):
                logits = q[rows, head].to(dtype) @ k[rows, head].to(dtype).transpose(-1, -2) * scale
                attention = logits.softmax(-1)
                values = None if v is None or token_score != "output" else v[rows, head].to(dtype)
                word_score[rows] += _token_score_of_head(attention, values, token_score)
                patch_total[rows] += _patch_score_of_head(attention, maskable[rows], patch_score)
    word_score = (word_score / heads).masked_fill(~maskable, -math.inf)
    patch_total = patch_total / heads

    token_mask = torch.zeros(batch, tokens, dtype=torch.bool, device=q.device)
    patch_mask = torch.zeros(batch, patches, dtype=torch.bool, device=q.device)
    words = maskable.sum(1)
    if token_ratio > 0:
        count = torch.clamp(torch.floor(token_ratio * words.double() + 0.5), min=1).long().minimum(words)
        token_mask = _highest(word_score, count, maskable)
    if patch_ratio > 0:
        count = torch.full_like(words, masked_patches(patches, patch_ratio))
        patch_mask = _highest(patch_total, count, torch.ones_like(patch_mask))
    return SyncMask(token_mask, patch_mask, word_score, patch_total)


def masked_patches(patches: int, patch_ratio: float) -> int:
    """Return how many of `patches` patches `sync_mask` masks: the same for every sample."""
    return 0 if patch_ratio == 0 else max(1, math.floor(patch_ratio * patches + 0.5))


def _token_score_of_head(attention: Tensor, values: Tensor | None, rule: str) -> Tensor:
    """attention [b, T, 1+P], values [b, 1+P, D] for "output" -> [b, T]."""
    if rule == "peak":
        return attention[:, :, 1:].amax(-1)
    if rule == "mass":
        return 1 - attention[:, :, 0]
    if rule == "cls":
        return attention[:, :, 0]
    return torch.linalg.vector_norm(attention @ values, dim=-1)


def _patch_score_of_head(attention: Tensor, maskable: Tensor, rule: str) -> Tensor:
    """attention [b, T, 1+P], maskable [b, T] -> [b, P]; the "cls" rule where no token is maskable."""
    to_patches = attention[:, :, 1:]
    from_cls = to_patches[:, 0]
    if rule == "cls":
        return from_cls
    # Rows that are not maskable may hold anything, NaN included: they are replaced, never multiplied by 0.
    to_patches = to_patches.masked_fill(~maskable[:, :, None], 0)
    words = maskable.sum(1)[:, None]
    if rule == "max":
        score = to_patches.amax(1)  # weights are >= 0, so the replaced rows never win against a maskable one
    elif rule == "mean":
        score = to_patches.sum(1) / words
    else:
        score = (to_patches * to_patches.amax(-1, keepdim=True)).sum(1) / words
    return torch.where(words > 0, score, from_cls)


def _highest(score: Tensor, count: Tensor, eligible: Tensor) -> Tensor:
    """Mark the count[b] highest eligible entries of score [B, N]; NaN below numbers, ties to the lowest."""
    # Ranked by eligibility, then by score, then by index: stable sorts, the less important key first.
    # No eligible entry scores -inf, so that -inf can stand for NaN.
    by_score = score.masked_fill(score.isnan(), -math.inf).argsort(dim=1, descending=True, stable=True)
    first = eligible.int().gather(1, by_score).argsort(dim=1, descending=True, stable=True)
    order = by_score.gather(1, first)
    chosen = torch.arange(score.shape[1], device=score.device) < count[:, None]
    return torch.zeros_like(eligible, memory_format=torch.contiguous_format).scatter_(1, order, chosen)


def _fake(q, k, maskable, v, token_ratio, patch_ratio, token_score, patch_score, scale):
    words, patches = maskable.shape, (k.shape[0], k.shape[2] - 1)
    dtype = library.reference_dtype(q)
    masks = q.new_empty(words, dtype=torch.bool), q.new_empty(patches, dtype=torch.bool)
    return *masks, q.new_empty(words, dtype=dtype), q.new_empty(patches, dtype=dtype)


OPS = library.define(
    "sync_mask",
    "(Tensor q, Tensor k, Tensor maskable, Tensor? v, float token_ratio, float patch_ratio, str token_score, "
    "str patch_score, float scale) -> (Tensor token_mask, Tensor patch_mask, Tensor token_scores, Tensor patch_scores)",
    fake=_fake,
    reference=sync_mask_reference,
    triton="sync_mask_triton:sync_mask_triton",
)


def sync_mask(
    q: Tensor,
    k: Tensor,
    maskable: Tensor,
    *,
    v: Tensor | None = None,
    token_ratio: float = 0.15,
    patch_ratio: float = 0.5,
    token_score: str = "peak",
    patch_score: str = "max",
    scale: float | None = None,
    backend: str = "auto",
) -> SyncMask:
    """Return masks of the words and patches that one cross-attention layer of the teacher ties together most.

    q:         [B, H, T, D] queries of the text tokens; float32, bfloat16 or float16, any strides.
    k:         [B, H, 1+P, D] keys of the image [CLS] (index 0), then of the P patches; dtype of q.
    maskable:  bool [B, T], True for real words: not [CLS] (position 0), [SEP] or padding.
    v:         [B, H, 1+P, D] values; needed by token_score="output" only.
    returns:   SyncMask(token_mask bool [B, T], patch_mask bool [B, P], token_score and patch_score float32),
               contiguous. A sample with m maskable tokens gets min(m, max(1, floor(token_ratio * m + 0.5)))
               masked words and max(1, floor(patch_ratio * P + 0.5)) masked patches; none where m = 0 or the
               ratio is 0.
    token_score (-inf where not maskable), each a mean over heads of
               "peak" peak[h, i]; "mass" 1 - A[h, i, 0]; "cls" A[h, i, 0]; "output" the Euclidean norm of
               the sum over keys j of A[h, i, j] v[h, j].
    patch_score, each a mean over heads of
               "mean" the mean over maskable tokens of A[h, i, 1+j]; "cls" A[h, 0, 1+j]; "weighted" the mean
               over maskable tokens of peak[h, i] A[h, i, 1+j]; "max" the maximum over maskable tokens of
               A[h, i, 1+j]. A sample without a maskable token gets "cls".
    scale:     of the logits; D ** -0.5 where None. The softmax is in float32, inside autocast too.
    ties:      to the lowest index; NaN ranks below every number (and above tokens that are not maskable).
    grad:      none, inputs are detached.
    errors:    ValueError for shape, dtype or device mismatch, ratios outside [0, 1], unknown names, a backend
               that is not built.
    memory:    O(B (T + P)), and a tile of the attention map for each thread.
    runs:      C++ on CPU, Triton on CUDA (and on the CPU for backend="triton" under TRITON_INTERPRET=1); the
               reference, with one warning, where these are missing.
    source:    our own rules for the idea of SyncMask (module docstring).
    """
    _check(q, k, maskable, v, token_ratio, patch_ratio, token_score, patch_score, scale, checks.FLOATS)
    op = OPS.pick(backend, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    v = None if v is None or token_score != "output" else v.detach()
    ratios = float(token_ratio), float(patch_ratio)
    return SyncMask(*op(q.detach(), k.detach(), maskable, v, *ratios, token_score, patch_score, scale))


def attention_summary(
    q: Tensor,
    k: Tensor,
    maskable: Tensor,
    *,
    v: Tensor | None = None,
    token_score: str = "peak",
    patch_score: str = "max",
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the scores of `sync_mask` without masks: a summary of an attention map that is never stored.

    q, k, v, maskable, token_score, patch_score, scale, backend: as of `sync_mask`.
    returns: token_score float32 [B, T], -inf where not maskable, and patch_score float32 [B, P].
    errors, memory, runs: as of `sync_mask`; nothing is ranked.
    """
    rules = {"token_score": token_score, "patch_score": patch_score}
    none = {"token_ratio": 0.0, "patch_ratio": 0.0}
    return sync_mask(q, k, maskable, v=v, **none, **rules, scale=scale, backend=backend)[2:]


def _check(q, k, maskable, v, token_ratio, patch_ratio, token_score, patch_score, scale, dtypes) -> None:
    checks.check_tensor("q", q, "B, H, T, D", dtypes)
    checks.check_tensor("k", k, "B, H, 1+P, D", dtypes)
    checks.check_tensor("maskable", maskable, "B, T", (torch.bool,))
    batch, heads, tokens, width = q.shape
    if heads == 0 or tokens == 0 or width == 0:
        raise ValueError(f"q has shape {list(q.shape)}; expected H, T and D of at least 1")
    keys = k.shape[2]
    if keys < 2:
        raise ValueError(f"k has shape {list(k.shape)}; expected at least 2 keys: the image [CLS] and one patch")
    checks.check_shape("k", k, (batch, heads, keys, width), "B, H and D of q")
    checks.check_shape("maskable", maskable, (batch, tokens), "B and T of q")
    checks.check_same("k", k, "q", q, dtype=True)
    checks.check_same("maskable", maskable, "q", q)
    checks.check_choice("token_score", token_score, TOKEN_SCORES)
    checks.check_choice("patch_score", patch_score, PATCH_SCORES)
    if v is not None:
        checks.check_tensor("v", v, "B, H, 1+P, D", dtypes)
        checks.check_shape("v", v, k.shape, "the shape of k")
        checks.check_same("v", v, "q", q, dtype=True)
    elif token_score == "output":
        raise ValueError("v is None; expected the values [B, H, 1+P, D], which token_score='output' needs")
    checks.check_number("token_ratio", token_ratio, 0, 1, "a number from 0 to 1")
    checks.check_number("patch_ratio", patch_ratio, 0, 1, "a number from 0 to 1")
    if scale is not None:
        finite = torch.finfo(torch.float32).max
        checks.check_number("scale", scale, -finite, finite, "None or a finite number")
