"""Block keys: two are equal exactly if their KV must be."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import BlockKey, Kind, KVBlock
from tests.kvstore.make import chain, identity

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=24)


@given(TOKENS, TOKENS, TOKENS)
def test_two_chains_agree_exactly_on_the_blocks_of_their_shared_prefix(prefix, left, right):
    a, b = chain(prefix + left), chain(prefix + right)
    for i, (x, y) in enumerate(zip(a, b)):
        shared = (prefix + left)[: 4 * i + 4] == (prefix + right)[: 4 * i + 4]
        assert (x == y) is shared
        assert (x.digest == y.digest) is shared


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": b"other"},
        {"tenant": b"tenant\0"},  # HMAC pads its key with zeros
        {"size": 8},
        {"kind": Kind.CHUNK},
        {"kind": Kind.REPAIRED},
        {"kind": Kind.CHUNK, "warmup": b"w"},
        {"model": identity(weights=b"other")},
        {"model": identity(adapters=(("lora", b"1"),))},
        {"model": identity(rope='{"theta":1}')},
        {"model": identity(dtype="float16")},
        {"model": identity(num_layers=4)},
        {"model": identity(num_kv_heads=4)},
        {"model": identity(head_dim=4)},
        {"model": identity(attention='{"window":8}')},
    ],
    ids=str,
)
def test_whatever_kv_depends_on_changes_every_key(other):
    base, changed = chain(range(16)), chain(range(16), **other)
    assert not {key.digest for key in base} & {key.digest for key in changed}


def test_the_tail_of_a_prompt_has_no_key_and_that_of_a_chunk_has_one():
    assert [key.num_tokens for key in chain(range(10))] == [4, 4]
    tail = chain(range(10), kind=Kind.CHUNK)[-1]
    assert tail.num_tokens == 2
    assert tail not in chain(range(12), kind=Kind.CHUNK)
    assert chain(range(3)) == chain([]) == chain([], kind=Kind.CHUNK) == []


@given(TOKENS, TOKENS)
def test_different_chunks_have_different_last_keys(a, b):
    if a and b and a != b:
        assert chain(a, kind=Kind.CHUNK)[-1] != chain(b, kind=Kind.CHUNK)[-1]


def test_warm_ups_do_not_run_into_what_follows_them():
    lengths = [chain(range(4), kind=Kind.CHUNK, warmup=b"x" * n)[0] for n in range(200)]
    assert len(set(lengths)) == 200


def test_a_chain_links_its_blocks():
    keys = chain(range(12))
    assert [key.depth for key in keys] == [0, 1, 2]
    assert [key.parent for key in keys] == [None, keys[0].digest, keys[1].digest]
    assert {key.identity for key in keys} == {identity().digest}
    assert [len(key.token_digest) for key in keys] == [16, 16, 16]


def test_keys_are_equal_and_hash_by_their_digest_alone():
    key = chain(range(4))[0]
    other = BlockKey(key.digest, b"p" * 32, b"i" * 32, b"t" * 16, 9, Kind.CHUNK, 7)
    assert key == other
    assert len({key, other}) == 1


GOLDEN = "6c7391e194dfd6e4e1be6ab1ad90f7028871e5e4815628bd3ae61b2cb0f354ff"


def test_the_digest_of_a_known_chain_never_changes():
    keys = chain([1, 2, 3, 4, 5], kind=Kind.CHUNK, warmup=b"warm")
    assert keys[1].digest.hex() == GOLDEN


@pytest.mark.parametrize("seed", ["0", "1"])
def test_keys_are_the_same_in_every_process(seed):
    code = (
        "from tests.kvstore.make import chain; from kvstore.block import Kind;"
        "print(chain([1, 2, 3, 4, 5], kind=Kind.CHUNK, warmup=b'warm')[1].digest.hex())"
    )
    env = {"PYTHONHASHSEED": seed, "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert done.stdout.decode().strip() == GOLDEN


@pytest.mark.parametrize("token", [-1, 2**32, 2**70])
def test_tokens_that_are_no_uint32_are_refused(token):
    with pytest.raises(ValueError, match="tokens must be integers from 0"):
        chain([0, token, 0, 0])


def test_exact_blocks_have_no_warm_up():
    with pytest.raises(ValueError, match="no warm-up"):
        chain(range(8), warmup=b"w")


def test_a_size_below_one_is_refused():
    with pytest.raises(ValueError, match="size >= 1"):
        chain(range(8), size=0)


def test_a_block_must_be_contiguous_and_have_keys_and_values():
    with pytest.raises(ValueError, match="contiguous"):
        KVBlock(torch.zeros(2, 2, 2, 8, 4).transpose(3, 4))
    block = KVBlock(torch.randn(2, 2, 3, 4, 8))
    assert block.nbytes == 2 * 2 * 3 * 4 * 8 * 4
