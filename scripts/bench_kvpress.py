#!/usr/bin/env python3
"""Needles answered right by kvpress (NVIDIA), which evicts what it takes to be unimportant.

    .venv/bin/python scripts/bench_kvpress.py --export FILE  in this project's environment
    OTHER/bin/python scripts/bench_kvpress.py --run FILE     in one with kvpress

The texts and questions are those of bench_needles.py, as token ids. Presses compress the text's KV
once, without knowing the questions (that is when eviction pays), to a share of its tokens; each
question and its answer then attend to what was kept, all of it. kvpress wants another version of
transformers than this project: hence two environments.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("needle-tiny", "needle-smear")
KEPT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
PRESSES = ("KnormPress", "SnapKVPress", "ExpectedAttentionPress", "StreamingLLMPress")


def export(target: Path, documents: int) -> None:
    """Write texts, questions and answers of both models."""
    sys.path.insert(0, str(ROOT))
    from engine.engine import Engine
    from evals.needles import Needles

    found: dict[str, Any] = {}
    for model in MODELS:
        with Engine.from_pretrained(model, device="cpu") as engine:
            parts = [
                Needles.build(engine, tokens=4096, needles=32, seed=i) for i in range(documents)
            ]
        found[model] = [
            {
                "context": list(part.context),
                "questions": [[list(q.tokens), str(q.fact.value)] for q in part.questions],
            }
            for part in parts
        ]
    target.write_text(json.dumps(found))


def run(source: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Shares of answers right: model, press, share kept."""
    import kvpress
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shares: dict[str, dict[str, dict[str, float]]] = {}
    for model, documents in json.loads(source.read_text()).items():
        folder = ROOT / "models" / model
        module = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for press in PRESSES:
            for kept in KEPT:
                made = getattr(kvpress, press)(compression_ratio=1 - kept)
                right = [x for text in documents for x in answers(module, tokenizer, made, text)]
                share = sum(right) / len(right)
                shares.setdefault(model, {}).setdefault(press, {})[f"{kept:g}"] = round(share, 4)
                print(f"{model} {press} {kept:g}: {share:.2f}", file=sys.stderr)
    return shares


def answers(module: Any, tokenizer: Any, press: Any, text: dict[str, Any]) -> list[bool]:
    """Whether each question is answered right from the compressed text."""
    import torch
    from transformers import DynamicCache

    context = torch.tensor([text["context"]])
    with torch.inference_mode():
        cache = DynamicCache()
        with press(module):
            module.model(context, past_key_values=cache)
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        return [
            said(module, tokenizer, cache, lengths, context.shape[1], question) == value
            for question, value in text["questions"]
        ]


def said(
    module: Any, tokenizer: Any, cache: Any, lengths: list[int], start: int, question: list[int]
) -> str:
    """The first six digits of a greedy answer; the cache is as before afterwards."""
    import torch

    tokens, found, at = torch.tensor([question]), [], start
    for _ in range(8):
        places = torch.arange(at, at + tokens.shape[1])[None]
        logits = module(tokens, past_key_values=cache, position_ids=places).logits[0, -1]
        at += tokens.shape[1]
        tokens = logits.argmax().view(1, 1)
        found.append(int(tokens))
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    return "".join(c for c in tokenizer.decode(found) if c.isdigit())[:6]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--export", type=Path, metavar="FILE")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--run", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.export:
        export(options.export, options.documents)
    if options.run:
        print(json.dumps(run(options.run)))
    if not (options.export or options.run):
        parser.error("give --export or --run")


if __name__ == "__main__":
    main()
