"""Tokenizers that one can count by hand, and rows of all data sets."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from evals.longbench.tasks import TASKS

CHAT = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ANSWERS = {
    "passage_count": "7",
    "passage_retrieval_en": "Paragraph 3",
    "passage_retrieval_zh": "段落3",
    "trec": "Date",
    "lsht": "经济",
}


def byte_tokenizer(first=False, chat=None):
    """A token for each byte, and a first one that stands for none where `first` is set."""
    special = ["<s>", "<|user|>", "<|end|>", "<|assistant|>"]
    names = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    if first:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    fast.chat_template = chat
    return fast


@pytest.fixture(scope="session")
def plain():
    """A byte a token, nothing else."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def chatty():
    """A byte a token, one in front, and four of a chat template."""
    return byte_tokenizer(first=True, chat="<s>" + CHAT)


@pytest.fixture(scope="session")
def rows():
    """Three rows of each data set, in LongBench's form."""

    def row(task, number):
        answer = ANSWERS.get(task, f"answer {number} of {task}")
        return {
            "input": f"What is number {number}?",
            "context": f"Text {number} of {task}. " * 40,
            "answers": [answer, answer],
            "length": 160,
            "dataset": task,
            "language": "en",
            "all_classes": ["Date", "经济", "Other"] if task in ("trec", "lsht") else None,
            "_id": f"{task}{number}",
        }

    return {task: [row(task, number) for number in range(3)] for task in TASKS}
