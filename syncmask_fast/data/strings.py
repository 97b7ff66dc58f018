"""Read-only sequences of strings in arrays: a million texts are two arrays, not a million objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def check_offsets(offsets: np.ndarray, end: int) -> np.ndarray:
    """Return lengths int64 [N] from offsets int64 [N + 1]. errors: ValueError if they do not rise from 0 to `end`."""
    if offsets.ndim != 1 or offsets.dtype != np.int64 or not len(offsets) or offsets[0] != 0 or offsets[-1] != end:
        raise ValueError(f"offsets are {offsets.dtype} {offsets.shape}, or not from 0 to {end}")
    lengths = np.diff(offsets)
    if len(lengths) and (offsets.min() < 0 or offsets.max() > end or lengths.min() < 0):
        raise ValueError("offsets do not rise")
    return lengths


class StringArray(Sequence[str]):
    """Strings as one UTF-8 array uint8 [bytes] and offsets int64 [N + 1]; items are decoded on access."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray) -> None:
        self.data = data
        self.offsets = offsets

    @classmethod
    def of(cls, strings: Iterable[str]) -> StringArray:
        encoded = [string.encode() for string in strings]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(item) for item in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def check(self) -> None:
        """Check arrays that were read from a file. errors: ValueError."""
        lengths = check_offsets(self.offsets, len(self.data))
        if self.data.dtype != np.uint8 or self.data.ndim != 1:
            raise ValueError(f"strings are {self.data.dtype} {self.data.shape}")
        self.data.tobytes().decode()  # UnicodeDecodeError is a ValueError
        starts = self.offsets[:-1][lengths > 0]
        if (self.data[starts] & 0xC0 == 0x80).any():
            raise ValueError("a string begins within a letter")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"{i} of {len(self)} strings")
        i %= len(self)
        return self.data[self.offsets[i] : self.offsets[i + 1]].tobytes().decode()


class UniqueStrings(Sequence[str]):
    """N texts of which many are equal (all views of a product share one).

    unique: the different texts, in order of first appearance.
    index:  int32 [N], the number of each text in `unique`.
    """

    def __init__(self, unique: Sequence[str], index: np.ndarray) -> None:
        self.unique = unique
        self.index = index

    @classmethod
    def of(cls, texts: Iterable[str]) -> UniqueStrings:
        numbers: dict[str, int] = {}
        index = np.fromiter((numbers.setdefault(text, len(numbers)) for text in texts), np.int32)
        return cls(StringArray.of(numbers), index)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self.unique[int(j)] for j in self.index[i]]
        return self.unique[int(self.index[i])]
