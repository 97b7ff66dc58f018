"""Tokenizers, and the token ids of a whole dataset, computed once and memory-mapped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from syncmask_fast.data.strings import UniqueStrings, check_offsets
from syncmask_fast.data.wordpiece import train_wordpiece
from syncmask_fast.utils.caches import atomic_folder, cache_candidates
from syncmask_fast.utils.errors import UserError
from syncmask_fast.utils.files import sha256

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ROBERTA_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
_CACHE_FORMAT = 2
_CHUNK = 4096  # texts encoded in one parallel call


class SpecialIds(NamedTuple):
    """Token ids that the trainer must know."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4000) -> Tokenizer:
    """Trains a lower-casing WordPiece tokenizer of BERT's kind on `texts`.

    returns: a tokenizer with [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, which puts [CLS] and [SEP] around
             each text. It has at most `vocab_size` tokens, or as many as the letters need. The same texts
             give the same tokenizer, in every process.
    source:  Devlin et al. 2018 (BERT); `train_wordpiece`.
    """
    tokenizer = _word_piece(WordPiece(unk_token="[UNK]"), lower=True)
    words: Counter[str] = Counter()
    for text in texts.unique if isinstance(texts, UniqueStrings) else texts:
        words.update(
            word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        )
    pieces = train_wordpiece(words, vocab_size - len(SPECIAL_TOKENS))
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL_TOKENS, *pieces])}
    tokenizer.model = WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return _finished(tokenizer)


def load_tokenizer(name_or_folder: str | Path) -> Tokenizer:
    """Loads a tokenizer from a folder (tokenizer.json, or BERT's vocab.txt) or by its Hugging Face name.

    returns: a tokenizer without padding or truncation that puts its [CLS] and [SEP] around each text.
    errors:  UserError if it cannot be found, or lacks one of BERT's special tokens (or RoBERTa's).
    """
    folder = Path(name_or_folder)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.txt").is_file():
            tokenizer = _bert_tokenizer(folder)
        elif folder.exists():
            raise UserError(
                f"{folder} holds neither tokenizer.json nor vocab.txt; give a tokenizer's folder or a Hugging Face name"
            )
        else:
            tokenizer = _hub_tokenizer(str(name_or_folder))
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare Exception for broken files
        raise UserError(f"the tokenizer in {folder} cannot be read ({error}); save it anew") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = special_ids(tokenizer)
    if tokenizer.encode("a").ids[:1] != [ids.cls]:
        tokenizer = _finished(tokenizer)
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The ids of [PAD], [UNK], [CLS], [SEP], [MASK] (or RoBERTa's names). UserError if one is missing."""
    for names in (SPECIAL_TOKENS, _ROBERTA_TOKENS):
        ids = [tokenizer.token_to_id(name) for name in names]
        if None not in ids:
            return SpecialIds(*ids)
    missing = [name for name in SPECIAL_TOKENS if tokenizer.token_to_id(name) is None]
    raise UserError(f"the tokenizer has no {', '.join(missing)}; use one of BERT's kind, such as bert-base-uncased")


def save_tokenizer(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, for WordPiece, vocab.txt, as transformers'
    AutoTokenizer loads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    description = json.loads(tokenizer.to_str())
    names = [tokenizer.id_to_token(i) for i in special_ids(tokenizer)]
    word_piece = description["model"]["type"] == "WordPiece"
    config = {
        "tokenizer_class": "BertTokenizer" if word_piece else "PreTrainedTokenizerFast",
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), names, strict=True)),
    }
    if word_piece:
        config["do_lower_case"] = bool((description["normalizer"] or {}).get("lowercase", True))
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in vocabulary), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _finished(tokenizer: Tokenizer) -> Tokenizer:
    """Adds [CLS] ... [SEP] and the decoder."""
    ids = special_ids(tokenizer)
    cls, sep = tokenizer.id_to_token(ids.cls), tokenizer.id_to_token(ids.sep)
    tokenizer.post_processor = processors.BertProcessing((sep, ids.sep), (cls, ids.cls))
    if isinstance(tokenizer.model, WordPiece):
        tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _word_piece(model: WordPiece, lower: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _bert_tokenizer(folder: Path) -> Tokenizer:
    config = folder / "tokenizer_config.json"
    lower = json.loads(config.read_text(encoding="utf-8")).get("do_lower_case", True) if config.is_file() else True
    tokenizer = _word_piece(WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]"), lower)
    tokenizer.add_special_tokens([name for name in SPECIAL_TOKENS if tokenizer.token_to_id(name) is not None])
    return _finished(tokenizer)


def _hub_tokenizer(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name).backend_tokenizer
    except Exception as error:  # offline, unknown, gated, slow only: transformers and the hub raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"tokenizer {name} is neither a local folder nor to be had from Hugging Face ({reason}); "
            "give a folder with tokenizer.json"
        ) from None


class TokenCache:
    """The token ids of N texts, [CLS] and [SEP] included, and where each token stands in its text.

    lengths: int32 [N], tokens of each text.
    Equal texts share one entry. Arrays are memory-mapped and read-only, so that processes share them and
    opening costs nothing.
    """

    def __init__(self, index: np.ndarray, ids: np.ndarray, spans: np.ndarray, offsets: np.ndarray) -> None:
        self._index, self._ids, self._spans, self._offsets = index, ids, spans, offsets
        self.lengths = np.diff(offsets).astype(np.int32)[index]

    @classmethod
    def open(
        cls, folder_for_cache: Path | str, tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int
    ) -> TokenCache:
        """Opens the cache for this tokenizer, these texts and this limit, after building it where it is
        missing.

        folder_for_cache: gets `.tokens-HASH/`; the user's cache folder is used where it cannot be written,
                          memory where none can.
        max_tokens:       longer texts are cut to this many tokens, [CLS] and [SEP] included.
        errors:           ValueError for no texts or max_tokens below 3.
        Several processes may open the same cache at once.
        """
        if max_tokens < 3:
            raise ValueError(f"max_tokens must leave room for [CLS], a word and [SEP], not {max_tokens}")
        table = texts if isinstance(texts, UniqueStrings) else UniqueStrings.of(texts)
        if len(table) == 0:
            raise ValueError("there are no texts to tokenise")
        places = cache_candidates(Path(folder_for_cache), f".tokens-{_fingerprint(tokenizer, table, max_tokens)}")
        for place in places:
            if place.is_dir():
                arrays = _load_arrays(place, len(table.unique), tokenizer.get_vocab_size())
                if arrays is not None:
                    return cls(table.index, *arrays)
                shutil.rmtree(place, ignore_errors=True)
        built = _tokenise(tokenizer, table.unique, max_tokens)
        place = atomic_folder(places, lambda aside: _save_arrays(aside, built))
        arrays = _load_arrays(place, len(table.unique), tokenizer.get_vocab_size()) if place is not None else None
        return cls(table.index, *(arrays or built))

    def __len__(self) -> int:
        return len(self._index)

    def ids(self, i: int) -> np.ndarray:
        """int32 [L]: the tokens of text i. Read-only."""
        return self._ids[self._range(i)]

    def spans(self, i: int) -> np.ndarray:
        """int32 [L, 2]: start and end of each token in characters of text i; (0, 0) for [CLS] and [SEP].
        Read-only."""
        return self._spans[self._range(i)]

    def pack(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of several texts, one after the other: ids int64 [total] and cu_seqlens int32 [B +
        1]."""
        cu_seqlens = np.zeros(len(samples) + 1, np.int32)
        np.cumsum(self.lengths[samples], out=cu_seqlens[1:])
        starts = self._offsets[self._index[samples]]
        places = np.repeat(starts - cu_seqlens[:-1], self.lengths[samples]) + np.arange(cu_seqlens[-1])
        return self._ids[places].astype(np.int64), cu_seqlens

    def unique(self, samples: np.ndarray) -> np.ndarray:
        """int64 [D]: one of the samples for each different text among them."""
        return samples[np.unique(self._index[samples], return_index=True)[1]]

    def _range(self, i: int) -> slice:
        text = self._index[i]
        return slice(int(self._offsets[text]), int(self._offsets[text + 1]))


Arrays = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # ids int32 [total], spans int32 [total, 2], offsets int64 [texts + 1]
_FILES = ("ids.npy", "spans.npy", "offsets.npy")
_SUMS = "sha256.json"


def _tokenise(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> Arrays:
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # settings below stay out of the caller's
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    tokenizer.encode_special_tokens = True  # "[MASK]" written in a text is just characters
    ids, spans, lengths = [], [], []
    for start in range(0, len(texts), _CHUNK):
        for encoding in tokenizer.encode_batch(texts[start : start + _CHUNK]):
            span = np.array(encoding.offsets, np.int32).reshape(-1, 2)
            span[np.array(encoding.special_tokens_mask, bool)] = 0
            ids.append(np.array(encoding.ids, np.int32))
            spans.append(span)
            lengths.append(len(span))
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return np.concatenate(ids), np.concatenate(spans), offsets


def _fingerprint(tokenizer: Tokenizer, table: UniqueStrings, max_tokens: int) -> str:
    digest = hashlib.sha256(f"{_CACHE_FORMAT} {max_tokens} {tokenizer.to_str()}".encode())
    digest.update(np.ascontiguousarray(table.unique.offsets))
    digest.update(np.ascontiguousarray(table.unique.data))
    return digest.hexdigest()[:24]


def _save_arrays(folder: Path, arrays: Arrays) -> None:
    for name, array in zip(_FILES, arrays, strict=True):
        np.save(folder / name, array, allow_pickle=False)
    (folder / _SUMS).write_text(json.dumps({name: sha256(folder / name) for name in _FILES}))


def _load_arrays(folder: Path, count: int, vocabulary: int) -> Arrays | None:
    """The memory-mapped arrays, or None where they are missing or are not what `_tokenise` gives, whoever wrote them."""
    try:
        if json.loads((folder / _SUMS).read_text()) != {name: sha256(folder / name) for name in _FILES}:
            return None
        ids, spans, offsets = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in _FILES)
        if (
            ids.dtype != np.int32
            or ids.ndim != 1
            or spans.dtype != np.int32
            or spans.shape != (len(ids), 2)
            or len(offsets) != count + 1
        ):
            return None
        # A text has [CLS] and [SEP] at least.
        if check_offsets(offsets, len(ids)).min() < 2 or ids.min() < 0 or ids.max() >= vocabulary or spans.min() < 0:
            return None
    except (OSError, ValueError, TypeError, AttributeError, EOFError, MemoryError, RecursionError):
        return None
    return ids, spans, offsets
