"""A small corpus and its tokenizer, made once."""

from pydoc_data.topics import topics

import pytest

from evals.ruler import templates
from evals.training.corpus import load_corpus
from evals.training.vocabulary import build_tokenizer
from evals.training.windows import Windows


@pytest.fixture(scope="session")
def corpus():
    return load_corpus([])


@pytest.fixture(scope="session")
def tokenizer():
    wordings = [*templates.NIAH, *templates.singular(templates.NIAH), templates.NEEDLE]
    return build_tokenizer([*list(topics.values())[:40], *wordings * 300])


@pytest.fixture(scope="session")
def windows(corpus, tokenizer):
    return Windows(corpus, tokenizer)
