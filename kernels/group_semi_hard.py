"""The order of the next epoch: a walk from each sample to a near miss, so that batches are full of them.

Step 1 leaves the start by image -> text similarity, step 2 leaves the item reached by text -> image
similarity, and so on in turn. At position p, from item c, the next item is the unvisited j with the highest
similarity s among

    1. those with an allowed id and s < image_feats[c] . text_feats[c] - margin; if there is none,
    2. those with an allowed id; if there is none,
    3. all unvisited.

An id is allowed if it differs from ids[c] and from the ids at positions floor(p / batch_size) * batch_size ..
p - 1. Ties go to the lowest index. Similarities accumulate in float32, and NaN (from overflow) counts as
-inf: the result is a permutation for any input. Backends add in different orders, so that two similarities
which differ by less than the rounding of a float32 sum may change places between backends; where sums are
exact the orders are equal.

Source: the walk of GRIT-VLP (its `GRIT.grouping`, with a mask instead of a softmax, which underflows there),
the semi-hard threshold of SyncMask, and the product rule, which is our own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from syncmask_fast.kernels import checks, library
from syncmask_fast.kernels.mine_semi_hard import mine_semi_hard

_CUDA_NEIGHBORS = 32


def group_semi_hard_reference(
    image_feats: Tensor,
    text_feats: Tensor,
    ids: Tensor,
    *,
    batch_size: int = 1,
    margin: float = 0.0,
    start: int = 0,
    search_space: int | None = None,
) -> Tensor:
    """Return `group_semi_hard` by its definition in plain PyTorch; float64 for float64 features.

    One matrix-vector product a step. Nothing is copied to the host: on a GPU the steps are queued.
    """
    _check(image_feats, text_feats, ids, batch_size, margin, start, search_space, checks.FLOATS_AND_DOUBLE)
    items = image_feats.shape[0]
    dtype = library.reference_dtype(image_feats)
    image_feats, text_feats = image_feats.to(dtype), text_feats.to(dtype)
    codes = torch.unique(ids, return_inverse=True)[1]  # products numbered 0, 1, ...
    order = torch.empty(items, dtype=torch.int64, device=ids.device)
    run = search_space or max(1, items)
    with library.autocast_off(image_feats):
        for begin in range(0, items, run):
            part = slice(begin, begin + run)
            first = start if begin == 0 else 0
            order[part] = begin + _walk(image_feats[part], text_feats[part], codes[part], batch_size, margin, first)
    return order


def _walk(image_feats: Tensor, text_feats: Tensor, codes: Tensor, batch_size: int, margin: float, start: int) -> Tensor:
    """Walk one run: features [n, D] in the working dtype, codes int64 [n] -> order int64 [n]."""
    items = image_feats.shape[0]
    device = image_feats.device
    unvisited = torch.ones(items, dtype=torch.bool, device=device)
    # Codes are numbered over all runs; in_batch marks those of the batch that position p belongs to.
    in_batch = torch.zeros(int(codes.max()) + 1, dtype=torch.bool, device=device)
    order = torch.empty(items, dtype=torch.int64, device=device)
    current = torch.tensor([start], device=device)
    for position in range(items):
        if position > 0:
            if position % batch_size == 0:
                in_batch.zero_()
            source, target = (image_feats, text_feats) if position % 2 else (text_feats, image_feats)
            similarity = target @ source[current][0]
            similarity.masked_fill_(similarity.isnan(), -math.inf)
            allowed = unvisited & ~in_batch[codes] & (codes != codes[current])
            near_miss = allowed & (similarity < similarity[current] - margin)
            current = _first_highest(similarity, torch.stack((unvisited, allowed, near_miss)))
        order[position] = current[0]
        unvisited[current] = False
        in_batch[codes[current]] = True
    return order


def _first_highest(similarity: Tensor, levels: Tensor) -> Tensor:
    """Return the index [1] of the highest similarity [n] (no NaN) in the last row with marks of levels bool [3, n]."""
    level = levels.sum(0)  # each level is part of the one before it
    best_level = level == level.max()
    similarity = similarity.masked_fill(~best_level, -math.inf)
    return (best_level & (similarity == similarity.max())).int().argmax(0, keepdim=True)


def _group_cuda(image_feats, text_feats, ids, batch_size, margin, start, search_space, neighbors=0) -> Tensor:
    items, width = image_feats.shape
    codes = torch.unique(ids, return_inverse=True)[1]
    padding = (0, -width % 4)  # the kernel reads four features at a time
    image_feats, text_feats = F.pad(image_feats, padding), F.pad(text_feats, padding)
    order = torch.empty_like(ids)
    run = search_space or max(1, items)
    for begin in range(0, items, run):
        part = slice(begin, begin + run)
        first = start if begin == 0 else 0
        order[part] = begin + _walk_cuda(
            image_feats[part], text_feats[part], codes[part], batch_size, margin, first, neighbors or _CUDA_NEIGHBORS
        )
    return order


def _walk_cuda(
    images: Tensor, texts: Tensor, codes: Tensor, batch_size: int, margin: float, start: int, neighbors: int
) -> Tensor:
    """Walk one run: make lists of the items that are left, walk until new lists are worth their time, repeat."""
    items = len(codes)
    order, item = torch.empty_like(codes), torch.arange(items, device=codes.device)
    unvisited = torch.ones(items, dtype=torch.bool, device=codes.device)
    batch_of = torch.full((int(codes.max()) + 1,), -1, device=codes.device)
    state = torch.tensor([0, start], device=codes.device)
    while True:
        own = (images * texts).sum(1)
        lists = [
            mine_semi_hard(*sides, codes, codes, own, k=neighbors, margin=margin)[0].int()
            for sides in ((images, texts), (texts, images))
        ]
        torch.ops.syncmask._group_walk(
            images, texts, torch.stack(lists), codes.int(), item, unvisited, batch_of, order, state, batch_size, margin
        )
        position, place = state.tolist()
        if position == items:
            return order
        state[1] = unvisited[:place].sum()  # the place of the next item among those that are left
        left = unvisited.nonzero()[:, 0]
        images, texts, codes, item, unvisited = (x[left] for x in (images, texts, codes, item, unvisited))


def _fake(image_feats, text_feats, ids, batch_size, margin, start, search_space, neighbors=0):
    return ids.new_empty(ids.shape)


def _without_lists(neighbors: int = 0, **arguments) -> Tensor:
    """The reference has no neighbor lists; their length changes the time, not the result."""
    return group_semi_hard_reference(**arguments)


# neighbors: entries of a neighbor list, for tests; 0: as many as pay.
OPS = library.define(
    "group_semi_hard",
    "(Tensor image_feats, Tensor text_feats, Tensor ids, int batch_size, float margin, int start, int? search_space, "
    "int neighbors=0) -> Tensor",
    fake=_fake,
    reference=_without_lists,
    cuda=_group_cuda,
)
# The steps until new lists are due: csrc/group_semi_hard.cu, where the layouts are documented.
torch.library.define(
    "syncmask::_group_walk",
    "(Tensor images, Tensor texts, Tensor lists, Tensor product, Tensor item, Tensor(a!) unvisited, "
    "Tensor(b!) batch_of, Tensor(c!) order, Tensor(d!) state, int batch_size, float margin) -> ()",
)


def group_semi_hard(
    image_feats: Tensor,
    text_feats: Tensor,
    ids: Tensor,
    *,
    batch_size: int = 1,
    margin: float = 0.0,
    start: int = 0,
    search_space: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return an order of samples in which neighbors are near misses and a batch holds no product twice if possible.

    image_feats:  [N, D] float32, bfloat16 or float16, any strides; finite, normalized by the caller.
    text_feats:   [N, D], dtype of image_feats.
    ids:          int64 [N] product ids.
    batch_size:   positions per batch; a product does not come twice in a batch while another choice exists.
    margin:       how far below the own pair's similarity a near miss must lie; -inf turns the rule off.
    start:        first item of the (first) walk, in 0 .. min(N, search_space) - 1.
    search_space: cuts the input into consecutive runs of so many, walks each by itself (the first from
                  `start`, the others from their first item; positions and batches count within the run) and
                  joins the results; None: one walk.
    returns:      int64 [N], a permutation of 0 .. N-1. Exact: neighbor lists save work, and where one has
                  nothing left the step looks at every unvisited item of its run.
    ties:         to the lowest index.      grad: none, inputs are detached.
    memory:       for runs of n on the CPU a copy of n features and lists of 24 to 128 neighbors, 16 bytes
                  each: 1.1 GB for n = 260,000 and D = 256; no [n, n] tensor. On CUDA the same, with lists of 32.
    time:         O(N n D) for runs of n, most of it in one blocked product, a third more as lists become empty. More
                  where all lists are empty: when only one product is left.
    errors:       ValueError for shape, dtype or device mismatch, batch_size or search_space < 1, start out of
                  range, margin NaN, a backend that is not built.
    runs:         C++ on CPU and CUDA; the reference, with one warning, where the extension is not built.
    source:       GRIT-VLP's grouping, SyncMask's semi-hard rule (module docstring).
    """
    _check(image_feats, text_feats, ids, batch_size, margin, start, search_space, checks.FLOATS)
    op = OPS.pick(backend, image_feats.device)
    images, texts = (t.detach().to(torch.float32).contiguous() for t in (image_feats, text_feats))
    search_space = None if search_space is None else int(search_space)
    return op(images, texts, ids.contiguous(), int(batch_size), float(margin), int(start), search_space)


def _check(image_feats, text_feats, ids, batch_size, margin, start, search_space, dtypes) -> None:
    checks.check_tensor("image_feats", image_feats, "N, D", dtypes)
    checks.check_tensor("text_feats", text_feats, "N, D", dtypes)
    checks.check_tensor("ids", ids, "N", (torch.int64,))
    items = image_feats.shape[0]
    checks.check_shape("text_feats", text_feats, image_feats.shape, "the shape of image_feats")
    checks.check_shape("ids", ids, (items,), "N of image_feats")
    checks.check_same("text_feats", text_feats, "image_feats", image_feats, dtype=True)
    checks.check_same("ids", ids, "image_feats", image_feats)
    checks.check_integer("batch_size", batch_size, 1, 2**62, "an integer of at least 1")
    checks.check_margin(margin)
    if search_space is not None:
        checks.check_integer("search_space", search_space, 1, 2**62, "None or an integer of at least 1")
    last = max(0, (items if search_space is None else min(items, search_space)) - 1)
    checks.check_integer("start", start, 0, last, f"an integer from 0 to {last}, within the first run")
