"""`headrace ask`: a question about files."""

import os
from argparse import Namespace

from engine.commands.session import decoded, open_engine, read_text, sampling, show
from engine.rag.question import prompt


def run(args: Namespace) -> int:
    question = decoded(os.fsencode(args.question), "the question")
    text = "\n\n".join(read_text(path) for path in args.text)
    with open_engine(args) as engine:
        tokens = prompt(engine, text, question)
        show(engine.stream(tokens, **sampling(args)), as_json=args.json, strip=True)
    return 0
