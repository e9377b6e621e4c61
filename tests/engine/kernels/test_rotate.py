"""The compiled rotation against its definition, bit for bit, and where it stands back."""

import pytest
import torch

from engine.kernels.rotate import VALUES_OF_A_THREAD, rotate_native, rotate_torch, serves
from engine.model.rope import Rope, RopeTable

SHAPES = [  # dimensions, of which turn, of neighbours
    (128, 128, False), (64, 64, False), (128, 64, False), (96, 96, False), (80, 32, False),
    (64, 64, True), (72, 48, True), (20, 10, False), (256, 256, False), (512, 512, True),
]  # fmt: skip


def rows(heads, tokens, dim, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(dim)
    return (3 * torch.randn(heads, tokens, dim, generator=generator)).to(dtype)


def angles(tokens, turned):
    generator = torch.Generator().manual_seed(turned)
    return torch.randn(2, tokens, turned // 2, generator=generator).unbind()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "turned", "interleaved"), SHAPES)
def test_it_equals_its_definition(compiled, dim, turned, interleaved, dtype):
    x, (cos, sin) = rows(5, 33, dim, dtype), angles(33, turned)
    assert serves(x, cos)
    want = rotate_torch(x, cos, sin, interleaved=interleaved)
    assert torch.equal(rotate_native(x, cos, sin, interleaved=interleaved), want)
    assert not torch.equal(want, x)


def test_a_rotation_that_rounds_once_less_would_be_seen(compiled):
    x, (cos, sin) = rows(8, 512, 128, torch.float32), angles(512, 128)
    a, b = x.double().chunk(2, -1)
    fused = torch.cat([a * cos - (b * sin).float(), b * cos + (a * sin).float()], -1).float()
    ours = rotate_native(x, cos, sin, interleaved=False)
    assert 0 < (ours != fused).float().mean() < 0.5


def test_heads_and_tokens_may_lie_apart(compiled):
    x, (cos, sin) = rows(4, 96, 64), angles(32, 64)
    want = rotate_torch(x[:, 32:64], cos, sin, interleaved=False)
    views = (
        x[:, 32:64],
        x[:, 32:64].transpose(0, 1).contiguous().transpose(0, 1),
        x.repeat(1, 1, 2)[:, 32:64, :64],
        x[:, 32:64].repeat_interleave(2, 0)[::2],
    )
    for view in views:
        assert torch.equal(rotate_native(view, cos, sin, interleaved=False), want)
    one = rotate_native(x[:, :1].expand(4, 32, 64), cos, sin, interleaved=False)
    assert torch.equal(one, rotate_torch(x[:, :1].expand(4, 32, 64), cos, sin, interleaved=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("runs", "run"), [(1, 33), (4, 9), (5, 1), (0, 4)])
@pytest.mark.parametrize(("dim", "turned", "interleaved"), SHAPES[:6])
def test_runs_of_tokens_are_placed_one_after_the_other(
    compiled, dim, turned, interleaved, runs, run, dtype
):
    x = rows(3 * runs, 2 * run, dim, dtype).view(runs, 3, 2, run, dim)[:, :, 1].transpose(0, 1)
    cos, sin = angles(runs * run, turned)
    whole = rows(3, runs * run + 7, dim, dtype)
    before, want = whole.clone(), rotate_torch(x.flatten(1, 2), cos, sin, interleaved=interleaved)
    rope = Rope(torch.ones(turned // 2), interleaved=interleaved)
    rope.place(x, RopeTable(cos, sin), whole[:, 4 : 4 + runs * run])
    assert torch.equal(whole[:, 4 : 4 + runs * run], want)
    assert torch.equal(whole[:, :4], before[:, :4])
    assert torch.equal(whole[:, 4 + runs * run :], before[:, 4 + runs * run :])


def test_runs_are_placed_without_a_compiler(monkeypatch):
    x, (cos, sin) = rows(2, 12, 64).view(2, 3, 4, 64), angles(12, 64)
    out = torch.zeros(2, 12, 64, dtype=torch.float16)
    Rope(torch.ones(32)).place(x, RopeTable(cos, sin), out)  # another dtype than x has
    want = rotate_torch(x.flatten(1, 2), cos, sin, interleaved=False).half()
    assert torch.equal(out, want)
    monkeypatch.setattr("engine.model.rope.serves", lambda *_: False)
    same = torch.zeros(2, 12, 64, dtype=torch.bfloat16)
    Rope(torch.ones(32)).place(x, RopeTable(cos, sin), same)
    assert torch.equal(same.half(), want)


def test_tables_may_be_views(compiled):
    x, both = rows(2, 16, 64), torch.randn(16, 64)
    cos, sin = both.chunk(2, -1)
    ours = rotate_native(x, cos, sin, interleaved=False)
    assert torch.equal(ours, rotate_torch(x, cos, sin, interleaved=False))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_the_same_bits(compiled, threads):
    tokens = 3 * VALUES_OF_A_THREAD // 128
    x, (cos, sin) = rows(3, tokens, 128), angles(tokens, 128)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = rotate_native(x, cos, sin, interleaved=False)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ours, rotate_torch(x, cos, sin, interleaved=False))


def test_what_is_not_finite_stays_so_where_it_is(compiled):
    x, (cos, sin) = rows(2, 8, 64), angles(8, 64)
    x[0, 3, 5], x[1, 2, 40] = float("nan"), float("inf")
    ours = rotate_native(x, cos, sin, interleaved=False)
    want = rotate_torch(x, cos, sin, interleaved=False)
    assert torch.equal(ours.isnan(), want.isnan())
    assert torch.equal(ours.nan_to_num(), want.nan_to_num())
    assert not ours[0, :3].isnan().any()


def test_no_rows_are_no_rows(compiled):
    cos, sin = angles(0, 64)
    assert rotate_native(rows(2, 0, 64), cos, sin, interleaved=False).shape == (2, 0, 64)


def test_it_stands_back_from_what_it_cannot_take(compiled):
    x, (cos, _) = rows(2, 8, 64), angles(8, 64)
    assert serves(x, cos)
    assert not serves(x.half(), cos)
    assert not serves(x[0], cos)
    assert not serves(x, cos[:1])  # would be read past its end
    assert not serves(x, cos.bfloat16())
    assert not serves(x.transpose(1, 2).contiguous().transpose(1, 2), cos)
    assert not serves(rows(2, 8, 1026), torch.zeros(8, 513))
    learned = x.float().requires_grad_()
    assert not serves(learned, cos)
    with torch.no_grad():
        assert serves(learned, cos)


def test_what_it_does_not_take_is_turned_all_the_same(compiled):
    rope = Rope(1e4 ** -(torch.arange(32, dtype=torch.float64) / 32))
    x, table = rows(2, 8, 64), rope.table(torch.arange(8))
    want = rope.rotate(x, table)
    assert torch.allclose(rope.rotate(x.half(), table).float(), want.float(), atol=0.05)
    learned = x.float().requires_grad_()
    rope.rotate(learned, table).sum().backward()
    assert learned.grad is not None
