"""The default index: close to exact scores, and where it is no shortcut, equal to them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from native import library as native
from retrieval.axes import Axes, groups
from retrieval.index import KVIndex, NotRelocatable
from retrieval.kernels.scan import SOURCE
from retrieval.pending import products
from retrieval.scalar import LEVELS, ScalarIndex, encoded, levels, patterns
from retrieval.select import Policy, top_tokens

SIZES = [(1, 1, 64), (2, 4, 128), (4, 1, 80), (1, 8, 96), (2, 2, 192), (2, 3, 256)]  # Hk, G, D


def tensors(hk, g, d, t, seed=0, offset=3.0):
    """Keys around a mean, and queries."""
    generator = torch.Generator().manual_seed(seed)
    mean = offset * torch.randn(hk, 1, d, generator=generator)
    keys = torch.randn(hk, t, d, generator=generator) + mean
    return torch.randn(hk * g, d, generator=generator), keys


def built(keys, **settings):
    index = ScalarIndex(len(keys), keys.shape[2], keys.dtype, **settings)
    index.append(keys)
    index.finalize()
    return index


def scattered(t=8192, d=128, g=4):
    """Gaussian keys around a mean, and one hot token in each of 150 chunks of 8."""
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(1, d, generator=generator)
    chunks = torch.randperm(t // 8, generator=generator)[:150]
    hot = chunks * 8 + torch.randint(0, 8, (150,), generator=generator)
    keys = torch.randn(1, t, d, generator=generator)
    keys[0, hot] += torch.linspace(4, 8, 150)[:, None] * query / query.norm()
    queries = query + 0.3 * torch.randn(g, d, generator=generator)
    return queries, keys + 2 * torch.randn(d, generator=generator)


def decoded(found, axes):
    """The keys, less their mean, that codes stand for."""
    codes, parts, at = found.codes.long(), [], 0
    for start, stop, bits in groups(axes.sizes):
        count = (stop - start) * bits // 4
        parts.append(patterns(bits)[codes[..., at : at + count]].flatten(-2))
        at += count
    rows = torch.cat(parts, -1) * axes.spread[:, None] * found.scales.float()[..., None]
    return rows @ axes.basis.mT


def mass(query, keys, ids):
    """Attention on the tokens that were taken."""
    p = (products(query, keys) * query.shape[1] ** -0.5).softmax(-1).unflatten(0, (len(keys), -1))
    return torch.stack([p[h][:, ids[h]].sum(-1) for h in range(len(keys))])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_levels_are_where_lloyds_iteration_stays(bits):
    table = levels(bits).double()
    edges = torch.cat([torch.tensor([-math.inf]), (table[1:] + table[:-1]) / 2, -table[:1] * 1e9])
    density = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi)
    below = (1 + torch.erf(edges / math.sqrt(2))) / 2
    means = -density.diff() / below.diff()  # of a Gaussian between two edges
    torch.testing.assert_close(table, means, rtol=0, atol=1e-4)


def test_a_pattern_is_the_levels_of_its_digits():
    assert torch.equal(patterns(4)[:, 0], levels(4))
    two = levels(2)
    assert torch.equal(patterns(2)[0b1001], two[[1, 2]])
    one = levels(1)
    assert torch.equal(patterns(1)[0b0110], one[[0, 1, 1, 0]])


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("hk", "g", "d"), SIZES)
def test_scores_are_close_to_exact_ones(bits, hk, g, d):
    error = {1: 0.9, 2: 0.45, 4: 0.15}[bits]  # of what keys differ by
    for t in (1, 127, 300):
        query, keys = tensors(hk, g, d, t)
        index = built(keys, bits=bits)
        assert isinstance(index, KVIndex)
        got, want = index.score(query), products(query, keys)
        assert got.shape == (hk * g, t)
        assert (got - want).square().mean().sqrt() <= error * math.sqrt(d)
        assert index.search(query, Policy(20), 0.1).shape == (hk, min(20, t))


def test_more_bits_err_less():
    query, keys = tensors(2, 4, 128, 2000)
    want = products(query, keys)
    found = [(built(keys, bits=b).score(query) - want).square().mean().sqrt() for b in LEVELS]
    assert found[0] > 1.7 * found[1] > 1.7 * 2.5 * found[2]


def test_the_score_of_a_key_with_itself_is_exact():
    _, keys = tensors(1, 1, 128, 200, offset=0.0)
    for subspaces in (32, 64, 128):
        axes = Axes.fit(keys, subspaces)
        if sum(axes.sizes) < 128:  # what has no bits cannot be known
            keys = keys @ axes.basis @ axes.basis.mT
        rows = decoded(encoded(keys, axes), axes)
        want = keys.square().sum(-1)
        torch.testing.assert_close((rows * keys).sum(-1), want, rtol=1e-3, atol=0)


def test_keys_at_levels_are_coded_without_loss():
    table = levels(2)
    generator = torch.Generator().manual_seed(0)
    digits = torch.stack([torch.randperm(128, generator=generator) % 4 for _ in range(50)])
    keys = table[digits][None] * torch.linspace(0.5, 4, 50)[:, None]  # unit variance, nearly
    axes = Axes(torch.eye(128)[None], torch.ones(1, 128), (0, 128, 0))
    torch.testing.assert_close(decoded(encoded(keys, axes), axes), keys, rtol=2e-3, atol=0)


def test_keys_of_few_directions_are_coded_finer_with_as_many_bytes():
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(2, 128, 128, generator=generator)).Q
    white = torch.randn(2, 2000, 128, generator=generator)
    falling = torch.arange(1, 129).rsqrt()
    steep = white * (falling / falling.square().mean().sqrt()) @ turn  # as long as white ones
    errors = []
    for keys in (white, steep, steep * torch.tensor([100.0, 1.0])[:, None, None]):
        axes = Axes.fit(keys, 64)
        off = (decoded(encoded(keys, axes), axes) - keys).square().sum((1, 2))
        errors.append(off / keys.square().sum((1, 2)))
    assert (errors[0] < 0.14).all()  # 0.1175 / (1 - 0.1175): no score along a key is too small
    assert (errors[1] < 0.5 * errors[0]).all()
    torch.testing.assert_close(errors[2], errors[1], rtol=0.01, atol=0)  # whatever a head's scale


def test_scores_are_those_of_the_keys_that_codes_stand_for():
    generator = torch.Generator().manual_seed(0)
    falling = 20 * torch.arange(1, 129).rsqrt()  # groups of bits differ in spread, none has 1
    keys = torch.randn(2, 500, 128, generator=generator) * falling
    query = torch.randn(4, 128, generator=generator)
    index = built(keys)
    mean = index.state()["mean"]
    axes = Axes.from_state(index.state())
    assert len(groups(axes.sizes)) == 3
    want = products(query, decoded(encoded(keys - mean, axes), axes) + mean)
    off = (index.score(query) - want).square().mean().sqrt()
    assert off < 0.02 * want.std()  # tables of 8 bits


def test_scores_are_exact_before_finalize():
    query, keys = tensors(2, 2, 64, 300)
    index = ScalarIndex(2, 64)
    index.append(keys[:, :100])
    index.append(keys[:, 100:])
    torch.testing.assert_close(index.score(query), products(query, keys))
    ids = index.search(query, Policy(30), 0.125)
    want = top_tokens(index.score(query), Policy(30), num_kv_heads=2, length=300, scale=0.125)
    assert torch.equal(ids, want)
    index.finalize()
    with pytest.raises(RuntimeError, match="final"):
        index.finalize()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_a_search_takes_the_tokens_of_its_scores(bits, reduce):
    query, keys = tensors(2, 4, 128, 5000)
    index = built(keys, bits=bits)
    for policy in (Policy(64, reduce=reduce), Policy(700, reduce=reduce), Policy(9000)):
        got = index.search(query, policy, 128**-0.5)
        want = top_tokens(index.score(query), policy, num_kv_heads=2, length=5000, scale=128**-0.5)
        assert got.shape == want.shape
        differ = sum(len(set(a.tolist()) ^ set(b.tolist())) for a, b in zip(got, want))
        assert differ <= 4, differ  # near ties: a score has q · mean added, a search does not


def test_top_p_takes_no_more_than_it_needs():
    query, keys = scattered()
    index = built(keys)
    ids = index.search(query * 3, Policy(2000, top_p=0.5), 128**-0.5)
    assert ids.shape[1] < 300
    assert mass(query * 3, keys, ids).min() >= 0.5


def test_scattered_evidence_is_found():
    query, keys = scattered()
    budget = 8192 // 50
    exact = products(query, keys)
    best = top_tokens(exact, Policy(budget), num_kv_heads=1, length=8192, scale=128**-0.5)
    oracle = mass(query, keys, best)
    assert oracle.min() > 0.5
    least = {1: 0.8, 2: 0.95, 4: 0.99}
    for bits in LEVELS:
        ids = built(keys, bits=bits).search(query, Policy(budget), 128**-0.5)
        assert (mass(query, keys, ids) / oracle).min() >= least[bits]


def test_a_mean_of_all_keys_changes_no_id_and_is_in_the_score():
    query, keys = tensors(2, 2, 64, 1000, offset=0.0)
    shift = 20 * torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(1))
    near, far = built(keys), built(keys + shift)
    policy = Policy(100)
    got, want = far.search(query, policy, 0.125), near.search(query, policy, 0.125)
    assert len(set(got.flatten().tolist()) ^ set(want.flatten().tolist())) <= 4
    off = far.score(query) - near.score(query) - products(query, shift)
    assert (off.abs() > 0.1).sum() <= 4  # numbers that are rounded another way


def test_generated_tokens_are_scored_with_what_the_prompt_chose():
    query, keys = tensors(2, 2, 64, 400)
    index = built(keys[:, :333])
    mean = index.state()["mean"].clone()
    for i in range(333, 400):
        index.append(keys[:, i : i + 1])
    assert index.length == 400
    assert torch.equal(index.state()["mean"], mean)
    rebuilt = ScalarIndex.from_state(index.state())
    error = (index.score(query) - products(query, keys)).square().mean(0).sqrt()
    assert error[333:].mean() < 1.2 * error[:333].mean() + 0.1
    assert torch.equal(rebuilt.score(query), index.score(query))


@settings(max_examples=15)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.sampled_from([1, 2, 4]))
def test_a_prompt_in_any_cut_gives_the_same_index(cuts, bits):
    query, keys = tensors(2, 2, 64, sum(cuts))
    index = ScalarIndex(2, 64, bits=bits)
    for part in keys.split(cuts, 1):
        index.append(part)
    index.finalize()
    assert torch.equal(index.score(query), built(keys, bits=bits).score(query))


def test_long_prompts_are_encoded_in_runs(monkeypatch):
    query, keys = tensors(2, 2, 64, 1000)
    want = built(keys).score(query)
    monkeypatch.setattr("retrieval.scalar.RUN_KEYS", 100)  # not a multiple of a block
    assert (
        (built(keys).score(query) - want).abs() > 1e-3
    ).float().mean() < 0.02  # rounded another way


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("space", ["rotated", "unrotated", "windowed"])
def test_an_index_comes_back_from_its_state(final, space):
    query, keys = tensors(2, 2, 80, 333)
    index = ScalarIndex(2, 80, bits=4, key_space=space, seed=7)
    index.append(keys)
    if final:
        index.finalize()
    again = ScalarIndex.from_state(index.state())
    assert again.spec == index.spec
    assert again.length == 333
    assert torch.equal(again.score(query), index.score(query))
    assert torch.equal(again.search(query, Policy(40), 0.1), index.search(query, Policy(40), 0.1))
    more = tensors(2, 2, 80, 50, seed=3)[1]
    again.append(more)
    assert (again.length, index.length) == (383, 333)
    index.append(more)
    assert torch.equal(again.score(query), index.score(query))


def test_codes_of_rotated_keys_cannot_be_relocated():
    query, keys = tensors(2, 2, 64, 100)
    with pytest.raises(NotRelocatable, match="build the index anew"):
        built(keys).relocate(10, lambda rows: rows)
    index = built(keys, key_space="unrotated")
    assert index.spec.relocatable == "free"
    moved = index.relocate(10, lambda rows: rows)
    moved.append(keys[:, :5])
    assert (index.length, moved.length) == (100, 105)
    assert torch.equal(moved.score(query)[:, :100], index.score(query))


def test_keys_that_say_nothing_give_no_nan():
    query, keys = tensors(2, 2, 64, 100)
    zero = built(torch.zeros_like(keys))
    assert torch.equal(zero.score(query), torch.zeros(4, 100))
    alike = built(keys[:, :1].expand(-1, 100, -1).contiguous())
    assert alike.score(query).isfinite().all()
    index = built(keys)
    index.append(keys[:, :3] * torch.tensor([1e-38, 1e6, torch.nan])[:, None])
    assert index.score(query).isfinite().all()
    assert index.state()["scales"].isfinite().all()
    for bad in (torch.nan, torch.inf):
        assert index.search(torch.full_like(query, bad), Policy(30), 0.1).shape == (2, 30)
    empty = ScalarIndex(2, 64)
    empty.finalize()
    assert empty.score(query).shape == (4, 0)
    empty.append(keys)
    assert empty.score(query).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_memory_is_what_its_spec_says(dtype):
    _, keys = tensors(2, 1, 128, 3200)
    index = built(keys.to(dtype), bits=2)
    spec = index.spec
    assert spec.bytes_per_token == 34
    assert index.nbytes == 2 * (3200 * spec.bytes_per_token + spec.shared_bytes)


def test_settings_that_cannot_be_are_refused():
    for bits, dim in ((1, 66), (2, 63)):
        with pytest.raises(ValueError, match="bits must be"):
            ScalarIndex(1, dim, bits=bits)


def test_without_a_compiler_the_same_tokens_are_found(monkeypatch, tmp_path):
    if native.library(SOURCE) is None:
        pytest.skip("no C compiler on this machine: nothing to compare")
    query, keys = scattered(t=2000)
    index = built(keys)
    want = index.search(query, Policy(100), 128**-0.5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    native.library.cache_clear()
    try:
        got = index.search(query, Policy(100), 128**-0.5)
    finally:
        native.library.cache_clear()
    assert torch.equal(got, want)
