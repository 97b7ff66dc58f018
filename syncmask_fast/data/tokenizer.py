"""Tokenizers: load, train (WordPiece) and save."""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from syncmask_fast.data.strings import UniqueStrings
from syncmask_fast.utils.errors import UserError, one_line

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ROBERTA_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")

# train_wordpiece
ALWAYS = "abcdefghijklmnopqrstuvwxyz0123456789"  # an unseen word of these letters is never [UNK]
MAX_LETTERS = 1000
PREFIX = "##"  # of a token that continues a word
Pair = tuple[str, str]


class SpecialIds(NamedTuple):
    """The ids of the special tokens."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4000) -> Tokenizer:
    """Train a lower-casing WordPiece tokenizer like BERT's.

    returns: a tokenizer with [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4 that puts [CLS] and [SEP] around each text.
             It has at most `vocab_size` tokens, or as many as there are letters. The same texts give the same
             tokenizer in every process.
    source:  Devlin et al. 2018 (BERT); `train_wordpiece`.
    """
    tokenizer = _wordpiece_tokenizer(WordPiece(unk_token="[UNK]"), lower=True)
    words: Counter[str] = Counter()
    for text in texts.unique if isinstance(texts, UniqueStrings) else texts:
        normalized = tokenizer.normalizer.normalize_str(text)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized))
    tokens = [*SPECIAL_TOKENS, *train_wordpiece(words, vocab_size - len(SPECIAL_TOKENS))]
    tokenizer.model = WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return _with_cls_and_sep(tokenizer)


def load_tokenizer(name_or_folder: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder (tokenizer.json, or BERT's vocab.txt) or by its Hugging Face name.

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
                f"{folder} has neither tokenizer.json nor vocab.txt. Give a tokenizer's folder or Hugging Face name."
            )
        else:
            tokenizer = _hub_tokenizer(str(name_or_folder))
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare Exception for broken files
        raise UserError(f"The tokenizer in {folder} cannot be read ({one_line(error)}). Save it again.") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = special_ids(tokenizer)
    if tokenizer.encode("a").ids[:1] != [ids.cls]:
        tokenizer = _with_cls_and_sep(tokenizer)
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Return the ids of [PAD], [UNK], [CLS], [SEP], [MASK] (or RoBERTa's). errors: UserError if one is missing."""
    for names in (SPECIAL_TOKENS, _ROBERTA_TOKENS):
        ids = [tokenizer.token_to_id(name) for name in names]
        if None not in ids:
            return SpecialIds(*ids)
    missing = [name for name in SPECIAL_TOKENS if tokenizer.token_to_id(name) is None]
    raise UserError(f"The tokenizer has no {', '.join(missing)}. Use one like BERT's, such as bert-base-uncased.")


def save_tokenizer(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Write tokenizer.json, tokenizer_config.json and, for WordPiece, vocab.txt, for transformers' AutoTokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    description = json.loads(tokenizer.to_str())
    names = [tokenizer.id_to_token(i) for i in special_ids(tokenizer)]
    is_wordpiece = description["model"]["type"] == "WordPiece"
    config = {
        "tokenizer_class": "BertTokenizer" if is_wordpiece else "PreTrainedTokenizerFast",
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), names, strict=True)),
    }
    if is_wordpiece:
        config["do_lower_case"] = bool((description["normalizer"] or {}).get("lowercase", True))
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in vocabulary), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _with_cls_and_sep(tokenizer: Tokenizer) -> Tokenizer:
    """Add [CLS] ... [SEP] and the decoder."""
    ids = special_ids(tokenizer)
    cls, sep = tokenizer.id_to_token(ids.cls), tokenizer.id_to_token(ids.sep)
    tokenizer.post_processor = processors.BertProcessing((sep, ids.sep), (cls, ids.cls))
    if isinstance(tokenizer.model, WordPiece):
        tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _wordpiece_tokenizer(model: WordPiece, lower: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _bert_tokenizer(folder: Path) -> Tokenizer:
    config = folder / "tokenizer_config.json"
    lower = json.loads(config.read_text(encoding="utf-8")).get("do_lower_case", True) if config.is_file() else True
    tokenizer = _wordpiece_tokenizer(WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]"), lower)
    tokenizer.add_special_tokens([name for name in SPECIAL_TOKENS if tokenizer.token_to_id(name) is not None])
    return _with_cls_and_sep(tokenizer)


def _hub_tokenizer(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name).backend_tokenizer
    except Exception as error:  # offline, unknown, gated, slow only: transformers and the hub raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"Tokenizer {name} is neither a local folder nor available from Hugging Face ({reason}). "
            "Give a folder with tokenizer.json."
        ) from None


def train_wordpiece(words: Mapping[str, int], size: int, min_count: int = 2) -> list[str]:
    """Learn a WordPiece vocabulary: letters first, then merged tokens in the order of learning; "##" continues a word.

    words:     frequency of each word.
    size:      maximum number of tokens; all letters are returned even beyond it.
    min_count: less frequent pairs are not merged.
    source:    byte-pair merging, most frequent pair first (Sennrich et al. 2016, arXiv 1508.07909). Ties in
               alphabetical order are our choice.
    """
    # Hugging Face's WordPieceTrainer (tokenizers 0.23) breaks ties by the order of a hash map that is seeded by the
    # process, so two runs learn different vocabularies. Ranks and resumed runs need the same one.
    # 1. The letters, and each word as a list of tokens.
    letters = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    frequent = {letter for letter, _ in sorted(letters.items(), key=lambda item: (-item[1], item[0]))[:MAX_LETTERS]}
    usable = sorted((word, count) for word, count in words.items() if frequent.issuperset(word))
    split = [[word[0], *(PREFIX + letter for letter in word[1:])] for word, _ in usable]
    counts = [count for _, count in usable]
    alphabet = {token for word in split for token in word} | set(ALWAYS) | {PREFIX + letter for letter in ALWAYS}
    vocabulary = dict.fromkeys(sorted(alphabet))

    # 2. The frequency of each pair of neighbors, and the words that contain it.
    frequency: Counter[Pair] = Counter()
    words_of: defaultdict[Pair, set[int]] = defaultdict(set)
    for number, word in enumerate(split):
        for pair in zip(word, word[1:], strict=False):
            frequency[pair] += counts[number]
            words_of[pair].add(number)
    heap = [(-count, pair) for pair, count in frequency.items()]
    heapq.heapify(heap)

    # 3. Merge the most frequent pair, and update the pairs of the words that contain it.
    while heap and len(vocabulary) < size:
        count, pair = heapq.heappop(heap)
        if -count != frequency[pair]:  # an outdated entry; each change pushed a newer one
            continue
        if -count < min_count:
            break
        merged = pair[0] + pair[1].removeprefix(PREFIX)
        vocabulary[merged] = None
        touched: set[Pair] = set()
        for number in words_of.pop(pair):
            word = split[number]
            new = _merge(word, pair, merged)
            for old_pair in zip(word, word[1:], strict=False):
                frequency[old_pair] -= counts[number]
                touched.add(old_pair)
            for new_pair in zip(new, new[1:], strict=False):
                frequency[new_pair] += counts[number]
                words_of[new_pair].add(number)
                touched.add(new_pair)
            split[number] = new
        for changed in touched - {pair}:
            if frequency[changed] > 0:
                heapq.heappush(heap, (-frequency[changed], changed))
        del frequency[pair]
    return list(vocabulary)


def _merge(word: list[str], pair: Pair, merged: str) -> list[str]:
    new, at = [], 0
    while at < len(word):
        if (word[at], *word[at + 1 : at + 2]) == pair:
            new.append(merged)
            at += 2
        else:
            new.append(word[at])
            at += 1
    return new
