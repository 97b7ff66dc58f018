"""The objectives against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from syncmask_fast.objective.losses import itc_loss, itm_loss, mim_loss, mlm_loss, normalized_patches
from syncmask_fast.objective.memory import Features, Queue
from syncmask_fast.objective.presence import MixedTexts, collage_loss, not_in_text, presence_loss

IDS = [4, 7, 4, 0, 7, 7, 2]  # several pairs of one product, product 0 among them
ALL = slice(0, len(IDS))
QUEUE_IDS = [7, -1, 9, 0, -1, 4, -1, 7]  # empty places in between


def unit(*shape: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def pair(feats: Tensor) -> tuple[Features, Features]:
    """Features of student and teacher from [4, B, E]."""
    return Features(feats[0], feats[1]), Features(feats[2], feats[3])


def plain_contrastive_loss(
    images: Tensor,
    texts: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    ids: list[int],
    queue: Queue,
    temperature: float,
    alpha: float,
) -> float:
    """The definition: one anchor and one candidate at a time, empty places never a candidate."""
    total = 0.0
    image_side = images, texts, teacher_images, teacher_texts, queue.texts
    text_side = texts, images, teacher_texts, teacher_images, queue.images
    for anchors, others, teacher_anchors, teacher_others, queued in (image_side, text_side):
        # The student's own candidates, and what the teacher sees in their place; in the queue they are the same.
        candidates = [(others[j], teacher_others[j], ids[j]) for j in range(len(ids))]
        candidates += [
            (queued[j], queued[j], int(queue.product_ids[j]))
            for j in range(len(queue.product_ids))
            if queue.product_ids[j] >= 0
        ]
        for i, own in enumerate(ids):
            logits = [float(anchors[i].double() @ c.double()) / temperature for c, _, _ in candidates]
            soft = [math.exp(float(teacher_anchors[i].double() @ c.double()) / temperature) for _, c, _ in candidates]
            log_sum = math.log(sum(math.exp(x) for x in logits))
            same = sum(product == own for _, _, product in candidates)
            for x, s, (_, _, product) in zip(logits, soft, candidates, strict=True):
                target = alpha * s / sum(soft) + (1 - alpha) * (product == own) / same
                total -= target * (x - log_sum) / len(ids)
    return total / 2


def some_queue(generator: torch.Generator) -> Queue:
    ids = torch.tensor(QUEUE_IDS)
    features = unit(2, len(QUEUE_IDS), 5, generator=generator) * (ids >= 0)[:, None]
    return Queue(features[0], features[1], ids)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("places", [0, len(QUEUE_IDS)])
def test_contrastive_loss_is_that_of_a_plain_loop(generator: torch.Generator, alpha: float, places: int):
    feats = unit(4, len(IDS), 5, generator=generator)
    queue = some_queue(generator) if places else Queue.empty(0, 5, torch.device("cpu"))
    queue = Queue(queue.images.double(), queue.texts.double(), queue.product_ids)
    total, count = itc_loss(*pair(feats), torch.tensor(IDS), queue, torch.tensor(0.07), alpha, ALL)
    assert count == len(IDS)
    assert total.item() / count == pytest.approx(plain_contrastive_loss(*feats, IDS, queue, 0.07, alpha), rel=1e-5)


def test_contrastive_loss_has_finite_gradients_with_an_empty_queue(generator: torch.Generator):
    feats = unit(4, len(IDS), 5, generator=generator).float()
    images, texts = feats[0].clone().requires_grad_(), feats[1].clone().requires_grad_()
    temperature = torch.tensor(0.001, requires_grad=True)  # the lowest there is
    queue = Queue.empty(6, 5, torch.device("cpu"))
    student, teacher = Features(images, texts), Features(feats[2], feats[3])
    itc_loss(student, teacher, torch.tensor(IDS), queue, temperature, 0.4, ALL).sum.backward()
    for x in (images, texts, temperature):
        assert x.grad.isfinite().all()
        assert x.grad.abs().sum() > 0


def test_teacher_takes_no_gradient(generator: torch.Generator):
    feats = unit(4, len(IDS), 5, generator=generator).requires_grad_()
    queue = Queue.empty(0, 5, torch.device("cpu"))
    itc_loss(*pair(feats), torch.tensor(IDS), queue, torch.tensor(0.07), 1.0, ALL).sum.backward()
    assert (feats.grad[:2].abs().sum((1, 2)) > 0).all()
    assert (feats.grad[2:] == 0).all()


@pytest.mark.parametrize(("places", "batch"), [(10, 4), (4, 4), (7, 3), (5, 8), (1, 3), (0, 3)])
def test_queue_keeps_the_last_pairs(generator: torch.Generator, places: int, batch: int):
    """After every push the queue holds just the newest `places` pairs, whatever wraps around."""
    queue = Queue.empty(places, 3, torch.device("cpu"))
    assert (queue.product_ids == -1).all()
    pushed: list[int] = []
    for step in range(6):
        ids = torch.arange(batch) + step * batch
        features = ids[:, None].float().expand(-1, 3)
        queue.enqueue(Features(features, features + 0.5), ids, step, batch)
        pushed += ids.tolist()
        held = [i for i in queue.product_ids.tolist() if i >= 0]
        assert sorted(held) == pushed[-places:] if places else not held
        for place, i in enumerate(queue.product_ids.tolist()):
            if i >= 0:
                assert (queue.images[place] == i).all()
                assert (queue.texts[place] == i + 0.5).all()


def test_short_batch_leaves_the_others_in_the_queue():
    queue = Queue.empty(8, 2, torch.device("cpu"))
    for step, n in enumerate((4, 3, 4)):
        ids = torch.arange(n) + 10 * step
        queue.enqueue(Features(torch.ones(n, 2), torch.ones(n, 2)), ids, step, 4)
    assert sorted(queue.product_ids.tolist()) == [-1, 10, 11, 12, 20, 21, 22, 23]


def test_matching_loss_counts_weighted_pairs_only(generator: torch.Generator):
    logits = torch.randn(6, 2, generator=generator)
    matched = torch.tensor([1, 1, 0, 0, 0, 0], dtype=torch.bool)
    weight = torch.tensor([1.0, 1, 1, 0, 1, 0])
    expected = [-logits[i].double().log_softmax(0)[int(matched[i])].item() for i in range(6) if weight[i]]
    total, count = itm_loss(logits, matched, weight)
    assert count == 4
    assert total.item() == pytest.approx(sum(expected), rel=1e-6)
    changed = logits.clone()
    changed[[3, 5]] = torch.tensor([50.0, -50.0])
    assert itm_loss(changed, matched, weight) == itm_loss(logits, matched, weight)
    assert itm_loss(logits, matched, torch.zeros(6)) == (0, 0)


def test_word_loss(generator: torch.Generator):
    logits = torch.randn(5, 11, generator=generator).requires_grad_()
    ids = torch.tensor([3, 0, 10, 3, 7])
    expected = -sum(logits[i].double().log_softmax(0)[ids[i]].item() for i in range(5))
    total, count = mlm_loss(logits, ids)
    assert count == 5
    assert total.item() == pytest.approx(expected, rel=1e-6)
    none = mlm_loss(logits[:0], ids[:0])
    assert none == (0, 0)
    none.sum.backward()  # a batch without masked words still goes through the backward pass
    assert (logits.grad == 0).all()


def test_patch_pixels_and_loss(generator: torch.Generator):
    patch, grid = 4, 3
    pixels = torch.randn(2, 3, 12, 12, generator=generator) * 3 + 1
    pixels[1, :, 4:8, 0:4] = 0.7  # a flat patch, number 3: no division by 0
    chosen = torch.tensor([[8, 0, 4, 1], [3, 5, 2, 7]])
    found = normalized_patches(pixels, patch, chosen)
    assert found.shape == (2, 4, 3 * patch**2)
    for b in range(2):
        for n, number in enumerate(chosen[b].tolist()):
            row, column = divmod(number, grid)
            values = (
                pixels[b, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].flatten().double()
            )
            expected = (values - values.mean()) / (values.var() + 1e-6).sqrt()
            assert torch.allclose(found[b, n].double(), expected, atol=1e-3 if number == 3 and b == 1 else 1e-5)
    normal = found[0]
    assert torch.allclose(normal.mean(-1), torch.zeros(4), atol=1e-5)
    assert torch.allclose(normal.var(-1), torch.ones(4), atol=1e-4)
    predicted = torch.randn(found.shape, generator=generator)
    total, count = mim_loss(predicted, found)
    assert count == 2
    assert total.item() / count == pytest.approx(((predicted - found).double() ** 2).mean().item(), rel=1e-5)


@pytest.mark.parametrize("shifts", [[1, 2], [3], [2, 1, 3]])
def test_presence_loss_is_that_of_a_plain_loop(shifts: list[int], generator: torch.Generator):
    b, h, t, p, d = 4, 2, 5, 3, 7
    q, k = torch.randn(b, h, t, d, generator=generator), torch.randn(b, h, 1 + p, d, generator=generator)
    token_ids = torch.tensor([[2, 7, 8, 3, 0], [2, 7, 9, 10, 3], [2, 11, 7, 3, 0], [2, 8, 8, 7, 3]])
    swapped = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)
    mixed = torch.where(swapped, token_ids.roll(-shifts[0], 0), token_ids)
    words = token_ids > 3

    def surprise(n: int, image: int, word: int, shows: bool) -> float:
        value = 0.0
        for head in range(h):
            weights = (q[n, head, word].double() @ k[image, head].double().T / d**0.5).softmax(0)
            value -= float(torch.log(weights[1:].sum() if shows else weights[0])) / h
        return value

    values, shares = [], []
    for n, word in words.nonzero().tolist():
        pair = [n, (n + shifts[0]) % b]
        home, against = reversed(pair) if swapped[n, word] else pair
        further = [(n + shift) % b for shift in shifts[1:]]
        compared = {against: 0.5 if further else 1.0} | {image: 0.5 / len(further) for image in further}
        not_in_text = {image: weight for image, weight in compared.items() if mixed[n, word] not in token_ids[image]}
        share = sum(not_in_text.values())
        label = (1 + share) / 2
        value = label * surprise(n, home, word, True) + (1 - label) * surprise(n, home, word, False)
        values.append(value + sum(weight * surprise(n, image, word, False) for image, weight in not_in_text.items()))
        shares.append(share)
    assert {0, 1} <= set(shares)
    total, count = presence_loss(q, k, MixedTexts(mixed, swapped, words), token_ids, shifts, slice(0, b))
    assert total.item() == pytest.approx(sum(values), rel=1e-5)
    assert count.item() == pytest.approx(sum(1 + share for share in shares), rel=1e-5)


def test_presence_loss_without_another_image(generator: torch.Generator):
    q, k = torch.randn(1, 1, 3, 4, generator=generator), torch.randn(1, 1, 3, 4, generator=generator)
    token_ids, words = torch.tensor([[2, 5, 3]]), torch.tensor([[False, True, False]])
    mixed = MixedTexts(token_ids, torch.zeros_like(words), words)
    assert presence_loss(q, k, mixed, token_ids, [0], slice(0, 1)).sum.isfinite()


def test_presence_loss_settles_at_even_odds_for_words_that_tell_nothing():
    """Images are all alike: neither a common word nor a rare one has a reason to look at a patch or at [CLS]."""
    token_ids = torch.tensor(
        [[2, 5, 6, 3], [2, 5, 7, 3], [2, 5, 7, 3], [2, 5, 8, 3]]
    )  # 5 is in every text, 7 in two, 6 and 8 in one
    log_odds = torch.zeros(9, requires_grad=True)
    with torch.no_grad():
        log_odds += torch.linspace(-3, 3, 9)
    q = torch.ones(4, 1, 4, 1)
    swapped = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    mixed = torch.where(swapped, token_ids.roll(-1, 0), token_ids)
    descent = torch.optim.SGD([log_odds], lr=4.0)
    for _ in range(200):
        k = torch.stack([torch.zeros(4, 1, 1), torch.ones(4, 1, 1)], 2)
        texts = MixedTexts(mixed, swapped, token_ids > 3)
        total, count = presence_loss(q * log_odds[mixed][:, None, :, None], k, texts, token_ids, [1, 2, 3], slice(0, 4))
        descent.zero_grad()
        (total / count).backward()
        descent.step()
    assert log_odds[5:9].abs().max() < 0.01


def test_collage_loss_is_that_of_a_plain_loop(generator: torch.Generator):
    m, h, t, p, d = 3, 2, 4, 6, 5
    q, k = torch.randn(m, h, t, d, generator=generator), torch.randn(m, h, p, d, generator=generator)
    own = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    own = torch.stack([own, ~own, own, ~own], 1)
    words = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    values = []
    for n, i in words.nonzero().tolist():
        weights = [(q[n, g, i].double() @ k[n, g].double().T / d**0.5).softmax(0) for g in range(h)]
        values.append(-sum(math.log(w[own[n, i]].sum()) for w in weights) / h)
    total, count = collage_loss(q, k, own, words)
    assert count == len(values)
    assert total.item() == pytest.approx(sum(values), rel=1e-5)


def test_lacking():
    token_ids = torch.tensor([[2, 7, 8, 3, 0], [2, 7, 9, 10, 3]])
    assert not_in_text(token_ids, token_ids.flip(0)).tolist() == [
        [False, False, True, False, True],
        [False, False, True, True, False],
    ]
    assert not not_in_text(token_ids, token_ids).any()
