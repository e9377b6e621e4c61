"""A question about a text, as a prompt."""

from typing import TYPE_CHECKING

from engine.errors import PromptError

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
