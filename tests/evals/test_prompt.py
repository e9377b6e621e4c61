"""Prompts: one context for all turns, and nothing of the texts lost or added."""

import hashlib
import struct

import pytest

from engine.errors import PromptError
from engine.model.loader import load_tokenizer, locate
from evals.prompt import Asked, ask, ask_alone
from evals.task import Sample, Turn

TEXT = "The grass is green. The special magic number for tiger is 314159. The sky is blue."
TIGER = "\n\nWhat is the special magic number for tiger?"
RUBY = "\n\nWhat is the special magic number for ruby?"


@pytest.fixture
def tokenizer():
    return load_tokenizer(locate("needle-tiny"))


def sample(*questions, prefix="", chat=True, context=TEXT):
    turns = tuple(Turn(question, prefix, ("1",), 4) for question in questions)
    return Sample("s/t/1/0", "s", "t", "f", 1, context, turns, chat=chat)


def said(tokenizer, asked):
    return tokenizer.decode([*asked.context, *asked.question], skip_special_tokens=True)


def test_without_a_template_the_prompt_is_the_texts(tokenizer):
    for chat, template in ((False, tokenizer.chat_template), (True, None)):
        tokenizer.chat_template = template
        [one] = ask(tokenizer, sample(TIGER, prefix=" It is", chat=chat))
        assert said(tokenizer, one) == f"{TEXT}{TIGER} It is"
        assert [*one.context, *one.question] == tokenizer(f"{TEXT}{TIGER} It is")["input_ids"]


def test_the_prefix_begins_the_answer_behind_the_template(tokenizer):
    tokenizer.chat_template = (
        "{{ bos_token }}User: {{ messages[0]['content'] }} End."
        "{% if add_generation_prompt %} Answer:{% endif %}"
    )
    [one] = ask(tokenizer, sample(TIGER, prefix=" It is"))
    assert said(tokenizer, one) == f"User: {TEXT}{TIGER} End. Answer: It is"
    assert list(one.context).count(tokenizer.bos_token_id) == 1


def test_all_turns_share_the_longest_context_that_they_can(tokenizer):
    one, two = ask(tokenizer, sample(TIGER, RUBY))
    assert one.context == two.context
    assert tokenizer.decode(one.context, skip_special_tokens=True) == TEXT
    assert "tiger" in tokenizer.decode(one.question)
    assert "ruby" in tokenizer.decode(two.question)


def test_a_context_does_not_take_what_questions_have_in_common(tokenizer):
    [alone] = ask(tokenizer, sample(TIGER))
    together = ask(tokenizer, sample(TIGER, TIGER))
    assert together == [alone, alone]


def test_a_token_across_the_seam_belongs_to_the_question(tokenizer):
    """A turn goes on in the middle of a word that is one token."""
    text = "The sky is blue. It was th"
    [plain] = ask(tokenizer, sample(" ?", chat=False, context=text))
    one, two = ask(tokenizer, sample(" ?", "e?", chat=False, context=text))
    assert one.context == two.context == plain.context[: len(two.context)]
    assert len(two.context) < len(plain.context)
    for asked, end in ((one, " ?"), (two, "e?")):
        assert said(tokenizer, asked) == text + end


def test_a_template_that_puts_the_question_first_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'][-40:] }} {{ messages[0]['content'] }}"
    with pytest.raises(PromptError, match="behind the text"):
        ask(tokenizer, sample(TIGER))


def test_a_template_that_refuses_is_an_error_in_words(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('only pairs') }}"
    with pytest.raises(PromptError, match="only pairs"):
        ask(tokenizer, sample(TIGER))


def test_the_floor_has_the_question_and_nothing_else(tokenizer):
    one = ask_alone(tokenizer, sample(RUBY, TIGER, prefix=" It is", chat=False), 1)
    assert said(tokenizer, one) == f"{TIGER} It is"
    assert len(one.question) == 1


def test_a_prompt_of_one_token_is_refused(tokenizer):
    with pytest.raises(PromptError, match="two tokens"):
        ask(tokenizer, sample("", chat=False, context=""))
    with pytest.raises(PromptError, match="two tokens"):
        ask_alone(tokenizer, sample("", chat=False), 0)


def test_the_digest_is_of_the_ids_wherever_the_context_ends():
    want = hashlib.sha256(struct.pack("<4i", 1, 2, 3, 70000)).hexdigest()
    assert Asked((1, 2, 3), (70000,)).sha256 == want
    assert Asked((1,), (2, 3, 70000)).sha256 == want
    assert Asked((1, 2), (70000, 3)).sha256 != want
