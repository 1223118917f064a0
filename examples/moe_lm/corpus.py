"""The training text: the King James Bible, as Debian's package `bible-kjv` prints it, cut into chapters."""

from __future__ import annotations

import itertools
import subprocess
from dataclasses import dataclass
from pathlib import Path

WHOLE_BOOK = "gen1:1-rev22:21"
HELD_OUT_EVERY = 20  # chapters; 5 % of the text is never trained on


@dataclass(frozen=True)
class Corpus:
    """Chapters of plain English, one verse a line; `held_out` shares no chapter with `train`."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def read_corpus(path: Path | None = None) -> Corpus:
    """Read the text from `path`, or ask the `bible` command for it.

    Raises:
        FileNotFoundError: no `path` was given and the package is not installed (`apt-get install bible-kjv`).
    """
    verses = path.read_text(encoding="ascii") if path else _print_bible()
    chapters = split_chapters(verses)
    return Corpus(
        train=tuple(text for n, text in enumerate(chapters, 1) if n % HELD_OUT_EVERY),
        held_out=tuple(chapters[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]),
    )


def split_chapters(verses: str) -> list[str]:
    """Group lines such as `Ge1:1 In the beginning ...` by chapter and drop the references."""
    pairs = (line.split(" ", 1) for line in verses.splitlines())
    by_chapter = itertools.groupby(pairs, key=lambda pair: pair[0].split(":")[0])
    return ["".join(f"{text}\n" for _, text in group) for _, group in by_chapter]


def _print_bible() -> str:
    command = ["bible", "-f", WHOLE_BOOK]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True).stdout
