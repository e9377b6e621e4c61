"""The tokenizer: groups of fixed size, nothing lost, no template between raw and rendered."""

import pytest

from evals.training.vocabulary import TOKENS


def test_it_has_the_size_the_network_expects(tokenizer):
    assert len(tokenizer) == TOKENS


def test_every_group_of_three_digits_is_one_token(tokenizer):
    assert all(len(tokenizer.tokenize(f"{number:03}")) == 1 for number in range(1000))


def test_every_pair_of_capitals_is_one_token(tokenizer):
    pairs = [a + b for a in "ABMXYZ" for b in "ABMXYZ"]
    assert all(len(tokenizer.tokenize(pair)) == 1 for pair in pairs)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (" 7654321.", ["Ġ", "765", "432", "1", "."]),
        (" 123456", ["Ġ", "123", "456"]),
        (" ABCDE", ["Ġ", "AB", "CD", "E"]),
    ],
)
def test_numbers_and_names_are_cut_from_the_left(tokenizer, text, pieces):
    assert tokenizer.tokenize(text) == pieces


def test_text_of_any_kind_comes_back(tokenizer):
    text = "VAR ABCDE = 12345 \n\n“Früh”, 3f2504e0-4f89-41d3 \t 東京 x  y."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_rendered_prompt_is_the_raw_one_after_the_beginning_of_text(tokenizer):
    text = "  What is the special magic number?\n It is"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": text}])["input_ids"]
    assert rendered == [tokenizer.bos_token_id, *tokenizer.encode(text)]
