"""The kernel table: every kernel checked against its definition, then timed, in one line each."""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from gpu_bench import attending, choosing, newest, rows, scoring
from gpu_bench.timing import Ceilings, free_memory
from gpu_bench.trial import Case, Sizes, checked, measure, real, toy

# name -> (module that it measures, inputs). Several lines may measure one kernel.
CASES: Mapping[str, tuple[str, Case]] = {
    "score_codes": ("retrieval.kernels.score_codes", scoring.codes),
    "score_rows, landmarks of 8": ("retrieval.kernels.score_rows", scoring.rows(1, 8)),
    "score_rows, pages of 16": ("retrieval.kernels.score_rows", scoring.rows(2, 16)),
    "score_rows, keys": ("retrieval.kernels.score_rows", scoring.rows(1, 1)),
    "score_lookup, VQ 4096": ("retrieval.kernels.score_lookup", scoring.lookup(1, 4096)),
    "score_lookup, PQ 16x8": ("retrieval.kernels.score_lookup", scoring.lookup(16, 256)),
    "tables": ("retrieval.kernels.tables", scoring.byte_tables),
    "encode": ("retrieval.kernels.encode", scoring.new_codes),
    "group": ("retrieval.kernels.group", choosing.grouped),
    "choose": ("retrieval.kernels.choose", choosing.best),
    "resolve": ("kvstore.kernels.resolve", choosing.resolved),
    "gather": ("kvstore.kernels.gather", rows.fetched),
    "append": ("kvstore.kernels.append", rows.appended),
    "rebuild": ("engine.kernels.rebuild", rows.rebuilt),
    "attend_slots": ("engine.kernels.attend_slots", attending.chosen),
    "merge_parts": ("engine.kernels.merge_parts", attending.merged),
    "tail": ("engine.kernels.tail", attending.estimated),
    "tail, with attend_slots": ("engine.kernels.tail", attending.whole),
    "attend_runs": ("engine.kernels.attend_runs", attending.scattered),
    "norm_rows": ("engine.kernels.norm_rows", newest.normed),
    "rotate_rows": ("engine.kernels.rotate_rows", newest.rotated),
    "append_tail": ("engine.kernels.append_tail", newest.summarised),
    "append_unit": ("retrieval.kernels.append_unit", newest.landmarked),
}
WITHIN = {"retrieval.kernels.cut": "choose"}  # modules that a line of another measures
BATCHES = (1, 8)
ALONE = {"attend_runs"}  # of one prompt, whatever the batch
TARGETS = {"score_": 0.80, "gather": 0.85, "attend_slots": 0.70}  # share of what a copy reaches


def lines(
    device: torch.device, names: Sequence[str], limits: Ceilings, *, rounds: int
) -> Iterator[dict[str, Any]]:
    """One line for each kernel and batch; a kernel that fails says so in its own."""
    sizes_of = real if device.type == "cuda" else toy
    for name in names:
        for batch in BATCHES[:1] if name in ALONE else BATCHES:
            sizes = sizes_of(batch, device)
            yield _line(name, sizes, lambda case, s: measure(case, s, limits, rounds))
        _forget()


def checked_only(device: torch.device, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One line for each kernel at toy sizes, compared with its definition and not timed."""
    for name in names:
        yield _line(name, toy(BATCHES[-1], device), _agrees)
        _forget()


def _forget() -> None:
    for cached in (rows.slab, choosing.walk, scoring.faiss_search):
        cached.cache_clear()
    free_memory()


def _line(
    name: str, sizes: Sizes, found: Callable[[Case, Sizes], dict[str, Any]]
) -> dict[str, Any]:
    module, case = CASES[name]
    line: dict[str, Any] = {"part": "kernels", "name": name, "module": module}
    line |= {"batch": sizes.batch}
    line |= {"tokens": sizes.tokens, "heads": [sizes.query_heads, sizes.heads]}
    line |= {"head_dim": sizes.dim, "dtype": str(sizes.dtype).removeprefix("torch.")}
    try:
        line |= found(case, sizes)
    except Exception as error:  # one kernel's fault hides no other's figures
        traceback.print_exc()
        return line | {"error": "".join(traceback.format_exception_only(error)).strip()[:500]}
    target = next((share for start, share in TARGETS.items() if name.startswith(start)), None)
    if target is not None and "share_of_copy" in line:
        line |= {"target": target, "reached": line["share_of_copy"] >= target}
    return line


def _agrees(case: Case, sizes: Sizes) -> dict[str, Any]:
    wrong = checked(case(sizes))
    return {"agrees": True} if wrong is None else {"error": f"differs from its definition: {wrong}"}
