#!/usr/bin/env python3
"""What each codec of stored KV saves, costs and spoils.

    python scripts/bench_codecs.py [--json] [--save] [--tokens N] [--questions N] [--threads N]

KV of models/reference over a text (reference pages of the Python language), and of a random model
with 8 KV heads x 128 over the same tokens, in blocks of 64 tokens and records of about 2 MiB, as
the disk tier writes them.

bytes     of payloads, per token
encode, decode   of all records, GB of KV per second; one after the other, and by as many threads
          as the store reads with. Nothing is hashed or copied beside it.
K, V      relative L2 error, over all layers
output    relative L2 error of what attention gives for the 64 tokens behind the text, by their own
          queries, in fp32: the mean of all layers, and the worst one
KL        of the next token's probabilities after each of these 64, to those with KV as computed
needles   questions about numbers in such a text that models/needle-tiny answers right, each from
          the KV of the text as the codec leaves it

`int4 plain` has no codec: rows of 4 bits with steps for 32 numbers, which take to the byte what
`int4` does with steps for 64 and what smooths the channels.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_common import ROOT, add_outputs, facts, finish, timed
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.attention import attend_chunk
from engine.engine import Engine
from engine.method import Method
from engine.model.rope import Tables
from engine.prefill import hidden_states
from engine.recorder import Recorder
from evals.context import Context
from evals.needles import Needles, ask
from kvstore.block import Precision
from kvstore.codecs.codec import Codec, byte_view
from kvstore.codecs.known import BY_NAME
from kvstore.codecs.quantized import Quantized
from kvstore.layout import layer_groups
from kvstore.rows import Int4
from kvstore.sources import READ_THREADS

SIZE, TAIL = 64, 64  # tokens of a block, and behind the text
RECORDS_BYTES = 64 << 20  # encoded and decoded, at least, for a time
ROUNDS = 3


class Plain:
    """4 bits without smoothing."""

    row = Int4(group=32)

    def nbytes(self, heads: int, tokens: int, dim: int) -> int:
        return heads * tokens * self.row.row_bytes(dim)

    def encode(self, x: Float[Tensor, "*n Hk P D"]) -> UInt8[Tensor, "*n N"]:
        return self.row.encode(x).flatten(-3)

    def decode(self, data: UInt8[Tensor, "*n N"], out: Float[Tensor, "*n Hk P D"]) -> None:
        rows = data.unflatten(-1, (*out.shape[-3:-1], self.row.row_bytes(out.shape[-1])))
        out.copy_(self.row.decode(rows, out.shape[-1], out.dtype))


CODECS: Mapping[str, Codec] = {
    **BY_NAME,
    "int4 plain": Quantized(0, Precision.INT4, Plain(), Plain()),
}


class Stored(Context):
    """A text that was read, and its KV as the store gets it."""

    def read(self, tokens: Sequence[int]) -> None:
        self.recorder = Recorder(self.model.shape, size=SIZE, start=0)
        super().read(tokens)
        made = [*self.recorder.take(self.length), *self.recorder.rest(self.length)]
        self.recorder, self.blocks = None, [block.data for _, block in made]

    def put(self, blocks: Sequence[Tensor]) -> None:
        """Go on with this KV instead of that which was computed."""
        tables = Tables(torch.arange(self.length))
        for i, layer in enumerate(self.model.layers):
            k, v = (torch.cat([block[i, part] for block in blocks], 1) for part in (0, 1))
            self.write(i, 0, layer.rope.rotate(k, tables[layer.rope]), v)


@dataclass(frozen=True, slots=True)
class Row:
    """Of one codec and model."""

    bytes_per_token: float
    ratio: float  # of KV as it is
    encode_gbps: float | None  # None where nothing is done
    decode_gbps: float | None
    decode_threads_gbps: float | None
    key_error: float
    value_error: float
    output_error: float
    output_error_worst: float
    kl: float


Speeds = tuple[float | None, float | None, float | None]


def records(blocks: Sequence[Tensor]) -> list[Tensor]:
    """The parts of blocks that are written together."""
    groups = layer_groups(len(blocks[0]), blocks[0].nbytes // len(blocks[0]))
    return [block[group.start : group.stop] for block in blocks for group in groups]


def decoded(codec: Codec, payload: Any, like: Tensor, out: Tensor) -> Tensor:
    landed = codec.landing(byte_view(out), like.shape, like.dtype, payload.nbytes)
    landed[:] = payload
    codec.decode(landed, out)
    return out


def through(codec: Codec, block: Tensor) -> Tensor:
    """What a codec leaves of a block."""
    out = torch.empty_like(block)
    for part, kept in zip(records([block]), records([out]), strict=True):
        payload = codec.encode(part)
        assert payload is not None, "KV of a model is finite"
        decoded(codec, payload, part, kept)
    return out


def speeds(codec: Codec, blocks: Sequence[Tensor], threads: int) -> Speeds:
    """GB/s of encoding, of decoding, and of decoding by so many threads; best of some rounds."""
    if codec.name == "raw":
        return None, None, None  # payloads are the numbers' own memory
    parts = [part for part in records(blocks) if part.shape == records(blocks[:1])[0].shape]
    parts *= -(-RECORDS_BYTES // sum(part.nbytes for part in parts))
    nbytes = sum(part.nbytes for part in parts) / 1e9
    payloads = [codec.encode(part) for part in parts]

    def encode() -> None:
        for part in parts:
            codec.encode(part)

    def decode(numbers: Sequence[int]) -> None:
        out = torch.empty_like(parts[0])  # as the destination of a load, used again
        for i in numbers:
            payload = payloads[i]
            assert payload is not None
            codec.decode(payload, out)

    everything = range(len(parts))
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        shares = [everything[i::threads] for i in range(threads)]
        ways: list[Callable[[], object]] = [
            encode,
            lambda: decode(everything),
            lambda: list(pool.map(decode, shares)),
        ]
        times = [min(timed(way) for _ in range(ROUNDS)) for way in ways]
    return nbytes / times[0], nbytes / times[1], nbytes / times[2]


class Reading:
    """A text, what follows it, and what a model makes of both."""

    def __init__(self, engine: Engine, tokens: Sequence[int]) -> None:
        self.model = engine.model
        self.text = Stored(self.model, tokens[:-TAIL])
        self.blocks = self.text.blocks
        self._tail = torch.tensor(tokens[-TAIL:])
        self._queries: dict[int, Tensor] = {}
        self._probabilities, self._views = self._read()
        self._outputs = self._attended(self.blocks)

    def row(self, codec: Codec, threads: int) -> Row:
        left = [through(codec, block) for block in self.blocks]
        self.text.put(left)
        found = self._read()[0]
        sure = self._probabilities
        kl = (sure.exp() * (sure - found)).sum(-1).mean().item()
        pairs = zip(self._attended(left), self._outputs, strict=True)
        outputs = [relative([a], [b]) for a, b in pairs]
        count = sum(self.size(codec, part) for part in records(self.blocks))
        parts = [([x[:, i] for x in left], [x[:, i] for x in self.blocks]) for i in (0, 1)]
        key_error, value_error = (relative(*pair) for pair in parts)
        return Row(
            count / self.text.length,
            sum(block.nbytes for block in self.blocks) / count,
            *speeds(codec, self.blocks, threads),
            key_error,
            value_error,
            statistics.mean(outputs),
            max(outputs),
            max(0.0, kl),
        )

    def size(self, codec: Codec, part: Tensor) -> int:
        payload = codec.encode(part)
        assert payload is not None
        return int(payload.nbytes)

    @torch.inference_mode()
    def _read(self) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities after each token behind the text, and the KV of these tokens."""
        cache = self.text.dense(TAIL)
        if not self._queries:
            cache.observe = self._queries.__setitem__  # type: ignore[method-assign, assignment]
        (x,) = hidden_states(self.model, cache, self._tail, chunk=TAIL)
        views = [cache.view(i, cache.length) for i in range(self.model.shape.num_layers)]
        tails = [torch.stack([view.k[:, -TAIL:], view.v[:, -TAIL:]]) for view in views]
        return self.model.logits(x).double().log_softmax(-1), tails

    @torch.inference_mode()
    def _attended(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """What attention gives each layer for the tokens behind the text."""
        before, end = self.text.length, self.text.length + TAIL
        context, behind = Tables(torch.arange(before)), Tables(torch.arange(before, end))
        outputs = []
        for i, (layer, tail) in enumerate(zip(self.model.layers, self._views, strict=True)):
            k, v = torch.cat([block[i] for block in blocks], 2).float()
            k = layer.rope.rotate(k, context[layer.rope])
            q = layer.rope.rotate(self._queries[i].float(), behind[layer.rope])
            k, v = (torch.cat([a, b.float()], 1) for a, b in zip((k, v), tail, strict=True))
            outputs.append(attend_chunk(q, k, v, layer.attention))
        return outputs


def relative(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """L2 error of all tensors together."""
    off = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(found, wanted, strict=True)
    )
    return math.sqrt(off / sum(float(b.double().square().sum()) for b in wanted))


def random_model() -> Engine:
    """8 KV heads x 128, as in Llama-3.1-8B."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return Engine(model.to(torch.bfloat16))


def needles(tokens: int, questions: int) -> dict[str, int]:
    """Questions answered right, by codec."""
    with Engine.from_pretrained(ROOT / "models" / "needle-tiny", device="cpu") as engine:
        document = Needles.build(engine, tokens=tokens, needles=questions, seed=0)
        text = Stored(engine.model, document.context)
        right = {}
        for name, codec in CODECS.items():
            text.put([through(codec, block) for block in text.blocks])
            right[name] = sum(ask(engine, text, document.questions, Method()).right)
        return right


def pages() -> str:
    """Reference pages of the Python language, which come with it."""
    import pydoc_data.topics

    return "\n".join(pydoc_data.topics.topics.values())


def measure(tokens: int, questions: int, threads: int) -> dict[str, Any]:
    found: dict[str, Any] = {"models": {}, "needles": needles(tokens, questions)}
    with Engine.from_pretrained(ROOT / "models" / "reference", device="cpu") as engine:
        ids = engine.tokenize(pages())[: tokens + TAIL]
        readings = {"reference": Reading(engine, ids)}
    with random_model() as engine:
        readings["random, 8 KV heads x 128"] = Reading(engine, ids)
    for name, reading in readings.items():
        print(name, file=sys.stderr)
        rows = {codec: asdict(reading.row(CODECS[codec], threads)) for codec in CODECS}
        found["models"][name] = rows
    return found


def table(found: dict[str, Any]) -> str:
    lines = []
    for model, rows in found["models"].items():
        lines.append(
            f"{model:<26}{'B/token':>9}{'ratio':>7}{'enc GB/s':>9}{'dec':>6}{'dec nT':>7}{'K %':>8}"
            f"{'V %':>8}{'out %':>8}{'worst':>8}{'KL':>10}{'needles':>9}"
        )
        for name, x in rows.items():
            errors = (x["key_error"], x["value_error"], x["output_error"], x["output_error_worst"])
            lines.append(
                f"  {name:<24}{x['bytes_per_token']:>9.0f}{x['ratio']:>7.2f}"
                f"{speed(x['encode_gbps']):>9}{speed(x['decode_gbps']):>6}"
                f"{speed(x['decode_threads_gbps']):>7}"
                + "".join(f"{100 * error:>8.3f}" for error in errors)
                + f"{x['kl']:>10.2e}{found['needles'][name]:>6}/{found['questions']}"
            )
    return "\n".join(lines)


def speed(gbps: float | None) -> str:
    return "-" if gbps is None else f"{gbps:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of a text")
    parser.add_argument("--questions", type=int, default=16, help="about needles")
    parser.add_argument("--threads", type=int, default=READ_THREADS, help="that decode")
    add_outputs(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "bench": "codecs", "tokens": arguments.tokens, "questions": arguments.questions,
        "decode_threads": arguments.threads, "block_tokens": SIZE, "behind": TAIL,
        **measure(arguments.tokens, arguments.questions, arguments.threads),
        **facts(torch.device("cpu")),
    }  # fmt: skip
    finish("codecs", found, arguments, found, lambda: print(table(found)))


if __name__ == "__main__":
    main()
