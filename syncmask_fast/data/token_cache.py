"""The token ids of a whole dataset, computed once and memory-mapped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from syncmask_fast.data.strings import UniqueStrings, check_offsets
from syncmask_fast.utils.files import atomic_folder, cache_candidates, sha256

FORMAT = 2
TEXTS_PER_CALL = 4096  # encoded in parallel by the tokenizers library
_FILES = ("ids.npy", "spans.npy", "offsets.npy")
_CHECKSUMS = "sha256.json"
Arrays = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # ids int32 [total], spans int32 [total, 2], offsets int64 [texts + 1]


class TokenCache:
    """The token ids of N texts, [CLS] and [SEP] included, and each token's position in its text.

    lengths: int32 [N], tokens of each text.

    Equal texts share one entry. Arrays are memory-mapped and read-only, so processes share them.
    """

    def __init__(self, index: np.ndarray, ids: np.ndarray, spans: np.ndarray, offsets: np.ndarray) -> None:
        self._index, self._ids, self._spans, self._offsets = index, ids, spans, offsets
        self.lengths = np.diff(offsets).astype(np.int32)[index]

    @classmethod
    def open(cls, folder: Path | str, tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> TokenCache:
        """Open the cache of these texts with this tokenizer and limit; build it if it is missing.

        folder:     holds `.tokens-HASH/`. If it is read-only, the user's cache folder does, or else memory.
        max_length: longer texts are truncated to this many tokens, [CLS] and [SEP] included.
        errors:     ValueError for no texts, or max_length below 3.
        Processes may open a cache at the same time.
        """
        if max_length < 3:
            raise ValueError(f"max_length must leave room for [CLS], a token and [SEP], not {max_length}")
        strings = texts if isinstance(texts, UniqueStrings) else UniqueStrings.of(texts)
        if len(strings) == 0:
            raise ValueError("there are no texts to tokenize")
        vocab_size = tokenizer.get_vocab_size()
        candidates = cache_candidates(Path(folder), f".tokens-{_fingerprint(tokenizer, strings, max_length)}")
        for candidate in candidates:
            if candidate.is_dir():
                arrays = _load_arrays(candidate, len(strings.unique), vocab_size)
                if arrays is not None:
                    return cls(strings.index, *arrays)
                shutil.rmtree(candidate, ignore_errors=True)  # damaged
        built = _tokenize(tokenizer, strings.unique, max_length)
        cache = atomic_folder(candidates, lambda partial: _save_arrays(partial, built))
        arrays = _load_arrays(cache, len(strings.unique), vocab_size) if cache is not None else None
        return cls(strings.index, *(arrays or built))

    def __len__(self) -> int:
        return len(self._index)

    def ids(self, i: int) -> np.ndarray:
        """Return the tokens of text i: int32 [L], read-only."""
        return self._ids[self._range(i)]

    def spans(self, i: int) -> np.ndarray:
        """Return start and end of each token in characters of text i: int32 [L, 2]; (0, 0) for [CLS], [SEP]."""
        return self._spans[self._range(i)]

    def pack(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated tokens of several texts: ids int64 [total] and cu_seqlens int32 [B + 1]."""
        lengths = self.lengths[sample_ids]
        cu_seqlens = np.zeros(len(sample_ids) + 1, np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        starts = self._offsets[self._index[sample_ids]]
        rows = np.repeat(starts - cu_seqlens[:-1], lengths) + np.arange(cu_seqlens[-1])
        return self._ids[rows].astype(np.int64), cu_seqlens

    def unique(self, sample_ids: np.ndarray) -> np.ndarray:
        """Return one of the samples for each different text among them: int64 [D]."""
        return sample_ids[np.unique(self._index[sample_ids], return_index=True)[1]]

    def _range(self, i: int) -> slice:
        text = self._index[i]
        return slice(int(self._offsets[text]), int(self._offsets[text + 1]))


def _tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> Arrays:
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy: the settings below must not reach the caller's
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    tokenizer.encode_special_tokens = True  # "[MASK]" written in a text is only characters
    ids, spans, lengths = [], [], []
    for start in range(0, len(texts), TEXTS_PER_CALL):
        for encoding in tokenizer.encode_batch(texts[start : start + TEXTS_PER_CALL]):
            span = np.array(encoding.offsets, np.int32).reshape(-1, 2)
            span[np.array(encoding.special_tokens_mask, bool)] = 0
            ids.append(np.array(encoding.ids, np.int32))
            spans.append(span)
            lengths.append(len(span))
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return np.concatenate(ids), np.concatenate(spans), offsets


def _fingerprint(tokenizer: Tokenizer, strings: UniqueStrings, max_length: int) -> str:
    digest = hashlib.sha256(f"{FORMAT} {max_length} {tokenizer.to_str()}".encode())
    digest.update(np.ascontiguousarray(strings.unique.offsets))
    digest.update(np.ascontiguousarray(strings.unique.data))
    return digest.hexdigest()[:24]


def _save_arrays(folder: Path, arrays: Arrays) -> None:
    for name, array in zip(_FILES, arrays, strict=True):
        np.save(folder / name, array, allow_pickle=False)
    (folder / _CHECKSUMS).write_text(json.dumps({name: sha256(folder / name) for name in _FILES}))


def _load_arrays(folder: Path, count: int, vocab_size: int) -> Arrays | None:
    """Return the memory-mapped arrays, or None if they are missing, damaged or not like those of `_tokenize`."""
    try:
        if json.loads((folder / _CHECKSUMS).read_text()) != {name: sha256(folder / name) for name in _FILES}:
            return None
        ids, spans, offsets = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in _FILES)
        # Checksums do not protect from a hostile writer: check types, shapes and ranges too.
        valid = ids.dtype == np.int32 and ids.ndim == 1 and len(offsets) == count + 1
        valid = valid and spans.dtype == np.int32 and spans.shape == (len(ids), 2)
        # Each text has at least [CLS] and [SEP].
        valid = valid and check_offsets(offsets, len(ids)).min() >= 2
        valid = valid and ids.min() >= 0 and ids.max() < vocab_size and spans.min() >= 0
    except (OSError, ValueError, TypeError, AttributeError, EOFError, MemoryError, RecursionError):
        return None
    return (ids, spans, offsets) if valid else None
