"""From what users write to token ids."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from engine.blend.segments import Segments, Tokens, ids_of
from engine.errors import PromptError
from engine.request import Prompt
from engine.unicode import check_unicode


def rendered(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, by the tokenizer's chat template, up to the answer's start."""
    if tokenizer is None or not tokenizer.chat_template:
        raise PromptError("the model has no chat template: pass a plain prompt to generate()")
    for message in messages:
        check_unicode(message.get("content", ""), "a message")
    try:
        return list(
            tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    except TemplateError as error:
        raise PromptError(f"the chat template refuses this conversation: {error}") from error


def tokenized(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with the special tokens the tokenizer adds."""
    if tokenizer is None:
        raise PromptError("this engine has no tokenizer: pass token ids")
    check_unicode(text, "the prompt")
    return list(tokenizer(text)["input_ids"])


def flat(tokenizer: Any, prompt: Prompt) -> Tokens:
    """Token ids of any prompt."""
    if isinstance(prompt, Segments):
        return prompt.tokens
    return ids_of(tokenized(tokenizer, prompt) if isinstance(prompt, str) else prompt)
