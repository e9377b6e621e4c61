"""Questions about texts, as prompts: what stands before the texts, and what behind them."""

import pytest

from engine import Engine, PromptError
from engine.model.loader import load_tokenizer
from engine.rag.question import around, around_chat
from tests.engine.families import build
from tests.engine.rag.corpus import MODELS

CHAT = "{% for m in messages %}<|bos|>[{{ m['content'] | trim }}]{% endfor %}"


@pytest.fixture
def engine():
    with Engine(build("llama"), load_tokenizer(MODELS / "needle-tiny")) as engine:
        yield engine


@pytest.mark.parametrize(
    ("template", "before", "behind"),
    [
        (CHAT, "<|bos|>[Be brief.\n\n", "Why?]"),
        (None, "Be brief.\n\n", "Why?"),
    ],
)
def test_instructions_stand_before_the_texts_and_the_question_behind(
    engine, template, before, behind
):
    engine.tokenizer.chat_template = template
    parts = around(engine, "Be brief.", "Why?")
    assert engine.tokenizer.decode(parts.before) == before
    assert engine.tokenizer.decode(parts.behind) == behind


def test_without_instructions_only_the_template_stands_before(engine):
    engine.tokenizer.chat_template = CHAT
    assert engine.tokenizer.decode(around(engine, "", "Why?").before) == "<|bos|>["


@pytest.mark.parametrize("template", ["nothing", "{{ messages[0]['content'] * 2 }}"])
def test_a_template_that_does_not_keep_the_texts_is_refused(engine, template):
    engine.tokenizer.chat_template = template
    with pytest.raises(PromptError, match="does not keep the texts"):
        around(engine, "", "Why?")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('only about cats') }}", "only about cats"),
        ("{{ 1 / (messages | length - 1) }}", "division by zero"),
    ],
)
def test_a_template_that_refuses_or_fails_is_told(engine, template, said):
    engine.tokenizer.chat_template = template
    with pytest.raises(PromptError, match=f"refuses this question: {said}"):
        around(engine, "", "Why?")
    with pytest.raises(PromptError, match=f"refuses this conversation: {said}"):
        engine.render([{"role": "user", "content": "Why?"}])


def test_whatever_a_user_says_is_told_apart_from_the_texts(engine, monkeypatch):
    """Also what stood for the texts in an earlier prompt."""
    engine.tokenizer.chat_template = CHAT
    seen, applied = [], engine.tokenizer.apply_chat_template
    monkeypatch.setattr(
        engine.tokenizer,
        "apply_chat_template",
        lambda messages, **options: seen.append(messages) or applied(messages, **options),
    )
    around(engine, "", "Why?")
    place = seen[0][0]["content"].removesuffix("Why?")
    asked = f"{place} and [[ the texts stand here ]]?"
    assert engine.tokenizer.decode(around(engine, "", asked).behind) == f"{asked}]"
    said = around_chat(engine, [{"role": "user", "content": asked}])
    assert engine.tokenizer.decode(said.behind) == f"{asked}]"


def test_an_empty_question_is_refused(engine):
    with pytest.raises(PromptError, match="the question is empty"):
        around(engine, "Be brief.", " ")
