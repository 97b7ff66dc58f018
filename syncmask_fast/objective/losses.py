"""The four objectives as pure functions, and the queue of momentum features. Shape letters: B pairs, Q queue places, E width of the ITC space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Queue(NamedTuple):
    """The last momentum features, as further ITC candidates (ALBEF). Product ids of empty places are -1."""

    images: Tensor
    """float32 [Q, E]."""
    texts: Tensor
    """float32 [Q, E]."""
    product_ids: Tensor
    """int64 [Q]: product numbers, 0 or more."""

    @classmethod
    def empty(cls, places: int, width: int, device: torch.device) -> Queue:
        features = torch.zeros(2, places, width, device=device)
        return cls(features[0], features[1], torch.full((places,), -1, device=device))

    def next_slots(self, pairs: int, step: int, batch: int) -> Tensor:
        """int64 [min(pairs, Q)]: the places that `push` gives to the last of so many pairs."""
        places = len(self.product_ids)
        kept = min(pairs, places)
        return (step * batch + pairs - kept + torch.arange(kept, device=self.product_ids.device)) % max(places, 1)

    def enqueue(self, images: Tensor, texts: Tensor, ids: Tensor, step: int, batch: int) -> None:
        """Overwrites the oldest places in place; `step` counts pushes of at most `batch` pairs each."""
        at = self.next_slots(len(ids), step, batch)
        images, texts, ids = (x[len(x) - len(at) :] for x in (images, texts, ids))
        self.images.index_copy_(0, at, images)
        self.texts.index_copy_(0, at, texts)
        self.product_ids.index_copy_(0, at, ids)


def itc_loss(
    images: Tensor,
    texts: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    product_ids: Tensor,
    queue: Queue,
    temperature: Tensor,
    alpha: float,
    rows: slice = slice(None),
) -> Tensor:
    """ITC with a momentum queue and soft targets (ALBEF, equations 1, 2 and 6), positives by product id (FashionSAP).

    images, texts, teacher_images, teacher_texts: unit vectors [B, E]; product_ids: int64 [B].
    The candidates are the batch's own features, with gradient (our choice: ALBEF takes the teacher's, from which a model that starts from
    random weights does not leave the state in which all features are alike), and the teacher's features in the queue.
    rows: the anchors that are counted (one rank's); the mean is over all, so that the losses of all rows add up.
    The targets are alpha * the teacher's softmax + (1 - alpha) * the uniform distribution over the candidates of the same product.
    """
    candidate_ids = torch.cat([product_ids, queue.product_ids])
    empty = candidate_ids < 0
    positive = (product_ids[rows, None] == candidate_ids).float()
    positive = positive / positive.sum(1, keepdim=True)
    loss = images.new_zeros(())
    image_side = images, texts, teacher_images, teacher_texts, queue.texts
    text_side = texts, images, teacher_texts, teacher_images, queue.images
    for anchors, others, teacher_anchors, teacher_others, queued in (image_side, text_side):
        logits = (anchors[rows] @ torch.cat([others, queued]).T / temperature).masked_fill(empty, -torch.inf)
        with torch.no_grad():
            soft = (
                (teacher_anchors[rows] @ torch.cat([teacher_others, queued]).T / temperature)
                .masked_fill(empty, -torch.inf)
                .softmax(1)
            )
            targets = alpha * soft + (1 - alpha) * positive
        loss = loss - (targets * logits.log_softmax(1).masked_fill(empty, 0)).sum() / len(product_ids)
    return loss / 2


def _here(x: Tensor) -> Tensor:
    """The sum over the ranks of what is on one rank alone. A loss that takes another `add_up` is one rank's part of the mean over all ranks."""
    return x


def itm_loss(logits: Tensor, matched: Tensor, weight: Tensor, add_up: Callable[[Tensor], Tensor] = _here) -> Tensor:
    """ITM: binary cross-entropy of match logits [N, 2] with matched bool [N]; pairs of weight 0 do not count. weight: float32 [N]."""
    each = F.cross_entropy(logits.float(), matched.long(), reduction="none")
    return (each * weight).sum() / add_up(weight.sum()).clamp(min=1)


def mlm_loss(logits: Tensor, token_ids: Tensor, total: int | None = None) -> Tensor:
    """MLM: mean cross-entropy of logits [n, vocabulary] at the masked places only, token_ids int64 [n]; 0 where n = 0. total: n of all ranks."""
    if not len(token_ids):
        return logits.float().sum()
    return F.cross_entropy(logits.float(), token_ids, reduction="sum") / (total or len(token_ids))


def mim_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """MIM: mean squared error at the masked patches only, both [B, n, size of the target]."""
    return F.mse_loss(predicted.float(), target.float())


def normalized_patches(pixels: Tensor, patch: int, chosen: Tensor) -> Tensor:
    """Pixels of chosen patches, each patch with mean 0 and variance 1 (He et al. 2022, "normalised pixels"): [B, n, 3 patch²].

    pixels: [B, 3, size, size]; chosen: int64 [B, n], patch numbers row by row.
    """
    grid = F.unfold(pixels.float(), patch, stride=patch).transpose(1, 2)
    values = grid.gather(1, chosen[..., None].expand(-1, -1, grid.shape[2]))
    return (values - values.mean(-1, keepdim=True)) / (values.var(-1, keepdim=True) + 1e-6).sqrt()


def presence_loss(
    q: Tensor,
    k: Tensor,
    mixed: Tensor,
    swapped: Tensor,
    token_ids: Tensor,
    words: Tensor,
    shifts: Sequence[int],
    rows: slice | None = None,
    add_up: Callable[[Tensor], Tensor] = _here,
) -> Tensor:
    """Teaches a cross-attention to look at the patches of images that show a word, and at [CLS] in images that do not (our choice).

    q, k:      [B, H, T, D] queries of the mixed texts' tokens and [B, H, 1+P, D] keys of the images, [CLS] first.
    mixed:     int64 [B, T], tokens of the mixed texts; swapped: bool [B, T], those that are from text n + shifts[0] (modulo B), not from text n.
    token_ids: int64 [B, T], padded: the images' own texts; words: bool [B, T], the real words of the mixed texts.
    shifts:    mixed text n is compared with image n, image n + shifts[0], and image n + shift for each further shift.
    rows:      of the B pairs those whose mixed texts are counted; q, mixed, swapped and words are of these alone.
    returns:   binary cross-entropy of "the attention lies on a patch", whose log-odds are logsumexp over patches minus the logit of [CLS]: true for
               the image of the text that a word is from, false for an image whose own text has no such token. Of the latter the image of the other
               text of the mixture counts as much as all further ones together. Where a share r of them lacks the token, the label of the word's own
               image is (1 + r) / 2, so that a word in no way tied to images has log-odds 0, however common it is; one that every text has cannot be
               told from such a word. Words that their own image does not show have that label like the others; the images of other products that
               do show them are what tells them apart.
    """
    scale, rows = q.shape[-1] ** -0.5, rows or slice(0, len(k))

    def log_odds(keys: Tensor) -> Tensor:
        logits = (q @ keys.transpose(-1, -2)).float() * scale
        return logits[..., 1:].logsumexp(-1) - logits[..., 0]

    def negative(shift: int) -> tuple[Tensor, Tensor, Tensor]:
        there = log_odds(roll_rows(k, shift, rows))
        return there, F.softplus(there).mean(1), not_in_text(mixed, roll_rows(token_ids, shift, rows)).float()

    own, own_false, own_lacks = negative(0)
    other, other_false, other_lacks = negative(shifts[0])
    home = torch.where(swapped[:, None], other, own)
    surprise = torch.where(swapped, own_false * own_lacks, other_false * other_lacks)
    lacks = torch.where(swapped, own_lacks, other_lacks)
    further = shifts[1:]
    for shift in further:
        _, false, lack = negative(shift)
        surprise = surprise + false * lack / len(further)
        lacks = lacks + lack / len(further)
    if further:
        surprise, lacks = surprise / 2, lacks / 2
    surprise = surprise + ((1 + lacks) * F.softplus(-home).mean(1) + (1 - lacks) * F.softplus(home).mean(1)) / 2
    return (surprise * words).sum() / add_up(((1 + lacks) * words).sum()).clamp(min=1)


def roll_rows(x: Tensor, shift: int, rows: slice) -> Tensor:
    """x.roll(-shift, 0)[rows] without the other rows; 0 <= shift."""
    begin, n = (rows.start + shift) % len(x), rows.stop - rows.start
    return x[begin : begin + n] if begin + n <= len(x) else torch.cat([x[begin:], x[: begin + n - len(x)]])


def not_in_text(token_ids: Tensor, other_ids: Tensor) -> Tensor:
    """bool [B, T]: which tokens the other text does not have. token_ids, other_ids: int64 [B, T], padded."""
    return (token_ids[:, :, None] != other_ids[:, None, :]).all(2)


def collage_loss(
    q: Tensor, k: Tensor, own: Tensor, words: Tensor, add_up: Callable[[Tensor], Tensor] = _here
) -> Tensor:
    """Teaches a cross-attention where in an image a word is, by images that are put together from those of two texts (our choice).

    q:       [M, H, T, D] queries of a mixture of the two texts; k: [M, H, P, D] keys of the patches of the collage.
    own:     bool [M, T, P], the patches that are from the image of the text that a word is from; words: bool [M, T], those that count.
    returns: binary cross-entropy of "of the attention on patches, the word's lies on its own image's".
    """
    logits = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    own = own[:, None]
    log_odds = logits.masked_fill(~own, -torch.inf).logsumexp(-1) - logits.masked_fill(own, -torch.inf).logsumexp(-1)
    return (F.softplus(-log_odds).mean(1) * words).sum() / add_up(words.sum()).clamp(min=1)
