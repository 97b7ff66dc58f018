"""Evaluation from the command line, on a drawn dataset and an untrained model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from syncmask_fast.data.images import decode_image
from syncmask_fast.data.shard_writer import ShardSetWriter
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.data.splits import open_evaluation
from syncmask_fast.data.tokenizer import train_tokenizer
from syncmask_fast.evaluate import main
from syncmask_fast.model.layout import PackedLayout, one_to_one
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.ops import PATCH_SCORES, TOKEN_SCORES
from syncmask_fast.tasks import retrieval
from syncmask_fast.tasks.base import open_tokens
from syncmask_fast.tasks.mask_quality import MaskEvalSet, evaluate_mlm_grounding, evaluate_sync, teacher_masks
from syncmask_fast.utils.errors import UserError
from tests.helpers import small_config


@pytest.fixture(scope="module")
def folder(lookbook: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, saved."""
    base = small_config()
    tokenizer = train_tokenizer(ShardIndex.open(lookbook / "train").texts, base.text.vocab_size)
    text = type(base.text)(**{**vars(base.text), "vocab_size": tokenizer.get_vocab_size(), "max_length": 64})
    torch.manual_seed(0)
    SyncMaskModel(small_config(text=text, decode_threads=1), tokenizer).save_pretrained(
        tmp_path_factory.mktemp("model") / "model"
    )
    return next(tmp_path_factory.getbasetemp().glob("model*/model"))


@pytest.fixture(scope="module")
def opened(lookbook: Path, folder: Path):
    model = SyncMaskModel.from_pretrained(folder)
    split = open_evaluation(lookbook)
    return model, split, open_tokens(model, split)


def run(kind: str, folder: Path, lookbook: Path, out: Path, *more: str):
    main([kind, "--model", str(folder), "--data", str(lookbook), "--out", str(out), "--device", "cpu", *more])
    return json.loads(out.read_text())


def test_encode_split(opened):
    """Features equal those of the model's public calls, one by one."""
    model, split, tokens = opened
    gallery, _ = retrieval.encode_split(model, split, tokens)
    index = split.index
    assert len(gallery.images) == len(index)
    assert len(gallery.texts) == len(np.unique(index.product_ids)) == 105
    numbers = np.unique(index.product_ids, return_inverse=True)[1]
    assert gallery.product_index.tolist() == numbers.tolist()
    for i in (0, 77, len(index) - 1):
        assert torch.allclose(gallery.texts[numbers[i]], model.encode_text([index.texts[i]])[0], atol=1e-5)
        assert index.subcategory.names[int(gallery.subcategory[numbers[i]])] == index.record(i)["subcategory"]
        size = model.config.image.size
        pixels = (
            torch.from_numpy(decode_image(index.image_bytes(i), size).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        )
        assert (gallery.images[i] @ model.encode_image(pixels)[0]).item() > 0.999


def test_itm_scores(opened, monkeypatch: pytest.MonkeyPatch):
    """Scores equal those of `model.match`, pair by pair. Small passes split an image's pairs."""
    model, split, tokens = opened
    monkeypatch.setattr(retrieval, "PAIRS", 50)
    gallery, at = retrieval.encode_split(model, split, tokens)
    lists = retrieval.shortlists(gallery, 3)[:2]
    first = np.unique(gallery.product_index.numpy(), return_index=True)[1]
    size = model.config.image.size
    for entry, score in zip(lists, retrieval.itm_scores(model, split, tokens, gallery, at, lists), strict=True):
        assert score.shape == entry.images.shape
        for row in (0, len(score) // 2, len(score) - 1):
            pixels = [
                torch.from_numpy(decode_image(split.index.image_bytes(at[i]), size).copy()).permute(2, 0, 1) / 127.5 - 1
                for i in entry.images[row]
            ]
            chance = model.match(torch.stack(pixels), [split.index.texts[at[first[j]]] for j in entry.texts[row]])
            assert torch.allclose(score[row].sigmoid(), chance, atol=0.02)  # pixels are rounded


def test_retrieval(folder: Path, lookbook: Path, tmp_path: Path, opened, capsys: pytest.CaptureFixture[str]):
    results = run("retrieval", folder, lookbook, tmp_path / "new" / "results.json")
    assert "retrieval/i2t/101-candidate/R@1" in capsys.readouterr().out
    gallery, _ = retrieval.encode_split(*opened)
    for name, value in (retrieval.recall_full(gallery) | retrieval.recall_101(gallery)).items():
        assert results[f"retrieval/{name}"] == pytest.approx(value)
    assert results["retrieval/products"] == 105
    assert results["retrieval/images"] == len(gallery.images)
    # An untrained model is near chance, which is one in 101.
    assert results["retrieval/mean/101-candidate/R@1"] < 5


def test_sync(folder: Path, lookbook: Path, tmp_path: Path, opened):
    results = run("sync", folder, lookbook, tmp_path / "results.json")
    for name in (
        "words/precision",
        "words/random",
        "words/auc",
        "patches/precision",
        "patches/random",
        "patches-any-attribute/precision",
    ):
        assert 0 < results[f"sync/{name}"] < 100
    assert 35 < results["sync/words/auc"] < 65  # of an untrained model
    model, split, tokens = opened
    truth = MaskEvalSet.of(split, tokens, 4)
    assert evaluate_sync(model, truth) | evaluate_mlm_grounding(model, truth) == pytest.approx(results)


def test_mlm_grounding(opened):
    """The loss at visible tokens with either image, sample by sample."""
    model, split, tokens = opened
    data, rng, nats = MaskEvalSet.of(split, tokens, 4, 40), np.random.default_rng(0), []
    size, ratio = model.config.image.size, model.config.mask.token_ratio
    for n, i in enumerate(data.samples):
        visible = data.truths[n].visible
        at = 1 + rng.permutation(np.flatnonzero(visible))[: max(1, int(ratio * len(visible) + 0.5))]
        token_ids = torch.from_numpy(tokens.ids(i).astype(np.int64))
        layout = PackedLayout.of([len(token_ids)], "cpu")
        text = model.text(token_ids.index_fill(0, torch.from_numpy(at), model.mask_id), layout)
        for shown in (i, data.samples[data.partner[n]]):
            pixels = (
                torch.from_numpy(decode_image(split.index.image_bytes(shown), size).copy())
                .permute(2, 0, 1)[None]
                .float()
                / 127.5
                - 1
            )
            fused = model.fusion(text, one_to_one(layout), model.image(pixels))
            chances = model.mlm_head(fused, model.text.word_embeddings.weight).double().log_softmax(-1)
            nats += [(n, shown == i, -chances[at[j], token_ids[at[j]]].item()) for j in range(len(at))]
    found = evaluate_mlm_grounding(model, data)
    for name, right in (("nll", True), ("nll-mismatched-image", False)):
        assert found[f"mlm/visible-tokens/{name}"] == pytest.approx(
            np.mean([value for _, which, value in nats if which == right]), rel=1e-3
        )
    assert len({round(value, 6) for value in found.values()}) == 2
    assert not np.array_equal(data.samples, data.samples[data.partner])


def test_every_rule(folder: Path, lookbook: Path, tmp_path: Path, opened, capsys: pytest.CaptureFixture[str]):
    rows = run("sync", folder, lookbook, tmp_path / "rows.json", "--every-rule")
    model = opened[0]
    layers = model.config.text.fusion_layers
    assert len(rows) == layers * 4
    assert {(row["layer"], row["token_score"]) for row in rows} == {
        (n, rule) for n in range(1, layers + 1) for rule in TOKEN_SCORES
    }
    assert {(row["layer"], row["patch_score"]) for row in rows} == {
        (n, rule) for n in range(1, layers + 1) for rule in PATCH_SCORES
    }
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)
    plain = run("sync", folder, lookbook, tmp_path / "plain.json")
    mask = model.config.mask
    [row] = [row for row in rows if row["layer"] == mask.layer and row["token_score"] == mask.token_score]
    assert row["words/precision"] == pytest.approx(plain["sync/words/precision"])


def test_masks_do_not_depend_on_the_batch(opened):
    """Nine samples get the masks that they get among all."""
    model, split, tokens = opened
    whole, part = (MaskEvalSet.of(split, tokens, 4, limit) for limit in (None, 9))
    assert len(part.samples) == 9
    [all_masks], [some] = (
        teacher_masks(model, split, tokens, data.samples, [model.config.mask]) for data in (whole, part)
    )
    for i, mask in zip(part.samples, some, strict=True):
        assert len(mask.token_mask) == tokens.lengths[i] - 2
        assert np.allclose(mask.token_score, all_masks[int(i)].token_score, atol=1e-5)
        assert mask.token_mask.sum() == all_masks[int(i)].token_mask.sum()


@pytest.fixture
def plain(tmp_path: Path, lookbook: Path) -> Path:
    """A dataset of images and texts only."""
    index = ShardIndex.open(lookbook / "eval")
    with ShardSetWriter(tmp_path / "plain") as writer:
        for i in range(30):
            writer.write(f"{i:04d}", index.image_bytes(i), {"text": index.texts[i]})
    return tmp_path / "plain"


def test_no_attributes(folder: Path, plain: Path, tmp_path: Path):
    with pytest.raises(UserError, match="attributes"):
        run("sync", folder, plain, tmp_path / "results.json")
    assert not (tmp_path / "results.json").exists()
    results = run("retrieval", folder, plain, tmp_path / "results.json")
    assert results["retrieval/products"] == 2  # 5 % of 30
    assert "retrieval/i2t/full/R@1" in results
    assert "retrieval/i2t/101-candidate/R@1" not in results


@pytest.mark.parametrize("kind", ["retrieval", "sync"])
def test_missing_model_or_data(kind: str, folder: Path, lookbook: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no-model"):
        run(kind, tmp_path / "no-model", lookbook, tmp_path / "results.json")
    with pytest.raises(UserError, match="no-data"):
        run(kind, folder, tmp_path / "no-data", tmp_path / "results.json")
    (tmp_path / "broken").mkdir()
    for file in folder.iterdir():
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="broken"):
        run(kind, tmp_path / "broken", lookbook, tmp_path / "results.json")
