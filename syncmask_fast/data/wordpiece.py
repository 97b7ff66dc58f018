"""Learns the pieces of a WordPiece vocabulary, the same from the same texts in every process.

Hugging Face's WordPieceTrainer gives the continuing letters their numbers in the order of a hash map that is
seeded anew in each process, and numbers decide between pairs of equal frequency: two runs end with different
vocabularies (seen with tokenizers 0.23). Ranks and resumed runs
need one, so the same algorithm is here: byte-pair merging (Sennrich et al. 2016, arXiv 1508.07909) over
                                         words, the commonest pair first,
ties in alphabetical order.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping

ALWAYS = "abcdefghijklmnopqrstuvwxyz0123456789"  # so that an unseen word of these is never [UNK]
MAX_LETTERS = 1000
PREFIX = "##"
Pair = tuple[str, str]


def train_wordpiece(words: Mapping[str, int], size: int, min_count: int = 2) -> list[str]:
    """The pieces of a vocabulary: letters first, then merged pieces in the order of learning; "##" marks
    those that continue a word.

    words:     how often each word occurs.
    size:      the most pieces to return; the letters are kept even beyond it.
    min_count: pairs that occur less often are not merged.
    """
    letters = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    kept = {letter for letter, _ in sorted(letters.items(), key=lambda item: (-item[1], item[0]))[:MAX_LETTERS]}
    spelt = sorted((word, count) for word, count in words.items() if kept.issuperset(word))
    pieces = [[word[0], *(PREFIX + letter for letter in word[1:])] for word, _ in spelt]
    counts = [count for _, count in spelt]
    alphabet = {piece for word in pieces for piece in word} | set(ALWAYS) | {PREFIX + letter for letter in ALWAYS}
    vocabulary = dict.fromkeys(sorted(alphabet))

    frequency: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for number, word in enumerate(pieces):
        for pair in zip(word, word[1:], strict=False):
            frequency[pair] += counts[number]
            where[pair].add(number)
    heap = [(-count, pair) for pair, count in frequency.items()]
    heapq.heapify(heap)
    while heap and len(vocabulary) < size:
        count, pair = heapq.heappop(heap)
        if -count != frequency[pair]:  # an older entry; each change pushed a newer one
            continue
        if -count < min_count:
            break
        merged = pair[0] + pair[1].removeprefix(PREFIX)
        vocabulary[merged] = None
        touched: set[Pair] = set()
        for number in where.pop(pair):
            word = pieces[number]
            new = _merge(word, pair, merged)
            for old_pair in zip(word, word[1:], strict=False):
                frequency[old_pair] -= counts[number]
                touched.add(old_pair)
            for new_pair in zip(new, new[1:], strict=False):
                frequency[new_pair] += counts[number]
                where[new_pair].add(number)
                touched.add(new_pair)
            pieces[number] = new
        for changed in touched - {pair}:
            if frequency[changed] > 0:
                heapq.heappush(heap, (-frequency[changed], changed))
        del frequency[pair]
    return list(vocabulary)


def _merge(word: list[str], pair: Pair, merged: str) -> list[str]:
    new, at = [], 0
    while at < len(word):
        if at + 1 < len(word) and (word[at], word[at + 1]) == pair:
            new.append(merged)
            at += 2
        else:
            new.append(word[at])
            at += 1
    return new
