"""Cut prompts: both ends stay, the middle goes, and the length is kept."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.errors import ConfigError
from evals.longbench.cut import cut_to_length
from evals.prompt import ask, prompt_tokens
from evals.task import Sample, Turn

from .conftest import byte_tokenizer

PLAIN = byte_tokenizer()


def sample(context, question, length, new_tokens=10, chat=True):
    turn = Turn(question, "", (), new_tokens)
    return Sample("id", "longbench", "task", "family", length, context, (turn,), chat)


def text(made):
    return made.context + made.turns[0].question


def test_a_prompt_that_fits_stays_as_it_is(plain):
    made = sample("c" * 70, "q" * 20, 100)
    assert cut_to_length(plain, made) is made
    longer = sample("c" * 71, "q" * 20, 100)
    assert len(text(cut_to_length(plain, longer))) == 90


def test_the_first_and_the_last_tokens_stay(plain):
    letters = "".join(chr(65 + i % 26) for i in range(200))
    cut = cut_to_length(plain, sample(letters, " and the question?", 100))
    whole = letters + " and the question?"
    assert text(cut) == whole[:45] + whole[-45:]
    assert cut.turns[0].question == " and the question?"


def test_half_of_an_odd_number_is_rounded_down(plain):
    cut = cut_to_length(plain, sample("x" * 200, "?", 101))
    assert len(text(cut)) == 90


def test_a_question_longer_than_the_half_loses_its_beginning(plain):
    cut = cut_to_length(plain, sample("c" * 300, "0123456789" * 10, 50))
    assert text(cut) == "c" * 20 + "0123456789" * 2
    assert cut.turns[0].question == "0123456789" * 2


def test_a_chat_template_and_the_first_token_count(chatty):
    cut = cut_to_length(chatty, sample("c" * 300, "??", 100))
    assert prompt_tokens(chatty, cut) == 4 + 42 + 43  # the halves are of 43 with the first token
    bare = cut_to_length(chatty, sample("c" * 300, "??", 100, chat=False))
    assert prompt_tokens(chatty, bare) == 90  # the first token, and 44 + 45 letters
    assert len(text(bare)) == 89


@pytest.mark.parametrize("used", [97, 98, 99, 100])
def test_what_only_fits_without_a_chat_template_is_cut_and_not_doubled(chatty, used):
    cut = cut_to_length(chatty, sample("c" * (used - 1), "?", 110))
    assert prompt_tokens(chatty, cut) <= 100
    assert len(text(cut)) in (95, 96, 94)


@given(length=st.integers(60, 200), start=st.text("语言模型ab", max_size=6))
@settings(max_examples=40)
def test_a_character_that_is_cut_in_two_does_not_make_the_prompt_longer(length, start):
    cut = cut_to_length(PLAIN, sample(start + "长文本理解" * 50, "问题？", length))
    assert length - 10 - 12 <= prompt_tokens(PLAIN, cut) <= length - 10
    assert cut.turns[0].question == "问题？"


def test_a_tokenizer_that_loses_blanks_keeps_the_length_and_the_prompt():
    words = {x: i for i, x in enumerate(["<unk>", "one", "two", "three", "?"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    cut = cut_to_length(lossy, sample("one  two three " * 30, "\n two\n one ?", 30))
    assert prompt_tokens(lossy, cut) <= 20
    assert text(cut).endswith("two one ?")


def test_the_context_is_what_turns_share(plain):
    asked = ask(plain, cut_to_length(plain, sample("c" * 300, " Why?", 100)))[0]
    assert len(asked.question) == 5
    assert len(asked.context) == 85


def test_no_room_for_a_prompt_is_an_error(plain, chatty):
    with pytest.raises(ConfigError, match="id leaves no room for a prompt: raise the length"):
        cut_to_length(plain, sample("c" * 300, "?", 11))
    with pytest.raises(ConfigError, match="raise the length"):
        cut_to_length(chatty, sample("c" * 300, "?", 14))
