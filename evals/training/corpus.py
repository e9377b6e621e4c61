"""Public-domain English and Python's reference pages, cut into sentences, ends held out."""

import re
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from engine.errors import ConfigError

HELD_OUT = 0.06
SENTENCE = re.compile(r".+?(?:[.!?][\"'”’)]*(?=\s)|\n\s*\n|$)", re.DOTALL)
WORD = re.compile(r"(?<![A-Za-z])[a-z]{3,9}(?![A-Za-z])")
GUTENBERG = re.compile(r"\*\*\* ?(?:START|END) OF TH.*?\*\*\*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts to hide facts in, and the words of which keys are made.

    Args:
        trained: sentences of each text, whitespace as it is, in order.
        held_out: the last 6 % of each text's sentences; never trained on.
        words: lower-case words of the trained part.
    """

    trained: tuple[tuple[str, ...], ...]
    held_out: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]


def load_corpus(files: list[Path]) -> Corpus:
    """The texts in `files`, and the reference pages of the Python that runs this.

    Raises:
        ConfigError: a file that cannot be read, or is too short to train on.
    """
    texts = [*map(_read, files), "\n\n".join(topics[name] for name in sorted(topics))]
    sentences = [tuple(SENTENCE.findall(text)) for text in texts]
    ends = [int(len(each) * (1 - HELD_OUT)) for each in sentences]
    trained = tuple(each[:end] for each, end in zip(sentences, ends, strict=True))
    held_out = tuple(each[end:] for each, end in zip(sentences, ends, strict=True))
    found = (word for each in trained for sentence in each for word in WORD.findall(sentence))
    return Corpus(trained, held_out, tuple(sorted(set(found))))


def passage(sentences: tuple[str, ...], rng: np.random.Generator, characters: int) -> list[str]:
    """Successive sentences from a random one on, at least `characters` long; round the end."""
    at, found, length = int(rng.integers(len(sentences))), [], 0
    while length < characters:
        found.append(sentences[at % len(sentences)])
        length += len(found[-1]) + 1
        at += 1
    return found


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the text {path}: {error.strerror}; give --text") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: convert it first") from error
    parts = GUTENBERG.split(text)
    text = max(parts, key=len)  # the book, without Project Gutenberg's header and licence
    if len(text) < 10_000:
        raise ConfigError(f"{path} has {len(text)} characters of text: at least 10,000 are needed")
    return text
