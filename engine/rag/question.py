"""A question about a text, as a prompt."""

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.errors import PromptError
from engine.unicode import check_unicode

if TYPE_CHECKING:
    from engine.engine import Engine


def prompt(engine: "Engine", text: str, question: str) -> list[int]:
    """The text, then the question, in the model's chat template where it has one.

    In this order the KV of the text is the same whatever is asked next.
    """
    if not question.strip():
        raise PromptError("the question is empty")
    content = f"{text}\n\n{question}" if text else question
    if engine.tokenizer is not None and engine.tokenizer.chat_template:
        return engine.render([{"role": "user", "content": content}])
    return engine.tokenize(content)


class Around(NamedTuple):
    """What stands in front of the texts that a question is about, and behind them."""

    before: tuple[int, ...]
    behind: tuple[int, ...]


def around(engine: "Engine", instructions: str, question: str) -> Around:
    """Instructions and a question as tokens, in the model's chat template where it has one.

    Raises:
        PromptError: the question is empty, the engine has no tokenizer, or the chat template
            cannot be told apart into what comes before and behind the texts.
    """
    if not question.strip():
        raise PromptError("the question is empty")
    check_unicode(question, "the question")
    check_unicode(instructions, "what stands in front of the texts")
    before = f"{instructions}\n\n" if instructions else ""
    tokenizer = engine.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        return Around(tuple(engine.tokenize(before)), _bare(tokenizer, question))
    texts = _place()
    return _split(tokenizer, [{"role": "user", "content": f"{before}{texts}{question}"}], texts)


def around_chat(engine: "Engine", messages: Sequence[dict[str, str]]) -> Around:
    """A conversation as tokens, with room for texts in front of the first that a user says.

    There the KV of the texts is the same, however the conversation goes on.

    Raises:
        PromptError: no message of a user, or a chat template that is missing, refuses the
            conversation, or cannot be told apart there.
    """
    if not engine.tokenizer.chat_template:
        raise PromptError("the model has no chat template: pass a plain prompt")
    said = [dict(message) for message in messages]
    first = next((message for message in said if message["role"] == "user"), None)
    if first is None:
        raise PromptError("documents stand in front of what a user says: there is no such message")
    texts = _place()
    first["content"] = f"{texts}{first['content']}"
    return _split(engine.tokenizer, said, texts)


def _place() -> str:
    """What stands for the texts until a chat template has been told apart: nobody can say it."""
    return f"[[{secrets.token_hex(16)}]]"


def _split(tokenizer: Any, messages: Sequence[dict[str, str]], texts: str) -> Around:
    """Before and behind the texts."""
    try:
        said = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # it is code, of whoever made the model
        raise PromptError(f"the chat template refuses this question: {error}") from error
    parts = str(said).split(texts)
    if len(parts) != 2:
        raise PromptError("the chat template does not keep the texts that a question is about")
    return Around(_bare(tokenizer, parts[0]), _bare(tokenizer, parts[1]))


def _bare(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
