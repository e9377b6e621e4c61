"""From what users write to token ids."""

from collections.abc import Sequence
from typing import Any

from engine.blend.segments import Segments, Tokens, ids_of
from engine.errors import PromptError
from engine.request import Prompt
from engine.unicode import check_unicode


def rendered(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, by the tokenizer's chat template, up to the answer's start."""
    if tokenizer is None or not tokenizer.chat_template:
        raise PromptError("the model has no chat template: pass a plain prompt to generate()")
    if not messages:
        raise PromptError("the conversation is empty: at least one message is needed")
    for message in messages:
        content = message.get("content", "")
        if not isinstance(content, str):
            raise PromptError(f"a message's content must be text, got {type(content).__name__}")
        check_unicode(content, "a message")
    try:
        return list(
            tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    except Exception as error:  # it is code, of whoever made the model
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
