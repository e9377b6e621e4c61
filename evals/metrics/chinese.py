"""Chinese words, as LongBench finds them: by `jieba`, with its own dictionary."""

import importlib
import logging
import string
import warnings
from collections.abc import Callable, Iterable
from functools import cache

from engine.errors import ConfigError

# LongBench's list, in which 《 and a few others are missing
PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』"
    "【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
REMOVED = str.maketrans("", "", string.punctuation + PUNCTUATION)


def words(text: str) -> list[str]:
    """The words of a text; joined, they are the text again.

    Raises:
        ConfigError: jieba is not installed.
    """
    return _cutter()(text)


def without_punctuation(tokens: Iterable[str]) -> list[str]:
    """Lower-case words without punctuation and blanks; those that nothing is left of are gone."""
    bare = ("".join(token.lower().translate(REMOVED).split()) for token in tokens)
    return [token for token in bare if token]


@cache
def _cutter() -> Callable[[str], list[str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its regular expressions, on compilation
            jieba = importlib.import_module("jieba")
    except ModuleNotFoundError:
        raise ConfigError(
            "scores of Chinese texts need the package jieba: pip install 'headrace[evals]'"
        ) from None
    jieba.setLogLevel(logging.WARNING)
    cut: Callable[[str], list[str]] = jieba.Tokenizer().lcut
    return cut
