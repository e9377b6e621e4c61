"""Attention of one token per request over its whole context: what is selected, and an estimate.

    out, lse = `attend_slots` of the selected rows, merged with `estimate_tail` of all else

The parts of both are merged at once: three launches where each by itself, and then both, take
seven. Nothing is rounded but the result.
"""

import torch
from jaxtyping import Float, Float32, Int32, UInt8
from torch import Tensor

from engine.kernels import attend_slots, tail
from engine.kernels.merge_parts import Partials, empty_parts, merge_parts_torch, merged
from kvstore.rows import RowLayout
from native.gpu import on_gpu


def attend_whole(
    q: Float[Tensor, "B Hq D"],
    summaries: Float32[Tensor, "B Hk C F"],
    lengths: Int32[Tensor, " B"],
    ids: Int32[Tensor, "B Hk K"],
    hot: UInt8[Tensor, "B Hk S row"],
    slots: Int32[Tensor, "B Hk K"],
    layout: RowLayout,
    cluster: int,
    scale: float,
    softcap: float | None = None,
) -> Partials:
    """Attention over every token; arguments are those of `estimate_tail`."""
    run = attend_whole_torch
    if on_gpu(q, summaries, lengths, ids, hot, slots):
        run = attend_whole_triton
    return run(q, summaries, lengths, ids, hot, slots, layout, cluster, scale, softcap)


def attend_whole_torch(
    q: Float[Tensor, "B Hq D"],
    summaries: Float32[Tensor, "B Hk C F"],
    lengths: Int32[Tensor, " B"],
    ids: Int32[Tensor, "B Hk K"],
    hot: UInt8[Tensor, "B Hk S row"],
    slots: Int32[Tensor, "B Hk K"],
    layout: RowLayout,
    cluster: int,
    scale: float,
    softcap: float | None = None,
) -> Partials:
    """The definition."""
    part = attend_slots.attend_slots_torch(q, hot, slots, layout, scale, softcap)
    rest = tail.estimate_tail_torch(
        q, summaries, lengths, ids, hot, slots, layout, cluster, scale, softcap
    )
    outs, lses = (torch.stack(pair) for pair in zip(part, rest, strict=True))
    return merge_parts_torch(outs, lses)


def attend_whole_triton(
    q: Float[Tensor, "B Hq D"],
    summaries: Float32[Tensor, "B Hk C F"],
    lengths: Int32[Tensor, " B"],
    ids: Int32[Tensor, "B Hk K"],
    hot: UInt8[Tensor, "B Hk S row"],
    slots: Int32[Tensor, "B Hk K"],
    layout: RowLayout,
    cluster: int,
    scale: float,
    softcap: float | None = None,
) -> Partials:
    """The same by the kernels of both, and one that merges their parts."""
    chosen = attend_slots.parts_of(slots)[0]
    made = empty_parts(q, chosen + tail.parts_of(summaries)[0])
    part, rest = (Partials(*(x[own] for x in made)) for own in (slice(chosen), slice(chosen, None)))
    attend_slots.attend_parts(q, hot, slots, layout, scale, softcap, part)
    tail.estimate_parts(
        q, summaries, lengths, ids, hot, slots, layout, cluster, scale, softcap, rest
    )
    return merged(made, q.dtype)
