"""A byte-pair vocabulary: 256 bytes, the merges learned from the training text, and one end mark."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from .config import VOCABULARY

Pair = tuple[int, int]
_WORD = re.compile(r" ?[A-Za-z]+(?:'[a-z]+)?| ?[^\sA-Za-z]+|\s")
_NUM_BYTES = 256


class Tokenizer:
    """Text to token ids and back. Any text can be encoded: what no merge covers falls back to its bytes."""

    def __init__(self, merges: Sequence[Pair]) -> None:
        self.merges = tuple(merges)
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._bytes = [bytes([value]) for value in range(_NUM_BYTES)]
        for left, right in self.merges:
            self._bytes.append(self._bytes[left] + self._bytes[right])
        self._encode_word = functools.lru_cache(maxsize=65536)(self._merge_word)

    @property
    def end(self) -> int:
        """The mark that stands before the first and after the last token of every text."""
        return len(self._bytes)

    @property
    def vocab_size(self) -> int:
        return len(self._bytes) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without end marks."""
        return [token for word in _WORD.findall(text) for token in self._encode_word(word)]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens`; end marks and negative ids (no token) are left out."""
        data = b"".join(self._bytes[token] for token in tokens if 0 <= token < self.end)
        return data.decode("utf-8", errors="replace")

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"merges": self.merges}, separators=(",", ":")) + "\n", encoding="ascii")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        return cls([(left, right) for left, right in json.loads(path.read_text(encoding="ascii"))["merges"]])

    def _merge_word(self, word: str) -> tuple[int, ...]:
        tokens = tuple(word.encode())
        while known := [pair for pair in itertools.pairwise(tokens) if pair in self._ranks]:
            rank = min(self._ranks[pair] for pair in known)
            tokens = _merge(tokens, self.merges[rank], _NUM_BYTES + rank)
        return tokens


def load_tokenizer(path: Path = VOCABULARY) -> Tokenizer:
    """Read the vocabulary that belongs to the committed weights."""
    return Tokenizer.load(path)


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, the end mark first: that is how every text began in training."""
    return [[tokenizer.end, *tokenizer.encode(text)] for text in texts]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Merge the most frequent pair (ties: the smallest) until the vocabulary, end mark included, is full."""
    words = Counter(word for text in texts for word in _WORD.findall(text))
    table = _PairTable([tuple(word.encode()) for word in words], list(words.values()))
    return Tokenizer([table.merge_most_frequent(token) for token in range(_NUM_BYTES, vocab_size - 1)])


class _PairTable:
    """Counts of adjacent pairs over distinct words, kept up to date as pairs are merged."""

    def __init__(self, words: list[tuple[int, ...]], counts: list[int]) -> None:
        self._words, self._counts = words, counts
        self._pairs: Counter[Pair] = Counter()
        self._where: defaultdict[Pair, set[int]] = defaultdict(set)
        for index in range(len(words)):
            self._add(index, +1)

    def merge_most_frequent(self, token: int) -> Pair:
        best = min(self._pairs, key=lambda pair: (-self._pairs[pair], pair))
        for index in sorted(self._where.pop(best)):
            self._add(index, -1)
            self._words[index] = _merge(self._words[index], best, token)
            self._add(index, +1)
        del self._pairs[best]
        return best

    def _add(self, index: int, sign: int) -> None:
        for pair in itertools.pairwise(self._words[index]):
            self._pairs[pair] += sign * self._counts[index]
            self._where[pair].add(index)


def _merge(tokens: tuple[int, ...], pair: Pair, token: int) -> tuple[int, ...]:
    merged: list[int] = []
    for item in tokens:
        # A merged item is above every id that `pair` can name, so it is never merged twice here.
        if merged and (merged[-1], item) == pair:
            merged[-1] = token
        else:
            merged.append(item)
    return tuple(merged)
