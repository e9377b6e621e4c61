"""The compiled attention of one token against its definition, and without a compiler."""

import logging
import threading

import pytest
import torch

from engine.attention import attend_scores, attend_token, attend_token_torch
from engine.kernels.attend_token import SOURCE, attend_token_native, serves
from engine.kernels.rms_norm import SOURCE as SMALL
from engine.model.pieces import AttentionSpec
from native import library as native

HEADS = [(1, 1), (4, 2), (8, 2), (6, 2), (10, 2), (7, 1), (4, 4)]  # groups of 1 to 7


def tensors(hq, hk, s, d, dtype):
    generator = torch.Generator().manual_seed(hq * s + d)
    q = 2 * torch.randn(hq, d, generator=generator)
    k, v = (torch.randn(hk, s + 3, d, generator=generator)[:, 2 : s + 2] for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)  # views with an offset, as a cache gives them


def exact(q, k, v, scale):
    spec = AttentionSpec(scale=scale)
    return attend_token_torch(q.double(), k.double(), v.double(), spec)


@pytest.mark.parametrize(("hq", "hk"), HEADS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 300, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_equals_its_definition(compiled, hq, hk, length, dtype):
    for dim in (16, 64, 80, 128, 256):
        q, k, v = tensors(hq, hk, length, dim, dtype)
        assert serves(q, k, v)
        want, scale = exact(q, k, v, dim**-0.5), dim**-0.5
        ours = (attend_token_native(q, k, v, scale).out.double() - want).abs().max()
        torchs = attend_token_torch(q, k, v, AttentionSpec(scale=scale))
        allowed = 2 * (torchs.double() - want).abs().max() + 4e-6  # of scores up to 12, in fp32
        assert ours <= allowed, (dim, ours, allowed)


@pytest.mark.parametrize("softcap", [0.5, 2.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_caps_scores_as_its_definition_does(compiled, softcap, dtype):
    for length in (1, 63, 300):
        q, k, v = tensors(8, 2, length, 64, dtype)
        spec = AttentionSpec(scale=0.5, softcap=softcap)
        want = attend_scores(q, k, spec).double().softmax(-1) @ v.double()
        got = attend_token_native(q, k, v, 0.5, softcap).out
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want.flatten(0, 1), rtol=rounding, atol=1e-5)
        assert torch.equal(attend_token(q, k, v, spec), got)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing_that_matters(compiled, threads):
    before = torch.get_num_threads()
    q, k, v = tensors(4, 2, 9000, 64, torch.float32)
    want = exact(q, k, v, 0.125)
    torch.set_num_threads(threads)
    try:
        got = attend_token_native(q, k, v, 0.125).out
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


def test_two_callers_at_once_do_not_disturb_each_other(compiled):
    asked = [tensors(8, 2, 3000 + i, 128, torch.bfloat16) for i in range(2)]
    want = [attend_token_native(*a, 0.1).out for a in asked]
    wrong = []

    def call(i):
        for _ in range(50):
            if not torch.equal(attend_token_native(*asked[i], 0.1).out, want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_scores_of_any_size_and_what_is_not_a_number(compiled):
    q, k, v = tensors(2, 1, 200, 64, torch.float32)
    for factor in (0.0, 1e3, 1e8):  # everything alike; one key takes all
        want = exact(q * factor, k, v, 1.0)
        got = attend_token_native(q * factor, k, v, 1.0).out
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    k, v = k.contiguous(), v.contiguous()
    v[0, 70, 3] = torch.nan
    assert attend_token_native(q, k, v, 1.0).out[:, 3].isnan().all()
    k[0, 70, 3] = torch.nan
    assert attend_token_native(q, k, v, 1.0).out.isnan().all()


@pytest.mark.parametrize("queries", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keys", [torch.bfloat16, torch.float32])
def test_queries_may_be_of_another_type_than_keys_and_keep_it(compiled, queries, keys):
    q, k, v = tensors(4, 2, 300, 64, torch.float32)
    q, k, v = q.to(queries), k.to(keys), v.to(keys)
    got = attend_token_native(q, k, v, 0.1).out
    assert got.dtype == queries
    rounding = torch.finfo(queries).eps
    torch.testing.assert_close(got.double(), exact(q, k, v, 0.1), rtol=rounding, atol=4e-6)


def test_queries_that_lie_apart_are_taken_too(compiled):
    q, k, v = tensors(4, 2, 70, 64, torch.bfloat16)
    apart = torch.stack([q, q], 1)[:, 1]
    assert not apart.is_contiguous()
    got, want = (attend_token_native(x, k, v, 0.1).out for x in (apart, q))
    assert torch.equal(got, want)


def test_it_leaves_to_torch_what_it_cannot_take(compiled):
    q, k, v = tensors(2, 1, 20, 64, torch.float32)
    assert not serves(q.half(), k.half(), v.half())
    assert not serves(q, k, v.double())
    assert not serves(*tensors(2, 1, 20, 72, torch.float32))
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert not serves(q, strided, v)
    got = attend_token(q, strided, v, AttentionSpec(scale=1.0, window=7))
    torch.testing.assert_close(got, exact(q, k[:, -7:], v[:, -7:], 1.0).float())


def test_without_a_compiler_torch_answers_and_it_is_said_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    native.library.cache_clear()
    q, k, v = tensors(4, 2, 50, 64, torch.float32)
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                got = attend_token(q, k, v, AttentionSpec(scale=0.1))
    finally:
        native.library.cache_clear()
    torch.testing.assert_close(got, exact(q, k, v, 0.1).float())
    assert [r.getMessage() for r in caplog.records] == [
        "attend_token is not compiled, which is slower on a CPU: "
        "no C compiler (cc, gcc or clang) is on the PATH"
    ]


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("{}", "this compiler is broken"),  # and speaks Latin-1
        ("cc '{}", "the environment variable CC is no command: No closing quotation"),
    ],
)
def test_a_compiler_that_fails_is_no_disaster(monkeypatch, tmp_path, caplog, command, why):
    broken = tmp_path / "cc"
    broken.write_bytes(b"#!/bin/sh\necho 'this compiler is broken \xe9' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", command.format(broken))
    native.library.cache_clear()
    try:
        assert native.library(SOURCE) is None
    finally:
        native.library.cache_clear()
    assert why in caplog.text


def test_compiled_code_is_made_once_and_kept_private(compiled, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = native._compiled(SMALL)
    assert first.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert native._compiled(SMALL) == first
    assert [p.name for p in first.parent.iterdir()] == [first.name]
