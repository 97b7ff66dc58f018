"""Tokenizers and the token cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from syncmask_fast.data import token_cache
from syncmask_fast.data.strings import StringArray, UniqueStrings
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.data.tokenizer import load_tokenizer, save_tokenizer, special_ids, train_tokenizer, train_wordpiece
from syncmask_fast.utils.errors import UserError

COLORS, GARMENTS = ("red", "navy", "olive", "Café-brown"), ("dress", "trousers", "cardigan", "jumpsuit")
TEXTS = [
    f"A {color} {garment}, no. {i}, with a patch pocket"
    for i, (color, garment) in enumerate((c, g) for c in COLORS for g in GARMENTS)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 200)


def test_trained_tokenizer(tokenizer):
    assert special_ids(tokenizer) == (0, 1, 2, 3, 4)
    assert tokenizer.get_vocab_size() <= 200
    tokens = tokenizer.encode("A RED dress").tokens
    assert tokens[0] == "[CLS]"
    assert tokens[-1] == "[SEP]"
    assert "red" in tokens
    assert "dress" in tokens
    unseen = tokenizer.encode("zebra xylophone 42")  # words of letters and digits are never unknown
    assert 1 not in unseen.ids
    assert tokenizer.decode(unseen.ids) == "zebra xylophone 42"
    assert tokenizer.encode("日").ids == [2, 1, 3]


def test_learn_pieces_by_hand():
    words = {"low": 5, "lower": 2, "new": 6, "newer": 3}
    pieces = [piece for piece in train_wordpiece(words, 1000) if len(piece.removeprefix("##")) > 1]
    # frequencies at first: (n, ##e) 9, (##e, ##w) 9, (l, ##o) 7, (##o, ##w) 7, (##e, ##r) 5, (##w, ##e) 5
    # (##e, ##w) comes first in alphabetical order ("#" before letters)
    assert pieces == ["##ew", "new", "##ow", "low", "##er", "newer", "lower"]
    assert train_wordpiece({}, 10)[:1] == ["##0"]


def test_training_is_the_same_in_every_process():
    code = (
        "from syncmask_fast.data.tokenizer import train_tokenizer\n"
        "import hashlib, random; random.seed(1)\n"
        "texts = [''.join(random.choices('abcde ', k=60)) for _ in range(200)]\n"
        "print(hashlib.sha256(train_tokenizer(texts, 300).to_str().encode()).hexdigest())"
    )
    root = Path(__file__).parents[1]
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    first, second = (run.communicate()[0] for run in runs)
    assert len(first) > 60
    assert first == second


def test_saved_folder_loads_everywhere(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        theirs.pad_token_id,
        theirs.unk_token_id,
        theirs.cls_token_id,
        theirs.sep_token_id,
        theirs.mask_token_id,
    ) == (0, 1, 2, 3, 4)
    assert len(theirs) == tokenizer.get_vocab_size()
    ours = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()  # vocab.txt is left
    from_vocabulary = load_tokenizer(str(tmp_path))
    for text in [*TEXTS, "Ünknown 日 WORDS", "a [MASK] dress"]:
        expected = tokenizer.encode(text).ids
        assert theirs(text)["input_ids"] == expected
        assert ours.encode(text).ids == expected
        assert from_vocabulary.encode(text).ids == expected


def test_cased_vocabulary_stays_cased(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nRed\nred\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert load_tokenizer(tmp_path).encode("Red red").ids == [2, 5, 6, 3]


def test_load_errors(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else the hub's client tries again and again
    with pytest.raises(UserError, match="has neither tokenizer.json nor vocab.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
    Tokenizer(WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no \[PAD\], \[CLS\], \[SEP\], \[MASK\]"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no-such/tokenizer-at-all"):
        load_tokenizer("no-such/tokenizer-at-all")


def test_cache_equals_tokenizer(tokenizer, tmp_path):
    texts = TEXTS + TEXTS[::-1]
    cache = TokenCache.open(tmp_path, tokenizer, texts, 64)
    assert len(cache) == len(texts)
    for i, text in enumerate(texts):
        encoding = tokenizer.encode(text)
        assert cache.ids(i).tolist() == encoding.ids
        assert cache.spans(i).tolist() == [list(span) for span in encoding.offsets]
        assert cache.lengths[i] == len(encoding.ids)
    assert cache.ids(0).dtype == cache.spans(0).dtype == cache.lengths.dtype == np.int32
    assert not cache.ids(0).flags.writeable
    words = {TEXTS[3][start:end].lower() for start, end in cache.spans(3)}
    assert {"", "a", ","} <= words
    assert tokenizer.truncation is None  # the caller's tokenizer is as it was


def test_gather(tokenizer, tmp_path):
    cache = TokenCache.open(tmp_path, tokenizer, TEXTS * 2, 64)
    picks = np.array([17, 3, 3, 0])
    ids, cu_seqlens = cache.pack(picks)
    assert ids.dtype == np.int64
    assert cu_seqlens.dtype == np.int32
    assert cu_seqlens.tolist() == [0, *np.cumsum(cache.lengths[picks])]
    assert ids.tolist() == np.concatenate([cache.ids(i) for i in picks]).tolist()
    assert cache.pack(np.array([], np.int64))[1].tolist() == [0]


def test_truncation_and_literal_special_tokens(tokenizer, tmp_path):
    cache = TokenCache.open(tmp_path, tokenizer, [TEXTS[0] * 5, "a [MASK] b"], 8)
    assert cache.lengths[0] == 8
    assert cache.ids(0)[0] == 2
    assert cache.ids(0)[-1] == 3
    assert 4 not in cache.ids(1)
    with pytest.raises(ValueError, match="max_length"):
        TokenCache.open(tmp_path, tokenizer, TEXTS, 2)
    with pytest.raises(ValueError, match="no texts"):
        TokenCache.open(tmp_path, tokenizer, [], 8)


def test_cache_is_kept_renewed_and_repaired(tokenizer, tmp_path, monkeypatch):
    built = []
    tokenize = token_cache._tokenize
    monkeypatch.setattr(token_cache, "_tokenize", lambda *args: built.append(1) or tokenize(*args))
    expected = TokenCache.open(tmp_path, tokenizer, TEXTS, 64).ids(5).tolist()
    assert TokenCache.open(tmp_path, tokenizer, TEXTS, 64).ids(5).tolist() == expected
    assert len(built) == 1
    TokenCache.open(tmp_path, tokenizer, TEXTS, 32)
    TokenCache.open(tmp_path, tokenizer, TEXTS[:-1], 64)
    TokenCache.open(tmp_path, train_tokenizer(TEXTS, 90), TEXTS, 64)
    assert len(built) == 4
    for ids in tmp_path.glob(".tokens-*/ids.npy"):
        ids.write_bytes(ids.read_bytes()[:-40])
    assert TokenCache.open(tmp_path, tokenizer, TEXTS, 64).ids(5).tolist() == expected
    assert len(built) == 5
    assert all(path.name.startswith(".tokens-") for path in tmp_path.iterdir())


def test_nowhere_to_write(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "atomic_folder", lambda places, write: None)
    assert TokenCache.open(tmp_path, tokenizer, TEXTS, 64).ids(0).tolist() == tokenizer.encode(TEXTS[0]).ids


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=12))
def test_tables_hold_any_text(texts):
    assert list(StringArray.of(texts)) == texts
    table = UniqueStrings.of(texts)
    assert list(table) == texts
    assert len(set(table.unique)) == len(table.unique) == len(set(texts))
    assert table[::-2] == texts[::-2]
