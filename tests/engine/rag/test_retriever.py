"""Retrievers: the same answer whatever the order, whatever was removed, in any script."""

import math
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import ConfigError, PromptError
from engine.rag.retriever import BM25, K1, B, Hit, Vectors, words

TEXTS = {
    "cat": "The cat sat on the mat. The cat slept.",
    "dog": "A dog barked at the cat, and at the postman.",
    "sea": "The sea was calm, and the sky was grey.",
    "empty": "...",
}


def bm25(texts=TEXTS) -> BM25:
    found = BM25()
    found.add(list(texts), list(texts.values()))
    return found


def letters(texts):
    """An embedding: how often each letter occurs."""
    return np.array(
        [[text.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts]
    )


def vectors(texts=TEXTS, **options) -> Vectors:
    found = Vectors(letters, **options)
    found.add(list(texts), list(texts.values()))
    return found


BOTH = pytest.mark.parametrize("make", [bm25, vectors])


def test_a_chunk_with_the_questions_words_is_found_first():
    assert [hit.id for hit in bm25().search("Where did the cat sleep, on a mat?", 2)] == [
        "cat",
        "dog",
    ]
    assert [hit.id for hit in bm25().search("postman", 5)] == ["dog"]


def test_a_question_without_a_known_word_finds_nothing():
    assert bm25().search("zebra", 5) == []
    assert bm25().search("", 5) == []
    assert BM25().search("cat", 5) == []


def test_scores_are_those_of_the_formula():
    texts = {"a": "x y y", "b": "x z", "c": "z z z z"}
    mean, n = 3.0, 3
    idf_x, idf_y = math.log1p((n - 2 + 0.5) / 2.5), math.log1p((n - 1 + 0.5) / 1.5)

    def part(count, length):
        return count * (K1 + 1) / (count + K1 * (1 - B + B * length / mean))

    expected = {"a": idf_x * part(1, 3) + idf_y * part(2, 3), "b": idf_x * part(1, 2)}
    assert {h.id: h.score for h in bm25(texts).search("X? y!", 9)} == pytest.approx(expected)


@settings(max_examples=50)
@given(st.randoms(use_true_random=False), st.lists(st.text("abc ", max_size=9), max_size=9))
def test_results_depend_on_what_is_there_and_not_on_how_it_came(rng, texts):
    named = {f"c{number}": text for number, text in enumerate(texts)}
    shuffled = rng.sample(list(named), len(named))
    other = BM25()
    for id_ in shuffled:
        other.add([id_, f"gone {id_}"], [named[id_], "a b c"])
    other.remove([f"gone {id_}" for id_ in shuffled])
    other.add(list(named), list(named.values()))  # known ones are left alone
    assert other.search("a b", 99) == bm25(named).search("a b", 99)


def test_equal_scores_come_by_id():
    same = dict.fromkeys("dbca", "cat")
    assert [hit.id for hit in bm25(same).search("cat", 3)] == ["a", "b", "c"]


@BOTH
def test_what_was_removed_is_not_found_and_may_come_again(make):
    found = make()
    found.remove(["cat", "unknown"])
    assert "cat" not in [hit.id for hit in found.search("cat mat", 9)]
    found.add(["cat"], [TEXTS["cat"]])
    assert found.search("cat mat", 9) == make().search("cat mat", 9)


def test_nothing_is_left_of_what_was_removed():
    found = bm25()
    found.remove(TEXTS)
    assert (found._words, found._chunks, found._length) == ({}, {}, 0)
    assert found.search("cat", 1) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't SHOUT_at me!", ["don", "t", "shout", "at", "me"]),
        ("Straße ＡＢＣ ﬁn", ["strasse", "abc", "fin"]),
        ("Cafe\u0301 CAFÉ", ["café", "café"]),
        ("東京都に住む", ["東京", "京都", "都に", "に住", "住む"]),
        ("GPT4を使う", ["gpt4", "を使", "使う"]),
        ("水", ["水"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("привет, МИР 42", ["привет", "мир", "42"]),
        ("กิน", ["กิ", "ิน"]),
        ("", []),
    ],
)
def test_words_of_any_script(text, expected):
    assert words(text) == expected


def test_a_question_in_japanese_finds_its_chunk():
    texts = {"one": "東京都に住んでいます。", "two": "大阪で働いています。"}
    assert [hit.id for hit in bm25(texts).search("東京に住む人", 1)] == ["one"]


def test_a_question_of_one_ideograph_finds_its_chunk_and_others_score_as_before():
    texts = {"dog": "犬は好きです。庭に犬がいます。", "sky": "空は青い。"}
    for question in ("犬", "犬?", "犬 はどこ"):
        assert [hit.id for hit in bm25(texts).search(question, 1)] == ["dog"]
    assert bm25(texts).search("猫", 1) == []
    pairs = {"a": "東京 京都 都に", "b": "京都"}  # as runs, each is one pair
    assert bm25({"a": "東京都に", "b": "京都"}).search("京都", 2) == bm25(pairs).search("京都", 2)


# vectors


def test_the_nearest_vector_is_found_first():
    hits = vectors().search(TEXTS["sea"], 2)
    assert hits[0].id == "sea"
    assert hits[0].score == pytest.approx(1.0, abs=1e-6)
    assert len(hits) == 2


def test_texts_are_embedded_in_batches_and_once():
    seen = []

    def embed(texts):
        seen.append(len(texts))
        return letters(texts)

    found = Vectors(embed, batch=2)
    found.add(["a", "b", "c"], ["x", "y", "z"])
    found.add(["a", "d"], ["x", "w"])
    assert seen == [2, 1, 1]
    assert {hit.id for hit in found.search("x", 9)} == set("abcd")


def test_an_empty_index_finds_nothing_without_embedding():
    def embed(texts):
        raise AssertionError

    assert Vectors(embed).search("x", 3) == []


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (np.zeros(4), "2 finite vectors as an array .n, d., got 4"),
        (np.zeros((1, 4)), "got 1x4"),
        (np.array([[np.nan, 1.0], [1.0, 1.0]]), "finite"),
        ([[1.0], [1.0, 2.0]], "2 finite vectors .* inhomogeneous"),
        (torch.ones(2, 3, requires_grad=True), "2 finite vectors .* requires grad"),
        (None, "2 finite vectors"),
        ("ab", "2 finite vectors"),
        ([[1 + 2j], [1j]], "2 finite vectors"),
    ],
)
def test_an_embedding_of_another_form_is_refused(returned, said):
    with pytest.raises(PromptError, match=said):
        Vectors(lambda texts: returned).add(["a", "b"], ["x", "y"])


@pytest.mark.parametrize("scale", [1e200, 1e25, 1.0, 1e-30, 1e-200])
def test_vectors_of_any_size_are_compared_by_their_direction(scale):
    found = Vectors(lambda texts: letters(texts) * scale)
    found.add(list(TEXTS)[:3], list(TEXTS.values())[:3])
    hits = found.search(TEXTS["dog"], 1)
    assert hits[0].id == "dog"
    assert hits[0].score == pytest.approx(1.0, abs=1e-6)


def test_vectors_that_change_their_length_are_refused():
    lengths = iter([4, 5])
    found = Vectors(lambda texts: np.ones((len(texts), next(lengths))))
    found.add(["a"], ["x"])
    with pytest.raises(PromptError, match="vectors of 5 after 4"):
        found.add(["b"], ["y"])


def test_a_batch_of_no_text_is_refused():
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        vectors(batch=0)


def test_without_faiss_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[cpu\]'"):
        Vectors(letters)
    assert bm25().search("cat", 1)


def test_ten_thousand_chunks_are_searched_in_time():
    rng = random.Random(0)
    vocabulary = [f"w{number}" for number in range(2000)]
    texts = {f"{n:05}": " ".join(rng.choices(vocabulary, k=50)) for n in range(10_000)}
    hits = bm25(texts).search(texts["00042"], 3)
    assert hits[0].id == "00042"
    assert isinstance(hits[0], Hit)
