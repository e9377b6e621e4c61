"""Loop three: a prompt of reused parts, of which some are computed afresh."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.blend.active import Active
from engine.blend.policies import Boundary, Budget, Policy
from engine.blend.probe import Probe, probe_cost
from engine.blend.reuse import Reuse
from engine.cache import Cache
from engine.loading import Loader
from engine.model.pieces import Model, kv_depth
from engine.slices import Slices, drained

PROBE = 0.75  # of what may be computed, for finding out what is worth it


def affordable(model: Model, reuse: Reuse, policy: Policy, budget: Budget) -> Policy:
    """The policy; or the repair of boundaries, where its probe would take nearly all there is.

    A probe computes all tokens that have no KV. They are many where the question is long, or the
    instructions, and would leave next to nothing to repair with.
    """
    if not policy.probe or budget.whole or probe_cost(model, reuse) <= PROBE * budget.left:
        return policy
    return Boundary()


def blend(
    model: Model,
    cache: Cache,
    tokens: Int[Tensor, " N"],
    reuse: Reuse,
    loader: Loader,
    policy: Policy,
    budget: Budget,
) -> Float[Tensor, " vocab"]:
    """Fill `cache` with the whole prompt; returns the logits after its last token."""
    return drained(blend_layers(model, cache, tokens, reuse, loader, policy, budget))


def blend_layers(
    model: Model,
    cache: Cache,
    tokens: Int[Tensor, " N"],
    reuse: Reuse,
    loader: Loader,
    policy: Policy,
    budget: Budget,
) -> Slices[Float[Tensor, " vocab"]]:
    """As `blend`, a layer a slice.

    A layer's stored KV is in place before the layer starts. What is computed afresh replaces it,
    and attends to all of its own past, stored or fresh, and to nothing else. Where a policy
    narrows its choice, the blocks left out keep what the layers so far made of them.
    """
    relevance = reuse.nothing
    if policy.probe and not budget.whole:
        relevance = Probe(model, cache, reuse, loader).relevance(tokens)
        cost = probe_cost(model, reuse)
        budget.charge(cost)
        yield cost // len(model.layers)
    blocks = reuse.everything if budget.whole else policy.first(reuse, budget, relevance)
    active = Active(model, reuse, reuse.active(blocks))
    x, last = model.embed(tokens[active.positions]), kv_depth(model) - 1
    for i, layer in enumerate(model.layers):
        if layer.owns:
            loader.wait(layer.owner)
        budget.charge(active.repaired)
        fresh, kv = layer.qkv(x), cache.view(layer.owner, len(tokens))
        if layer.owns:
            cache.observe(layer.owner, fresh.q)
        q, k = active.rotate(layer, fresh.q), active.rotate(layer, fresh.k)
        rows = None
        if i == last:  # behind its KV only the logits are needed
            rows = torch.tensor([len(x) - 1], device=x.device)
        elif layer.owns and layer.owner == policy.check and not budget.whole:
            deviation = active.deviation(fresh.v, kv)
            rows = active.rows(blocks & policy.keep(reuse, budget, relevance, deviation))
        active.write(layer, cache, kv, fresh, k)
        if rows is not None:
            active, x, q = active.take(rows), x[rows], q[:, rows]
        yield len(fresh.q[0]) // len(model.layers)
        x = layer.finish(x, active.attend(layer, q, kv))
    cache.advance(len(tokens))
    return model.logits(x)[0]
