"""Tokenizers that have little in common, and what suites promise for any of them."""

import hashlib
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from evals.prompt import ask

TEMPLATE = (
    "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@cache
def tiny():
    """That of the model that comes along."""
    return AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "models" / "needle-tiny")


@cache
def letters():
    """A token for each byte, a first one for each text, and a template with ends of messages."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", chat_template=TEMPLATE)


TOKENIZERS = {"tiny": tiny, "letters": letters}


def used(tokenizer, sample):
    """Tokens of each turn's prompt and answer."""
    asked = ask(tokenizer, sample)
    return [x.tokens + turn.max_new_tokens for x, turn in zip(asked, sample.turns)]


def digest(suite, tokenizer, length=2048, count=1):
    """Of all that a suite's samples hold."""
    made = [list(suite.samples(tokenizer, task, length, count)) for task in suite.tasks]
    return hashlib.sha256(repr(made).encode()).hexdigest()


def sentence_end(text):
    """Whether a sentence may begin behind this text."""
    return not text.strip() or text.rstrip("\"')] \n").endswith((".", "!", "?"))
