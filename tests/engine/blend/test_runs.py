"""Scattered queries against the plain definition of causal attention."""

import pytest
import torch

from engine import attention
from engine.blend import runs
from engine.blend.runs import Runs
from engine.model.pieces import AttentionSpec

SPECS = {
    "plain": AttentionSpec(0.3),
    "window": AttentionSpec(0.3, window=9),
    "softcap": AttentionSpec(0.3, softcap=2.0),
    "window and softcap": AttentionSpec(0.3, softcap=2.0, window=30),
}


def plain(q, k, v, positions, spec):
    """One query at a time over the keys that it may see."""
    rows, group = [], len(q) // len(k)
    for row, position in enumerate(positions.tolist()):
        first = 0 if spec.window is None else max(0, position - spec.window + 1)
        seen = slice(first, position + 1)
        keys, values = (x.repeat_interleave(group, 0)[:, seen].double() for x in (k, v))
        scores = (keys @ q[:, row].double()[..., None])[..., 0] * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * (scores / spec.softcap).tanh()
        rows.append((scores.softmax(-1)[:, None] @ values)[:, 0])
    return torch.stack(rows, 1)


def inputs(count, positions, heads=(6, 2)):
    torch.manual_seed(count)
    q, k = torch.randn(heads[0], len(positions), 16), torch.randn(heads[1], count, 16)
    return q, k, torch.randn_like(k)


POSITIONS = {
    "one": [126],
    "first": [0],
    "all": list(range(127)),
    "runs": [*range(16), *range(40, 56), *range(60, 61), *range(99, 127)],
    "apart": [0, 3, 50, 51, 90, 126],
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("span", [1, 7, 512])
def test_each_query_sees_its_own_past_and_nothing_else(monkeypatch, spec, where, span):
    monkeypatch.setattr(runs, "SPAN", span)
    positions = torch.tensor(POSITIONS[where])
    q, k, v = inputs(127, positions)
    got = Runs(positions, q.dtype).attend(q, k, v, SPECS[spec])
    want = plain(q, k, v, positions, SPECS[spec]).float()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("most", [1, 127 * 60, 127 * 250, 1 << 24])
def test_heads_are_taken_together_as_far_as_memory_allows(monkeypatch, spec, heads, most):
    positions = torch.tensor(POSITIONS["runs"])
    q, k, v = inputs(127, positions, heads)
    ours = Runs(positions, q.dtype)
    monkeypatch.setattr(runs, "MASK_ELEMENTS", most)
    got = ours.attend(q, k, v, SPECS[spec])
    want = plain(q, k, v, positions, SPECS[spec]).float()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_no_mask_and_no_scores_of_all_heads_are_larger_than_a_mask_may_be(monkeypatch, spec):
    most, taken = 127 * 40, []
    sdpa, caps = attention.F.scaled_dot_product_attention, attention.capped

    def with_mask(*args, attn_mask, **more):
        taken.append(attn_mask.numel())
        return sdpa(*args, attn_mask=attn_mask, **more)

    def with_scores(scores, softcap):
        taken.append(scores.numel())
        return caps(scores, softcap)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", with_mask)
    monkeypatch.setattr(attention, "capped", with_scores)
    monkeypatch.setattr(runs, "MASK_ELEMENTS", most)
    positions = torch.arange(127)
    q, k, v = inputs(127, positions)
    Runs(positions, q.dtype).attend(q, k, v, SPECS[spec])
    assert taken
    assert max(taken) <= most


def test_masks_are_made_once_unless_they_are_large(monkeypatch):
    positions = torch.arange(0, 300, 2)
    q, k, v = inputs(300, positions)
    made = []
    group = Runs._group
    monkeypatch.setattr(Runs, "_group", lambda *x: made.append(1) or group(*x))
    for most, calls in ((1 << 24, 1), (4000, 2)):
        monkeypatch.setattr(runs, "MASK_ELEMENTS", most)
        here, masks = Runs(positions, q.dtype), []
        for _ in range(2):
            made.clear()
            out = here.attend(q, k, v, SPECS["plain"])
            masks.append(len(made))
        assert (masks[1] > 0) == (calls == 2)
        want = plain(q, k, v, positions, SPECS["plain"]).float()
        torch.testing.assert_close(out, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_in_bf16_the_error_is_at_most_twice_that_of_torch(spec):
    positions = torch.tensor(POSITIONS["runs"])
    q, k, v = (x.bfloat16() for x in inputs(127, positions))
    exact = plain(q, k, v, positions, SPECS[spec])
    got = Runs(positions, q.dtype).attend(q, k, v, SPECS[spec])
    rounded = exact.bfloat16().double() - exact
    assert (got.double() - exact).abs().max() <= 2 * max(rounded.abs().max(), 2**-8)
