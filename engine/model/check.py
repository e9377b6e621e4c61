"""The load-time check: pieces that do not reproduce the model's own forward are refused."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from engine.attention import attend_chunk, attend_token
from engine.errors import ModelError
from engine.kernels.project import project_native, serves
from engine.model.hf import AnyLayer, HFModel, layer_types
from engine.model.rope import Rope
from kvstore.block import LayerKV

TOKENS = 64  # at least; more where a sliding window would not show, up to:
MOST_TOKENS = 256
BF16 = 2**-7  # of the largest value: a product rounded to bf16
TOLERANCE = 1e-4  # of the largest value: fp32 noise is below 1e-5, a wrong piece above 1e-3


@torch.inference_mode()
def check(model: HFModel) -> None:
    """Run the model's own forward once, in fp32, and compare every piece on the way.

    Each layer gets the input that the model's forward gives it, so an error is found where it
    is and does not add up. Weights of another dtype are widened one module at a time.

    Raises:
        ModelError: naming the first piece that differs, and by how much.
    """
    for rope, kind in zip((x.rope for x in model.layers), layer_types(model.config), strict=True):
        _check_rope(model, rope, kind)
    _check_product(model.module.lm_head.weight)
    tables, around = model.around
    known = min(table.num_embeddings for table in tables)  # tokens that all tables have
    ids = torch.arange(_tokens(model), device=model.shape.device) * 7919 % known
    reference = model.module
    with ExitStack() as stack:
        stack.enter_context(_eager(reference))
        for table in tables:
            stack.enter_context(_widened(table, only_output=True))
        for module in around:
            stack.enter_context(_fp32(module))
        trip = Trip(model.embed(ids))
        for i, layer in enumerate(model.layers):
            stack.enter_context(_compared(i, layer, trip))
        for head in (reference.model.norm, reference.lm_head):
            stack.enter_context(_widened(head))
        want = reference(input_ids=ids[None], use_cache=False).logits[0]
        with _fp32(reference.model.norm), _fp32(reference.lm_head):
            _compare("logits", model.logits(trip.x), want)


@dataclass(slots=True)
class Trip:
    """What is known on the way through the layers of the model's own forward.

    Args:
        x: the last layer's output; before the first one, our embeddings.
        kv: what layers that make KV leave for those that share it, by its number.
    """

    x: Float[Tensor, "N E"]
    kv: dict[int, LayerKV] = field(default_factory=dict)


def _tokens(model: HFModel) -> int:
    """Enough that the shortest sliding window cuts something off, where that is affordable."""
    needed = [x.attention.window + 16 for x in model.layers if x.attention.window]
    longest = min(MOST_TOKENS, model.shape.max_positions)
    return max(min(TOKENS, longest), *[n for n in needed if n <= longest], 0)


def _check_rope(model: HFModel, rope: Rope, kind: str | None) -> None:
    """Cosines and sines at far positions, where a wrong frequency or scaling shows."""
    last = min(model.shape.max_positions, rope.max_positions or model.shape.max_positions) - 1
    device = model.shape.device
    positions = torch.tensor([0, 1, last // 7, last // 2, last], device=device)
    rotary = model.module.model.rotary_emb
    args = () if hasattr(rotary, "inv_freq") else (kind,)
    like = torch.empty(1, dtype=torch.float32, device=device)
    cos, sin = (x[0] for x in rotary(like, positions[None], *args))
    table, half = rope.table(positions), len(rope.inv_freq)
    noise = 2**-22 * last * float(rope.inv_freq.max())  # theirs: angles rounded to fp32
    for ours, theirs in ((table.cos, cos), (table.sin, sin)):
        worst = float((ours - theirs[:, :half].float()).abs().max())
        if not worst <= TOLERANCE + noise:
            raise ModelError(
                f"RoPE is not reproduced: cosines and sines up to position {last} differ by "
                f"{worst:.2g}; this model cannot be served"
            )


def _check_product(weight: Tensor) -> None:
    """The compiled product that decode takes, where it takes one, on some of the weights."""
    some = weight[:1024].contiguous()
    if serves(some[:1], some):
        ours, theirs = project_native(some[:1], some).float(), some[:1].float() @ some.float().T
        _compare("the product of few rows", ours, theirs, BF16)


@contextmanager
def _compared(index: int, layer: AnyLayer, trip: Trip) -> Iterator[None]:
    """Compare one layer with its module, on whatever the module is called with."""
    with _widened(layer.module):

        def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = layer.given(args, kwargs, trip.x)
            _compare(f"the input of layer {index}", trip.x, x)
            want = layer.made(output, x)
            _compare(f"layer {index}", _run(layer, x, trip) - x, want - x)
            trip.x = want

        hook = layer.module.register_forward_hook(compare, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            hook.remove()


def _run(layer: AnyLayer, x: Float[Tensor, "N E"], trip: Trip) -> Float[Tensor, "N E"]:
    """One layer over a prompt; the last token goes the way of decode."""
    q, k, v = layer.qkv(x)
    table = layer.rope.table(torch.arange(len(x), device=x.device))
    q = layer.rope.rotate(q, table)
    if layer.owns:
        trip.kv[layer.owner] = LayerKV(layer.rope.rotate(k, table), v)
    k, v = trip.kv[layer.owner]
    heads = attend_chunk(q, k, v, layer.attention)
    k, v = k.contiguous(), v.contiguous()  # as they lie in a cache
    heads[:, -1] = attend_token(q[:, -1], k, v, layer.attention)
    return layer.finish(x, heads)


def _compare(name: str, ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    worst = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    if not worst <= tolerance:  # NaN is refused too
        raise ModelError(
            f"{name} is not reproduced: it differs from the model's own forward by {worst:.2g} of "
            f"its largest value (allowed: {tolerance:g}); this model cannot be served"
        )


@contextmanager
def _widened(module: nn.Module, *, only_output: bool = False) -> Iterator[None]:
    """While inside, `module` computes in fp32 whenever it is called, and is narrow between."""
    if only_output:
        handles = [module.register_forward_hook(lambda _, __, out: out.float())]
    else:
        saved: list[list[tuple[Tensor, Tensor]]] = []
        handles = [
            module.register_forward_pre_hook(lambda m, _: saved.append(_widen(m))),
            module.register_forward_hook(lambda *_: _restore(saved.pop()), always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _fp32(module: nn.Module) -> Iterator[None]:
    saved = _widen(module)
    try:
        yield
    finally:
        _restore(saved)


def _widen(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Make every weight fp32 in place; returns what `_restore` needs. The bits are kept."""
    weights = [*module.parameters(), *module.buffers()]
    saved = [(w, w.data) for w in weights if w.is_floating_point() and w.dtype != torch.float32]
    for weight, _ in saved:
        weight.data = weight.data.float()
    return saved


def _restore(saved: list[tuple[Tensor, Tensor]]) -> None:
    for weight, data in saved:
        weight.data = data


@contextmanager
def _eager(module: Any) -> Iterator[None]:
    """The plain attention of `transformers`: the only one that caps scores where a model does."""
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)
