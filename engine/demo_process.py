"""One process of the demo: reads a `Job` from stdin, asks, and writes an `Outcome` to stdout."""

import sys

import msgspec
import torch

from engine.commands.session import quiet
from engine.demo import Answer, Job, Outcome
from engine.engine import Engine
from engine.errors import EngineError, PromptError
from engine.haystack import KEYS, Fact, Haystack
from engine.question import prompt
from kvstore.errors import StoreError

MAX_NEW_TOKENS = 16


def main() -> int:
    try:
        quiet()
        outcome = answer_all(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))
    except (EngineError, StoreError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
    return 0


def answer_all(job: Job) -> Outcome:
    """Hide the facts, and ask for each."""
    dtype = None if job.dtype is None else getattr(torch, job.dtype)
    with Engine.from_pretrained(job.model, job.config, dtype=dtype, device=job.device) as engine:
        haystack = hide(engine, tokens=job.tokens, facts=job.facts, seed=job.seed)
        answers = [ask(engine, haystack.text, haystack.facts[0])]
        after_first = engine.stats().tiers
        answers += [ask(engine, haystack.text, fact) for fact in haystack.facts[1:]]
        engine.store.flush()
        return Outcome(answers, after_first, engine.stats().tiers)


def hide(engine: Engine, *, tokens: int, facts: int, seed: int) -> Haystack:
    """A haystack that makes prompts of `tokens` tokens at most, the answer included."""
    if tokens > (positions := engine.model.shape.max_positions):
        raise PromptError(f"--tokens {tokens} is more than the model's {positions} positions")
    questions = (prompt(engine, " ", Fact(key, "").question) for key in KEYS.split())
    room = tokens - max(map(len, questions)) - MAX_NEW_TOKENS
    return Haystack.build(engine.tokenizer, tokens=max(room, 0), facts=facts, seed=seed)


def ask(engine: Engine, text: str, fact: Fact) -> Answer:
    """One question about the text."""
    tokens = prompt(engine, text, fact.question)
    [done] = engine.generate([tokens], max_new_tokens=MAX_NEW_TOKENS)
    said = done.text or ""
    return Answer(
        key=fact.key,
        value=fact.value,
        text=said,
        right=fact.answered_by(said),
        prompt_tokens=done.stats.prompt_tokens,
        cached_tokens=done.stats.cached_tokens,
        ttft_s=done.stats.ttft_s,
        decode_s=done.stats.total_s - done.stats.ttft_s,
        new_tokens=done.stats.new_tokens,
    )


if __name__ == "__main__":
    sys.exit(main())
