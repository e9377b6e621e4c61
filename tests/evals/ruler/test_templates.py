"""The prompts, byte for byte as RULER has them, template and answer prefix in one piece."""

import hashlib

import pytest

from evals.ruler import templates

WHOLE = {
    "NIAH": "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} mentioned in the provided text? The special magic {type_needle_v} for {query} mentioned in the provided text are",  # noqa: E501
    "TRACING": "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the value {query}, they are: ",  # noqa: E501
    "COMMON_WORDS": "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the list are:",  # noqa: E501
    "FREQUENT_WORDS": "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in the above coded text? Answer: According to the coded text above, the three most frequently appeared words are:",  # noqa: E501
    "QA": "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other words.\n\nQuestion: {query} Answer:",  # noqa: E501
}
SINGLE = "A special magic {type_needle_v} is hidden within the following text. Make sure to memorize it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat is the special magic {type_needle_v} for {query} mentioned in the provided text? The special magic {type_needle_v} for {query} mentioned in the provided text is"  # noqa: E501


@pytest.mark.parametrize("name", WHOLE)
def test_a_template_is_rulers_to_the_byte(name):
    assert "".join(getattr(templates, name)) == WHOLE[name]


def test_one_answer_is_asked_for_in_the_singular():
    assert "".join(templates.singular(templates.NIAH)) == SINGLE


def test_the_question_stands_apart_from_what_it_is_about():
    for name in WHOLE:
        template = getattr(templates, name)
        assert "{context}" in template.context
        assert "{context}" not in template.question + template.prefix
        assert template.context.endswith("\n")
        assert template.prefix.startswith(" ")
        assert "Answer:" in template.prefix or name == "NIAH"


def test_lines_of_needles_noise_and_documents_are_rulers_to_the_byte():
    assert templates.NEEDLE == "One of the special magic {type_needle_v} for {key} is: {value}."
    assert templates.DOCUMENT == "Document {i}:\n{document}"
    assert templates.NOISE == (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )


def test_no_byte_of_the_templates_changes_unnoticed():
    whole = "".join("".join(getattr(templates, name)) for name in sorted(WHOLE))
    digest = hashlib.sha256(whole.encode()).hexdigest()
    assert digest == "37b0da4105501a798f53d5604c380df228514a8a2db37d808970e06bb3d2891d"
