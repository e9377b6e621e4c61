"""Strings that stand for text."""

from engine.errors import PromptError


def check_unicode(text: str, what: str) -> None:
    """PromptError for a string that stands for no characters: half of a pair, undecoded bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{what} is not Unicode: {error.reason} at {error.start}") from error
