"""Which blocks policies choose, and what they are charged."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine import BlendConfig, ConfigError, Segments
from engine.blend.policies import Boundary, Budget, Deviation, Query, Reposition, Union, best
from engine.blend.reuse import EXACT, FRESH, plan


def reuse_of(*lengths, exact=0, prefix=5, separator=()):
    """Chunks of these lengths; the first one is exact, and so is what lies before `exact`."""
    chunks = [[1] * n for n in lengths]
    return plan(Segments([1] * prefix, chunks, [3, 4], separator), exact, torch.device("cpu"))


def test_what_is_exact_fresh_and_repaired_in_blocks():
    reuse = reuse_of(20, 40, 16, separator=[9])
    assert reuse.owner[:5].eq(FRESH).all()
    assert reuse.owner[5:25].eq(EXACT).all()
    assert reuse.owner[25] == FRESH
    assert reuse.owner[26:66].tolist() == [0] * 16 + [1] * 16 + [2] * 8
    assert reuse.owner[67:83].tolist() == [3] * 16
    assert reuse.sizes.tolist() == [16, 16, 8, 16]
    assert (reuse.chunk.tolist(), reuse.order.tolist()) == ([1, 1, 1, 2], [0, 1, 2, 0])
    assert reuse.reusable == 56
    assert reuse.count(EXACT) == 20
    assert reuse.active(~reuse.everything).tolist() == [0, 1, 2, 3, 4, 25, 66, 83, 84, 85]


def test_a_stored_start_leaves_the_rest_of_a_chunk_to_repair():
    reuse = reuse_of(20, 40, exact=48)
    assert reuse.owner[:48].eq(EXACT).all()
    assert reuse.sizes.tolist() == [16, 1]  # of tokens 48 to 64
    assert reuse.order.tolist() == [1, 2]  # no start of a chunk among them


def test_without_chunks_nothing_is_reused():
    reuse = reuse_of()
    assert reuse.reusable == 0
    assert Boundary().first(reuse, Budget(0.5, reuse, 4), reuse.nothing).tolist() == []


def chosen(policy, reuse, share, layers=12, relevance=None, deviation=None):
    """Blocks behind the last narrowing, and the share charged."""
    budget = Budget(share, reuse, layers)
    relevance = reuse.nothing if relevance is None else relevance
    blocks = policy.first(reuse, budget, relevance)
    for layer in range(layers):
        budget.charge(int(reuse.sizes[blocks].sum()))
        if layer == policy.check:
            known = deviation.where(blocks, deviation.new_zeros(()))
            blocks = blocks & policy.keep(reuse, budget, relevance, known)
    return blocks, budget.charged


def test_reposition_chooses_nothing():
    blocks, charged = chosen(Reposition(), reuse_of(20, 99), 0.5)
    assert not blocks.any()
    assert charged == 0


def test_boundary_takes_the_first_blocks_of_every_chunk_first():
    reuse = reuse_of(16, 64, 64, 64)
    blocks, charged = chosen(Boundary(), reuse, 0.25)
    assert blocks.nonzero()[:, 0].tolist() == [0, 4, 8]
    assert charged == pytest.approx(0.25)
    blocks, _ = chosen(Boundary(), reuse, 0.34)
    assert blocks.nonzero()[:, 0].tolist() == [0, 1, 4, 8]


def test_deviation_takes_the_blocks_that_differ_most_of_all():
    reuse = reuse_of(16, 160)
    deviation = torch.tensor([0.0, 5, 1, 2, 9, 3, 4, 0, 0, 8])
    blocks, charged = chosen(Deviation(), reuse, 2 / 12 + 0.3 * 10 / 12, deviation=deviation)
    assert blocks.nonzero()[:, 0].tolist() == [1, 4, 9]
    assert charged == pytest.approx(2 / 12 + 0.3 * 10 / 12)
    blocks, charged = chosen(Deviation(), reuse, 0.1, deviation=deviation)
    assert not blocks.any()  # two layers of all tokens cost more already
    assert charged == pytest.approx(2 / 12)


def test_query_takes_the_blocks_that_are_attended_to():
    reuse = reuse_of(16, 160)
    relevance = torch.tensor([0.0, 5, 1, 2, 9, 3, 4, 0, 0, 8])
    blocks, charged = chosen(Query(), reuse, 0.2, relevance=relevance)
    assert blocks.nonzero()[:, 0].tolist() == [4, 9]
    assert charged == pytest.approx(0.2)


def test_union_reaches_shares_below_the_check_layers_of_all_tokens():
    reuse = reuse_of(16, *[512] * 9)
    torch.manual_seed(0)
    relevance, deviation = torch.rand(2, len(reuse.sizes))
    blocks, charged = chosen(Union(1), reuse, 0.15, relevance=relevance, deviation=deviation)
    assert 0.145 < charged <= 0.15
    starts = (reuse.order == 0).nonzero()[:, 0]
    assert blocks[starts].all()
    rest = blocks.clone()
    rest[starts] = False
    score = relevance * deviation.sqrt()
    assert score[rest].mean() > 1.5 * score.mean()


def test_union_takes_starts_by_relevance_where_not_all_of_them_fit():
    reuse = reuse_of(16, *[64] * 10)
    relevance = (reuse.chunk == 7).float()
    deviation = torch.ones_like(relevance)
    blocks, charged = chosen(Union(1), reuse, 0.1, relevance=relevance, deviation=deviation)
    assert blocks[reuse.chunk == 7].any()
    assert charged <= 0.1


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 90), min_size=2, max_size=8),
    st.floats(0, 1),
    st.integers(2, 40),
    st.integers(0, 99),
    st.sampled_from([Reposition(), Boundary(), Query(), Union(1), Union(3, 0, 4.0)]),
)
@example([1, 1], 0.0, 4, 0, Union(3, 0, 4.0))  # nothing comes behind the check
def test_no_policy_is_charged_more_than_the_share(lengths, share, layers, seed, policy):
    reuse = reuse_of(*lengths)
    torch.manual_seed(seed)
    relevance, deviation = torch.rand(2, len(reuse.sizes))
    _, charged = chosen(policy, reuse, share, layers, relevance, deviation)
    assert charged <= share + 1e-6
    if not isinstance(policy, Reposition) and layers > 2:
        assert charged > share - 3.5 * 16 / reuse.reusable


def test_the_best_blocks_fit_and_of_equals_come_the_earlier():
    reuse = reuse_of(16, 20, 20)
    assert reuse.sizes.tolist() == [16, 4, 16, 4]
    score = torch.tensor([1.0, 2, 2, 3])
    for tokens, want in ((3, []), (4, [3]), (8, [1, 3]), (23, [1, 3]), (24, [1, 2, 3])):
        assert best(reuse, score, float(tokens)).nonzero()[:, 0].tolist() == want


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"blend\.share"):
        BlendConfig(share=1.1)
    with pytest.raises(ConfigError, match=r"blend\.boundary_tokens"):
        BlendConfig(boundary_tokens=-1)
    assert BlendConfig(policy="union", boundary_tokens=32).chosen(12) == Union(6, 32)
    assert BlendConfig(policy="deviation").chosen(12) == Deviation()
