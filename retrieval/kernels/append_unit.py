"""The newest key of each slot of a batch, taken into its unit's row: a mean, bounds, or itself.

    open[b, h, p mod N] = key[b, h]                                          p = positions[b]
    rows[b, h, p // N]  = mean, or max | min, of open[b, h, 0 .. p mod N];   N = 1: the key

A mean is summed in fp32 in the order of tokens and rounded once, as `retrieval.landmarks` does.

    open [B, Hk, N, D]: keys of the unit that is not full     rows [B, Hk, U, D or 2 D]

One program of one warp a KV head. In torch each of these operations is a launch, on as few numbers.
"""

from collections.abc import Callable, Mapping
from typing import Literal, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from native.gpu import Build, on_gpu

Form = Literal["mean", "bounds", "key"]


def append_unit(
    keys: Float[Tensor, "B Hk D"],
    positions: Int32[Tensor, " B"],
    waiting: Float[Tensor, "B Hk N D"],
    rows: Float[Tensor, "B Hk U E"],
    form: Form,
) -> None:
    """Take in one key a slot; nothing where its position is negative.

    The tokens before it must be there.

    Args:
        waiting: `open`, contiguous as are `rows`, and of their dtype.
    """
    run = append_unit_triton if on_gpu(keys, positions, waiting, rows) else append_unit_torch
    run(keys, positions, waiting, rows, form)


def append_unit_torch(
    keys: Float[Tensor, "B Hk D"],
    positions: Int32[Tensor, " B"],
    waiting: Float[Tensor, "B Hk N D"],
    rows: Float[Tensor, "B Hk U E"],
    form: Form,
) -> None:
    """The definition."""
    slots, there = torch.arange(len(keys), device=keys.device), (positions >= 0)[:, None, None]
    position, size = positions.clamp(min=0).long(), waiting.shape[2]
    unit, place = position // size, position % size
    waiting[slots, :, place] = keys.where(there, waiting[slots, :, place])
    row = summarised(waiting, place + 1, form)
    rows[slots, :, unit] = row.where(there, rows[slots, :, unit])


def summarised(
    keys: Float[Tensor, "B Hk N D"], count: Int64[Tensor, " B"], form: Form
) -> Float[Tensor, "B Hk E"]:
    """The row of a unit's keys, of which the first `count[b]` are there."""
    there = torch.arange(keys.shape[2], device=keys.device) < count[:, None]
    return FORMS[form](keys, there[:, None, :, None])


def _mean(keys: Tensor, there: Tensor) -> Tensor:
    total = keys.float().where(there, 0.0).sum(2)
    return (total / there.sum(2)).to(keys.dtype)


def _bounds(keys: Tensor, there: Tensor) -> Tensor:
    """All maxima, then all minima, as `quest.bounds` does."""
    high = keys.where(there, -torch.inf).amax(2)
    return torch.cat([high, keys.where(there, torch.inf).amin(2)], -1)


def _key(keys: Tensor, there: Tensor) -> Tensor:
    return keys[:, :, 0]


FORMS: Mapping[Form, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "bounds": _bounds,
    "key": _key,
}


def append_unit_triton(
    keys: Float[Tensor, "B Hk D"],
    positions: Int32[Tensor, " B"],
    waiting: Float[Tensor, "B Hk N D"],
    rows: Float[Tensor, "B Hk U E"],
    form: Form,
) -> None:
    """The same by the kernel."""
    assert waiting.is_contiguous(), "numbers lie side by side"
    assert rows.is_contiguous(), "numbers lie side by side"
    batch, heads, size, dim = waiting.shape
    _append_unit[(heads, batch)](
        *(keys.contiguous(), positions, waiting, rows, rows.shape[2]),
        **_constants(dim, size, form),
        num_warps=1,
    )


def _constants(dim: int, size: int, form: Form) -> dict[str, object]:
    return {"D": dim, "DP": triton.next_power_of_2(dim), "N": size, "FORM": form}


@triton.jit
@no_type_check
def _append_unit(
    keys, positions, waiting, rows, units,
    D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """The unit of one KV head of one slot."""
    b, d = tl.program_id(1), tl.arange(0, DP)
    head = (b * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    position = tl.load(positions + b)
    if position < 0:
        return
    unit, place = position // N, position % N
    key = tl.load(keys + head * D + d, mask=d < D, other=0.0)
    waiting += head * N * D
    tl.store(waiting + place * D + d, key, mask=d < D)
    row = rows + (head * units + unit) * (2 * D if FORM == "bounds" else D)
    if FORM == "key":
        tl.store(row + d, key, mask=d < D)
    else:
        newest = key.to(tl.float32)
        high, low = newest, newest
        total = tl.zeros_like(newest)
        for n in tl.static_range(N):
            before = (d < D) & (n < place)
            other = tl.load(waiting + n * D + d, mask=before, other=0.0).to(tl.float32)
            if FORM == "mean":
                total += other
            else:
                most = tl.maximum(high, other, propagate_nan=tl.PropagateNan.ALL)
                least = tl.minimum(low, other, propagate_nan=tl.PropagateNan.ALL)
                high, low = tl.where(before, most, high), tl.where(before, least, low)
        if FORM == "mean":
            count = (place + 1).to(tl.float32)
            mean = tl.div_rn(total + newest, tl.zeros_like(total) + count)
            tl.store(row + d, mean.to(rows.dtype.element_ty), mask=d < D)
        else:
            tl.store(row + d, high.to(rows.dtype.element_ty), mask=d < D)
            tl.store(row + D + d, low.to(rows.dtype.element_ty), mask=d < D)


def _build(dtype: str, dim: int, size: int, form: Form) -> Build:
    constants = _constants(dim, size, form)
    signature = dict.fromkeys(("keys", "waiting", "rows"), dtype)
    signature |= {"positions": "*i32", "units": "i32"} | dict.fromkeys(constants, "constexpr")
    name = f"append_unit, {form} of {size}, {dtype}, D={dim}"
    return Build(name, _append_unit, signature, constants, num_warps=1)


AOT: list[Build] = [
    _build("*bf16", 128, 8, "mean"),
    _build("*bf16", 128, 16, "bounds"),
    _build("*fp16", 80, 1, "key"),
    _build("*fp32", 256, 16, "bounds"),
]
