"""MLM on the texts alone: what it changes, what it leaves, that it learns, and when a run does it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.model.layout import PackedLayout
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.losses import mlm_loss
from syncmask_fast.train import main
from syncmask_fast.training.text_pretraining import pretrain_text
from tests.helpers import FLAGS, SIX_STEPS, run_rows, small_config, small_model, small_tokenizer


def templates(count: int) -> list[str]:
    """Texts in which the word before the last tells the last one."""
    rng = np.random.default_rng(0)
    pairs = {"dress": "star", "coat": "moon", "skirt": "zip", "bag": "pocket"}
    return [
        f"{rng.choice(['red', 'navy', 'green'])} {rng.choice(['cotton', 'wool'])} {thing} with {pairs[thing]}"
        for thing in rng.choice(list(pairs), count)
    ]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    return TokenCache.open(tmp_path_factory.mktemp("texts"), small_tokenizer(), templates(60), 24)


@torch.no_grad()
def last_word_loss(model: SyncMaskModel, tokens: TokenCache) -> float:
    """Nats of the last words, which are masked."""
    ids, starts = tokens.pack(np.arange(len(tokens)))
    token_ids, layout = torch.from_numpy(ids), PackedLayout.of(np.diff(starts).tolist(), "cpu")
    at = layout.cu_seqlens[1:].long() - 2
    masked = token_ids.index_fill(0, at, model.mask_id)
    read = model.fusion.forward_text_only(model.text(masked, layout), layout)
    total, count = mlm_loss(model.mlm_head(read[at], model.text.word_embeddings.weight), token_ids[at])
    return float(total) / count


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns_what_the_other_words_tell(texts: TokenCache, precision: str, capsys: pytest.CaptureFixture[str]):
    config = small_config(batch_size=16, precision=precision)
    config = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, pretrain_steps=150),
        optim=dataclasses.replace(config.optim, muon_lr=0.01),
    )
    model = small_model(config)
    before, start = copy.deepcopy(model.state_dict()), last_word_loss(model, texts)
    pretrain_text(model, texts, np.arange(len(texts)), config)
    assert start > np.log(4)
    assert last_word_loss(model, texts) < 0.7  # one of four words by frequency alone: 1.39
    assert "150 steps" in capsys.readouterr().out
    kept = ("image.", "image_proj", "text_proj", "itm_head", "mim_head", "log_temperature")
    for name, value in model.state_dict().items():
        same = torch.equal(value, before[name])
        if name.startswith(kept) or ".cross." in name:
            assert same, name
        elif name.endswith("weight"):
            assert not same, name


def test_it_reads_each_text_of_the_given_samples_and_no_other(tmp_path: Path):
    tokens = TokenCache.open(
        tmp_path, small_tokenizer(), ["red bag", "navy coat", "red bag", "green skirt", "navy coat"], 24
    )
    assert sorted(tokens.unique(np.array([0, 1, 2, 4]))) == [0, 1]
    assert tokens.unique(np.array([4, 2])).tolist() in ([4, 2], [2, 4])
    model = small_model(small_config())
    green = small_tokenizer().token_to_id("green")
    config = dataclasses.replace(model.config, text=dataclasses.replace(model.config.text, pretrain_steps=1))
    pretrain_text(model, tokens, np.array([0, 1, 2]), config)
    red = small_tokenizer().token_to_id("red")
    assert model.mlm_head.bias[red] > model.mlm_head.bias[green] + 0.5  # its frequency among what was read


def test_a_run_reads_once_and_the_same_each_time(
    tmp_path: Path, lookbook: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    flags = ["tiny", *FLAGS, *SIX_STEPS, "--data", str(lookbook)]
    losses = []
    for out in (tmp_path / "a", tmp_path / "b"):
        main([*flags, "--out", str(out)])
        assert capsys.readouterr().out.count("MLM on ") == 1
        losses.append(run_rows(out)[0]["loss"])
    assert losses[0] == losses[1]
    main([*flags, "--out", str(tmp_path / "a")])
    main([*flags, "--out", str(tmp_path / "c"), "--weights", str(tmp_path / "a" / "model")])
    main([*flags, "--out", str(tmp_path / "d"), "--text.pretrain-steps", "0"])
    monkeypatch.setattr(
        "syncmask_fast.training.setup.load_initial_weights", lambda model: []
    )  # as if this file of ALBEF's had given them
    main([*flags, "--out", str(tmp_path / "e"), "--weights", "ALBEF.pth"])
    assert "MLM on " not in capsys.readouterr().out
