"""One process of the RAG demo: reads a `Job` from stdin, writes an `Outcome` to stdout."""

import random
import sys
import time
from pydoc_data.topics import topics

import torch

from engine.cache import SequenceCache
from engine.demo.haystack import KEYS, SENTENCE_END, Fact
from engine.demo.rag import Answer, Job, Outcome
from engine.demo.worker import work
from engine.engine import Engine
from engine.errors import ConfigError
from engine.prefill import prefill
from engine.rag import Rag
from engine.rag.catalogue import Document

MAX_NEW_TOKENS = 16


def run(engine: Engine, job: Job) -> Outcome:
    """Add the documents if asked to, and ask for every fact."""
    rag, (facts, texts) = Rag(engine), documents(engine, job)
    start = time.perf_counter()
    if job.add:
        rag.add(texts)
    spent, kept = time.perf_counter() - start, rag.documents()
    answers = [ask(rag, job, fact, kept) for fact in facts]
    disk = engine.stats().tiers["disk"]
    chunks = sum(len(document.chunks) for document in kept)
    return Outcome(len(kept), chunks, spent, answers, disk.reads, disk.used_bytes)


def documents(engine: Engine, job: Job) -> tuple[list[Fact], list[dict[str, str]]]:
    """Starts of reference pages of the Python language with one fact each, and the facts."""
    rng, keys, room = random.Random(job.seed), KEYS.split(), job.tokens // max(1, job.facts) - 64
    most = min(len(keys), len(topics))
    if not 2 <= job.facts <= most or room < 64:
        raise ConfigError(
            f"--facts must be 2 to {most} with 128 --tokens for each, got {job.facts}"
        )
    facts = [Fact(key, f"{rng.randrange(10**6):06}") for key in rng.sample(keys, job.facts)]
    texts = []
    for page, fact in zip(rng.sample(sorted(topics), job.facts), facts, strict=True):
        text = engine.splitter.split(topics[page], limit=room)[0].text
        texts.append({"id": page, "title": page, "text": _hide(rng, text, fact)})
    return facts, texts


def ask(rag: Rag, job: Job, fact: Fact, kept: list[Document]) -> Answer:
    """One question over all documents."""
    order = ordered(job, fact, kept)
    chunks = [chunk.id for document in order for chunk in document.chunks]
    answer = rag.ask(fact.question, chunks, max_new_tokens=MAX_NEW_TOKENS)
    report = answer.report
    return Answer(
        key=fact.key,
        value=fact.value,
        text=answer.text,
        right=fact.answered_by(answer.text),
        order=[document.title for document in order],
        ttft_s=answer.ttft_s,
        full_s=full(rag, fact.question, chunks),
        prompt_tokens=report.prompt_tokens,
        exact_tokens=report.exact_tokens,
        reused_tokens=report.reused_tokens,
        fresh_tokens=report.fresh_tokens,
        charged=report.charged,
        missed=report.missed,
        reason=report.reason,
    )


def ordered(job: Job, fact: Fact, kept: list[Document]) -> list[Document]:
    """The order in which a process reads them; the second never has that of the first."""
    rng = random.Random(f"{job.seed} {fact.key}")
    order, at = rng.sample(kept, len(kept)), rng.randrange(1, len(kept))
    return order if job.add else order[at:] + order[:at]


def full(rag: Rag, question: str, chunks: list[str]) -> float:
    """Seconds until the model has read the same prompt without the store."""
    model, tokens = rag.engine.model, rag.prompt(question, chunks).tokens
    start = time.perf_counter()
    cache = SequenceCache(model.shape, len(tokens))
    ids = torch.tensor(tokens, device=model.shape.device)
    prefill(model, cache, ids, chunk=rag.engine.config.chunk(ids.device))
    return time.perf_counter() - start


def _hide(rng: random.Random, text: str, fact: Fact) -> str:
    ends = [end.start() for end in SENTENCE_END.finditer(text)] or [len(text)]
    at = rng.choice(ends)
    return text[:at] + fact.statement + text[at:]


if __name__ == "__main__":
    sys.exit(work(Job, run))
