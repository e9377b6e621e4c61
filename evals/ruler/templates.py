"""RULER's prompts, byte for byte: data of NVIDIA/RULER (Apache-2.0), see NOTICE."""

from typing import NamedTuple


class Template(NamedTuple):
    """A prompt in three parts, which follow each other without anything between them."""

    context: str
    question: str
    prefix: str


NIAH = Template(
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the {type_needle_v} afterwards.\n{context}\n",
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?",
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
)
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

TRACING = Template(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\n",
    "Question: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} "
    "variables are assigned the value {query}, they are: ",
)

COMMON_WORDS = Template(
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n",
    "Question: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)

FREQUENT_WORDS = Template(
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {context}\n",
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)

QA = Template(
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\n",
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nQuestion: {query}",
    " Answer:",
)
DOCUMENT = "Document {i}:\n{document}"

_SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer"))


def singular(template: Template) -> Template:
    """The wording for one answer: RULER's replacements, in its order, on the bare template."""
    for many, one in _SINGULAR:
        template = Template(*(part.replace(many, one) for part in template))
    return template
