"""Decode of the Llama-3.1-8B shape: dense, and with methods that choose, at given shares of hits.

What is behind a bound is counted, not guessed: a step fetches layers * KV heads * budget * (1 -
hits) rows for every request, and cannot be faster than the link brings them.
"""

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.batch.batch import DeviceBatch
from engine.method import Method, preset
from engine.model.hf import HFModel
from engine.sparse.cache import pool_shape
from gpu_bench.dense import DenseBatch
from gpu_bench.llama import weight_bytes
from gpu_bench.synthetic import ROOM, Requests, pool_of
from gpu_bench.timing import Ceilings, Times, elapsed, free_memory

GIB = 1 << 30
STEPS, WARM = 24, 12  # the first ones fill the buffers
# half the bytes of a row: twice the requests in host memory, and twice the link
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "headrace, int8": ("headrace", {"keys": "int8", "values": "int8"})
}
SLACK_BYTES = 3 * GIB // 2  # activations, workspaces, what a graph keeps


@dataclass(frozen=True, slots=True)
class Place:
    """Where decode is measured.

    Args:
        cap_bytes: of device memory that dense and sparse alike may use; None for all there is.
        host_bytes: that KV in host memory may take. Slabs are shared (`synthetic`), so it is not
            taken, but no batch is measured that it would not hold.
    """

    module: PreTrainedModel
    limits: Ceilings
    cap_bytes: int | None
    host_bytes: int

    @property
    def device(self) -> torch.device:
        return self.module.device

    def holding(self, tokens: int) -> "Place":
        """With the cap only where one dense request of so many tokens fits below it."""
        kv = tokens * HFModel(self.module).shape.kv_bytes_per_token
        fits = weight_bytes(self.module) + kv + SLACK_BYTES <= (self.cap_bytes or 0)
        return self if fits else dataclasses.replace(self, cap_bytes=None)

    def capped(self) -> int:
        """Set the cap for all that follows in this process; bytes that are left for requests."""
        if self.device.type != "cuda":
            return GIB
        total = torch.cuda.get_device_properties(self.device).total_memory
        allowed = min(self.cap_bytes or total, total - GIB)
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        return allowed - weight_bytes(self.module) - SLACK_BYTES


def method_of(name: str, device: torch.device, **changes: Any) -> Method:
    """The preset, or a variant of one; on a CPU so small that a toy holds it."""
    name, own = VARIANTS.get(name, (name, {}))
    changes = own | changes
    if device.type == "cuda":
        return preset(name, attend_on="device", **changes)
    small: dict[str, Any] = {"budget": 48, "rank": 16}
    options = {"shadowkv": {"outlier_chunks": 1}, "a2ats": {"centroids": 16}}
    return preset(name, attend_on="device", options=options.get(name, {}), **small, **changes)


def guarded(facts: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A line with what `run` found, or with what went wrong."""
    try:
        return facts | run()
    except Exception as error:  # out of memory, most likely: others still fit
        traceback.print_exc()
        return facts | {"error": "".join(traceback.format_exception_only(error)).strip()[:500]}
    finally:
        free_memory()


def dense(place: Place, tokens: int, slots: int | None) -> dict[str, Any]:
    """Tokens a second; `slots` None takes as many as fit."""
    model = HFModel(place.module)
    each = (tokens + 1) * model.shape.kv_bytes_per_token
    slots = slots or max(1, min(2 if place.device.type == "cpu" else 512, place.capped() // each))
    place.capped()
    batch = DenseBatch(model, slots, tokens)
    found = stepped(batch.step, slots, place.device)
    return found | {"batch": slots, "way": batch.way, "ways": batch.ways, "kv_bytes": batch.nbytes}


def sparse(
    place: Place, method: Method, tokens: int, slots: int | None, hits: float, guessed: float = 0.0
) -> dict[str, Any]:
    """As `dense`, of a method whose tokens were there with the share `hits`."""
    model, left = HFModel(place.module), place.capped()
    slots = slots or most_slots(place, model, method, tokens, left)
    with Requests(model, method, slots, tokens, hits=hits, guessed=guessed) as requests:
        batch = requests.batch
        batch.step(torch.zeros(slots, dtype=torch.int64, device=place.device))  # all is missing
        first = batch.stats(0)
        found = stepped(batch.step, slots, place.device)
        last = batch.stats(0)
        hits_counted = (last.hits - first.hits) / (last.selected - first.selected)
        found |= {"hits_counted": hits_counted}
        found |= {"device_bytes": batch.nbytes}
    found |= {"batch": slots, "host_bytes": slots * host_bytes(model, method, tokens)}
    return found | bound(place, model, method, hits, found)


def most_slots(place: Place, model: HFModel, method: Method, tokens: int, left: int) -> int:
    """Requests that fit into what is left of the device, and into host memory."""
    if place.device.type == "cpu":
        return 2
    pool = pool_of(model, method, 1, 64)
    one = DeviceBatch(model, method, pool, slots=1, capacity=tokens + ROOM).nbytes
    pool.close()
    free_memory()
    return max(1, min(left // one, place.host_bytes // host_bytes(model, method, tokens)))


def host_bytes(model: HFModel, method: Method, tokens: int) -> int:
    """Of one request's rows in all layers."""
    shape = pool_shape(model, method)
    return -(-(tokens + ROOM) // shape.block_tokens) * shape.block_bytes


def bound(
    place: Place, model: HFModel, method: Method, hits: float, found: dict[str, Any]
) -> dict[str, Any]:
    """Tokens a second that the link allows, and the share of them that was reached."""
    shape = pool_shape(model, method)
    rows = shape.num_layers * shape.num_kv_heads * int(method.budget) * (1 - hits)
    fetched = round(rows) * shape.layout.row_bytes
    said: dict[str, Any] = {"fetched_bytes_per_token": fetched}
    if place.limits.host is None or not fetched or "tokens_per_s" not in found:
        return said
    most = place.limits.host / fetched
    return said | {"bound_tokens_per_s": most, "share_of_bound": found["tokens_per_s"] / most}


def stepped(step: Callable[[Tensor], Tensor], slots: int, device: torch.device) -> dict[str, Any]:
    """Times of steps, and the memory they took; on a CPU three steps and no times."""
    tokens = torch.randint(3, 200, (slots,), device=device)
    if device.type == "cpu":
        for _ in range(3):
            assert step(tokens).isfinite().all(), "logits are not finite"
        return {}
    torch.cuda.reset_peak_memory_stats()
    seconds = elapsed(lambda: step(tokens), STEPS, warm=WARM)
    if not step(tokens).isfinite().all():
        raise ArithmeticError("logits are not finite")
    times = Times.of(seconds)
    return dataclasses.asdict(times) | {
        "tokens_per_s": slots / times.median_s,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, the most wanted first."""

    contexts: tuple[int, ...]
    methods: tuple[str, ...]
    hits: tuple[float, ...]


METHODS = ("headrace", *VARIANTS, "shadowkv", "a2ats")
FULL = Plan((1 << 17, 1 << 15, 1 << 19), METHODS, (0.6, 0.0, 0.8))
SHORT = Plan((1 << 17,), METHODS, (0.6,))
TOY = Plan((1024,), METHODS, (0.6,))


def lines(where: Place, plan: Plan) -> Iterator[dict[str, Any]]:
    """Dense and sparse decode at every context: alone, and as many requests as fit."""
    for tokens in plan.contexts:
        place = where.holding(tokens)
        for slots in (1, None):
            facts = _facts(place, tokens, slots, "dense")
            yield guarded(facts, partial(dense, place, tokens, slots))
        for hits in plan.hits:
            for name in plan.methods:
                method = method_of(name, place.device)
                for slots in (1, None):
                    facts = _facts(place, tokens, slots, name) | {"hits": hits}
                    run = partial(sparse, place, method, tokens, slots, hits)
                    yield guarded(facts, run)


def _facts(place: Place, tokens: int, slots: int | None, name: str) -> dict[str, Any]:
    facts = {"part": "decode", "name": name, "tokens": tokens, "largest": slots is None}
    layers = place.module.config.num_hidden_layers
    return facts | {"cap_bytes": place.cap_bytes, "layers": layers, "slabs": "shared by all layers"}


GUESSED = 0.8  # of what a step misses, asked for by the layer before


def copies(place: Place, tokens: int, slots: int) -> Iterator[dict[str, Any]]:
    """The share of a step that copies add: against one that misses nothing, with and without
    fetching ahead for the next layer."""
    for prefetch in ("none", "layer"):
        method = method_of("headrace", place.device, prefetch=prefetch)
        facts = {"part": "copies", "name": f"prefetch {prefetch}", "tokens": tokens, "hits": 0.6}

        def run(method: Method = method) -> dict[str, Any]:
            with_copies = sparse(place, method, tokens, slots, 0.6, GUESSED)
            free_memory()
            without = sparse(place, method, tokens, slots, 1.0)
            found = {"with": with_copies, "without": without, "batch": slots}
            if "median_s" in with_copies:
                found["exposed"] = 1 - without["median_s"] / with_copies["median_s"]
            return found

        yield guarded(facts, run)
