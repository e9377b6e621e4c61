"""The reference model's tokenizer: byte-level BPE in which numbers and names have fixed groups."""

import json
import re
from collections.abc import Iterable
from itertools import product
from string import ascii_uppercase, digits
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
TOKENS = 4096
# up to three digits are one token, and so are two capitals: values and variable names of any
# length are a few tokens, each of which was seen in training
GROUPS = Regex(r"\d{1,3}|[A-Z]{2}")
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if not loop.first %}{{ '\\n' }}{% endif -%}"
    "{{- message['content'] -}}"
    "{%- endfor -%}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of `TOKENS` entries whose merges of letters were learned from `texts`.

    A rendered chat is the beginning-of-text token and the messages as they are: a prompt in a
    benchmark's own wording and the same prompt as a user's message are the same tokens.
    """
    groups = _groups()
    learned = _train(texts, TOKENS - len({left + right for left, right in groups}))
    vocabulary, merges = learned["vocab"], [tuple(merge) for merge in learned["merges"]]
    for left, right in groups:
        vocabulary.setdefault(left + right, len(vocabulary))
        merges.append((left, right))
    tokenizer = _tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _groups() -> list[tuple[str, str]]:
    """The merges that make every group one token: two digits, then three; two capitals."""
    twos = ["".join(pair) for pair in product(digits, repeat=2)]
    return [
        *((two[0], two[1]) for two in twos),
        *((two, digit) for two in twos for digit in digits),
        *((digit, two) for two in twos for digit in digits),  # where the last two merged first
        *((a, b) for a in ascii_uppercase for b in ascii_uppercase),
    ]


def _tokenizer(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(GROUPS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train(texts: Iterable[str], tokens: int) -> dict[str, Any]:
    """Vocabulary and merges of a BPE trained on `texts` without the digits and double capitals."""
    tokenizer = _tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_ungrouped(text) for text in texts), trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def _ungrouped(text: str) -> str:
    """`text` without what is grouped anyway, so that no merge is spent on it."""
    return re.sub(r"\d|[A-Z]{2,}", " ", text)
