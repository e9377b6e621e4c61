"""One process of the demo: reads a `Job` from stdin, asks, and writes an `Outcome` to stdout."""

import sys

from engine.demo.demo import Answer, Job, Outcome, tiers_of
from engine.demo.haystack import KEYS, Fact, Haystack
from engine.demo.worker import work
from engine.engine import Engine
from engine.errors import PromptError
from engine.rag.question import prompt

MAX_NEW_TOKENS = 16


def answer_all(engine: Engine, job: Job) -> Outcome:
    """Hide the facts, and ask for each."""
    haystack = hide(engine, tokens=job.tokens, facts=job.facts, seed=job.seed)
    answers = [ask(engine, haystack.text, haystack.facts[0])]
    after_first = tiers_of(engine.stats())
    answers += [ask(engine, haystack.text, fact) for fact in haystack.facts[1:]]
    engine.store.flush()
    return Outcome(answers, after_first, tiers_of(engine.stats()))


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
    sys.exit(work(Job, answer_all))
