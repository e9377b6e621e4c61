"""The figures that matter, out of the lines that were measured; None, with a reason, for others."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

Line = dict[str, Any]
HITS = 0.6
CONTEXT = 1 << 17


class Lacking(Exception):
    """A figure that the lines do not give; says why."""


def measured(
    lines: Sequence[Line], parts: Collection[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures of these parts, and the reasons for those that are None."""
    figures: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for name, (part, find) in FIGURES.items():
        if part not in parts:
            continue
        try:
            figures[name] = find(lines)
        except Lacking as lacking:
            figures[name], reasons[name] = None, str(lacking)
    return figures, reasons


def one(lines: Sequence[Line], part: str, wanted: Sequence[str] = (), **facts: Any) -> Line:
    """The line of a part with these facts, which must have the `wanted` fields."""
    mine = [line for line in lines if line["part"] == part]
    found = [line for line in mine if all(line.get(k) == v for k, v in facts.items())]
    if not found:
        whole = [line for line in mine if line.get("name") == "all" and "error" in line]
        said = whole[0]["error"] if whole else "not reached in the time there was"
        raise Lacking(f"{part} {facts or ''}: {said}")
    line = found[-1]  # of comparisons the last one knows most
    if "error" in line:
        raise Lacking(f"{part} {line.get('name')}: {line['error']}")
    if missing := [field for field in wanted if field not in line]:
        raise Lacking(f"{part} {line.get('name')}: no {', '.join(missing)}")
    return line


def share(kernel: str) -> Callable[[Sequence[Line]], float]:
    """Of what a large copy reaches, at the largest batch."""

    def find(lines: Sequence[Line]) -> float:
        wanted = ["share_of_copy"]
        return float(one(lines, "kernels", wanted, name=kernel, batch=8)["share_of_copy"])

    return find


def decode(lines: Sequence[Line], name: str) -> dict[str, float | None]:
    """A method against dense at 128k: throughput and batch at the largest of each, and alone.

    The largest batches follow from the cap on memory: dense is held by it, ours by the host's.
    """
    facts = {"tokens": CONTEXT, "largest": True}
    wanted = ["tokens_per_s", "batch", "median_s", "cap_bytes"]
    theirs = one(lines, "decode", wanted, name="dense", **facts)
    ours = one(lines, "decode", [*wanted, "share_of_bound"], name=name, hits=HITS, **facts)
    alone = facts | {"largest": False}
    single = one(lines, "decode", wanted, name=name, hits=HITS, **alone)
    dense = one(lines, "decode", wanted, name="dense", **alone)
    return {
        "throughput_over_dense": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "batch_over_dense": ours["batch"] / theirs["batch"],
        "share_of_bound": ours["share_of_bound"],
        "latency_over_dense_alone": single["median_s"] / dense["median_s"],
        "cap_bytes": ours["cap_bytes"],  # of device memory, of both; None for the whole card
    }


def prefill(lines: Sequence[Line]) -> dict[str, float]:
    """Seconds over those of the fastest dense prefill, by method."""
    return dict(one(lines, "prefill", ["over_dense"], name="compared")["over_dense"])


def blend(lines: Sequence[Line]) -> float:
    """How many times as fast to the first token as the faster full prefill."""
    line = one(lines, "blend", ["faster", "headline"], name="compared")
    if line["headline"] not in line["faster"]:
        raise Lacking(f"blend: {line['headline']} was not measured")
    return float(line["faster"][line["headline"]])


def exposed(lines: Sequence[Line]) -> float:
    """The share of a step that copies add, in the better of two ways to fetch."""
    found = [x["exposed"] for x in lines if x["part"] == "copies" and "exposed" in x]
    if not found:
        one(lines, "copies", ["exposed"])
        raise Lacking("copies: not timed")
    return float(min(found))


FIGURES: dict[str, tuple[str, Callable[[Sequence[Line]], Any]]] = {
    "scoring_share_of_copy": ("kernels", share("score_codes")),
    "gather_share_of_copy": ("kernels", share("gather")),
    "attend_share_of_copy": ("kernels", share("attend_slots")),
    "decode_128k": ("decode", partial(decode, name="headrace")),
    "decode_128k_int8": ("decode", partial(decode, name="headrace, int8")),
    "prefill_over_dense": ("prefill", prefill),
    "blend_faster": ("blend", blend),
    "exposed_copies": ("copies", exposed),
}
