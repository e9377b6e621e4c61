"""Tokenizers that have nothing in common, and data sets in miniature."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

MODELS = Path(__file__).parents[3] / "models"
CHAT = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny():
    """That of needle-tiny: 1,024 tokens and single digits."""
    return AutoTokenizer.from_pretrained(MODELS / "needle-tiny")


@pytest.fixture(scope="session")
def bpe():
    """Bytes in pairs, as most models have them, with a first token and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<|user|>", "<|end|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((topics[x] for x in sorted(topics)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.chat_template = CHAT
    return fast


@pytest.fixture(scope="session")
def words():
    """A token for each word, as few as a prompt can have."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="session")
def squad_rows():
    """SQuAD's official form: 3 articles of 12 paragraphs; every other question has an answer."""

    def paragraph(article, number):
        name = f"{article}{number}"
        filler = " ".join(f"{article} said thing {number} {i}." for i in range(5 + number))
        answers = [{"text": f"answer {name}"}, {"text": f"the answer {name}"}]
        return {
            "context": f"{filler} The answer {name} it is.",
            "qas": [
                {"question": f"What is in {name}?", "answers": answers, "is_impossible": False},
                {"question": f"What is not in {name}?", "answers": [], "is_impossible": True},
            ],
        }

    return [
        {"title": article, "paragraphs": [paragraph(article, number) for number in range(12)]}
        for article in ("Ants", "Bees", "Cats")
    ]


@pytest.fixture(scope="session")
def hotpotqa_rows():
    """HotpotQA's official form: 8 questions with 4 paragraphs each, one of which they share."""

    def row(number):
        titles = [f"Title {number}.{i}" for i in range(3)] + ["Shared"]
        pairs = [[title, [f"{title} starts.", f" {title} ends."] * 3] for title in titles]
        return {"question": f"Who is {number}?", "answer": f"person {number}", "context": pairs}

    return [row(number) for number in range(8)]
