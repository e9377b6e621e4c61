"""Texts: what is held out is not trained on, and a bad file is named."""

import re

import numpy as np
import pytest

from engine.errors import ConfigError
from evals.training.corpus import load_corpus, passage


def test_trained_and_held_out_sentences_are_the_whole_text_in_order(tmp_path):
    text = "".join(f"Sentence {number} of the book, and of no other. " for number in range(400))
    (tmp_path / "book.txt").write_text(text)
    corpus = load_corpus([tmp_path / "book.txt"])
    trained, held_out = "".join(corpus.trained[0]), "".join(corpus.held_out[0])
    assert trained + held_out == text.rstrip() or trained + held_out == text
    assert 0.05 < len(held_out) / len(text) < 0.07


def test_words_come_from_the_trained_part(corpus):
    trained = {
        word for text in corpus.trained for part in text for word in re.findall("[a-z]+", part)
    }
    assert set(corpus.words) <= trained
    assert all(3 <= len(word) <= 9 for word in corpus.words)


def test_the_header_and_the_licence_of_project_gutenberg_are_left_out(tmp_path):
    book = "It was a long book. " * 1000
    marks = (
        "*** START OF THIS PROJECT GUTENBERG EBOOK X ***",
        "*** END OF THIS PROJECT GUTENBERG EBOOK X ***",
    )
    (tmp_path / "book.txt").write_text(f"header {marks[0]}\n{book}\n{marks[1]} licence")
    text = "".join(load_corpus([tmp_path / "book.txt"]).trained[0])
    assert "header" not in text
    assert "licence" not in text


def test_a_passage_is_long_enough_and_goes_round_the_end():
    sentences = ("One.", " Two.", " Three.")
    found = passage(sentences, np.random.default_rng(0), 40)
    assert sum(map(len, found)) + len(found) >= 40
    at = sentences.index(found[0])
    assert found == [sentences[(at + i) % 3] for i in range(len(found))]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the text .*no\.txt"):
        load_corpus([tmp_path / "no.txt"])


def test_a_file_with_next_to_nothing_in_it_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ConfigError, match=r"10 characters of text: at least 10,000"):
        load_corpus([tmp_path / "short.txt"])
