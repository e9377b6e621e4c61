"""`headrace demo`: hide facts in a long text, ask, stop the process, and ask again in another."""

import json
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from rich.filesize import decimal

from engine.commands import demo_rag
from engine.commands.demo_rag import job_of, show, store_folder
from engine.commands.session import busy
from engine.demo.demo import (
    Job,
    Outcome,
    check_cold,
    check_warm,
    decode_tokens_per_s,
    run_process,
)


def run(args: Namespace) -> int:
    if args.trip == "rag":
        return demo_rag.run(args)
    with store_folder(args) as folder:
        job = job_of(Job, args, folder)
        with busy(f"process 1 reads {args.tokens:,} tokens and answers"):
            cold = run_process(job, "process 1")
        check_cold(cold)
        with busy("process 1 has ended; process 2 answers from disk"):
            warm = run_process(job, "process 2")
        check_warm(warm, job.config.block_tokens)
    numbers = _numbers(cold, warm)
    if args.json:
        print(json.dumps(numbers))
    else:
        show(cold, warm, _summary(cold, warm, numbers))
    return 0 if cold.correct == warm.correct == len(cold.answers) else 1


def _numbers(cold: Outcome, warm: Outcome) -> dict[str, Any]:
    """The result as one flat record. Bytes are those at the end of process 1."""
    return {
        "questions": len(cold.answers),
        "correct_cold": cold.correct,
        "correct_warm": warm.correct,
        "context_tokens": cold.answers[0].prompt_tokens,
        "ttft_cold_s": round(cold.ttft_s, 4),
        "ttft_warm_s": round(warm.ttft_s, 4),
        "ttft_ratio": round(cold.ttft_s / warm.ttft_s, 1),
        "decode_tokens_per_s": round(decode_tokens_per_s(cold, warm), 1),
        "bytes": {name: tier.used_bytes for name, tier in cold.after_last.items()},
        "cached_tokens_warm": warm.answers[0].cached_tokens,
        "disk_hits_warm": warm.after_last["disk"].hits,
    }


def _summary(cold: Outcome, warm: Outcome, numbers: dict[str, Any]) -> Iterator[str]:
    tiers = ", ".join(f"{name} {decimal(size)}" for name, size in numbers["bytes"].items())
    yield f"context              {numbers['context_tokens']:,} tokens"
    yield f"first token, cold    {cold.ttft_s:.3f} s  (process 1: prefill)"
    yield f"first token, warm    {warm.ttft_s:.3f} s  (process 2: KV from disk)"
    yield f"ratio                {numbers['ttft_ratio']:.0f} times"
    yield f"decode               {numbers['decode_tokens_per_s']:.0f} tokens/s"
    yield f"KV after process 1   {tiers}"
    yield f"disk hits            {numbers['disk_hits_warm']:,}  (process 2; {_first_hits(warm)})"
    yield "Times are measured inside each process, without loading the model."


def _first_hits(warm: Outcome) -> str:
    return f"{warm.answers[0].cached_tokens:,} tokens for its first question"
