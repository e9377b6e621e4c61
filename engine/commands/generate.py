"""`headrace generate`: continue a text."""

import os
from argparse import Namespace

from engine.commands.session import decoded, open_engine, read_text, sampling, show
from engine.errors import PromptError


def run(args: Namespace) -> int:
    prompt = _prompt(args)
    with open_engine(args) as engine:
        show(engine.stream(prompt, **sampling(args)), as_json=args.json)
    return 0


def _prompt(args: Namespace) -> str:
    if args.prompt_file is not None and args.prompt is not None:
        raise PromptError("there are two prompts: give a text or --prompt-file, not both")
    if args.prompt_file is not None:
        return read_text(args.prompt_file)
    if args.prompt is None:
        raise PromptError("there is no prompt: give a text, - for standard input, or --prompt-file")
    if args.prompt == "-":
        return read_text("-")
    return decoded(os.fsencode(args.prompt), "the prompt")
