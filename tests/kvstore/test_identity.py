"""Identities and the digests of weights."""

import os

import pytest
import torch
from torch import nn

from kvstore import identity as module
from kvstore.identity import canonical_json, state_digest, weights_digest
from tests.kvstore.make import identity


def test_an_identity_has_one_digest_and_every_field_is_in_it():
    assert identity().digest == identity().digest
    assert len(identity().digest) == 32
    changes = [
        {"weights": b"x"}, {"adapters": (("a", b"b"),)}, {"adapters": (("ab", b""),)},
        {"rope": "x"}, {"attention": "x"}, {"dtype": "float32"}, {"num_layers": 9},
        {"num_kv_heads": 9}, {"head_dim": 9}, {},
    ]  # fmt: skip
    assert len({identity(**change).digest for change in changes}) == len(changes)


def test_the_order_of_adapters_matters():
    a, b = ("a", b"1"), ("b", b"2")
    assert identity(adapters=(a, b)).digest != identity(adapters=(b, a)).digest


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"dtype": "int8"}, "dtype"), ({"weights": b""}, "weights"), ({"head_dim": 0}, "head_dim")],
)
def test_an_impossible_identity_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        identity(**change)


def test_canonical_json_has_one_spelling():
    assert canonical_json({"b": 1, "a": [1.5]}) == canonical_json({"a": [1.5], "b": 1})


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 1000)
    return paths


@pytest.fixture
def read(monkeypatch):
    """Names of the files whose contents were read."""
    names = []
    original = module._file_digest

    def spy(path):
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(module, "_file_digest", spy)
    return names


def test_the_second_call_reads_no_weights(files, tmp_path, read):
    cache = tmp_path / "cache" / "digests.json"
    first = weights_digest(files, cache=cache)
    assert sorted(read) == ["a.safetensors", "b.safetensors"]
    assert weights_digest(files[::-1], cache=cache) == first == weights_digest(files)
    assert len(read) == 4  # the last one had no cache
    assert cache.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_a_file_of_another_size_or_time_is_read_again(files, tmp_path, read):
    cache = tmp_path / "digests.json"
    first = weights_digest(files, cache=cache)
    files[0].write_bytes(b"longer" * 1000)
    second = weights_digest(files, cache=cache)
    assert second != first
    assert read[2:] == ["a.safetensors"]
    stat = files[1].stat()
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert weights_digest(files, cache=cache) == second
    assert read[3:] == ["b.safetensors"]


def test_a_file_that_was_overwritten_and_given_its_old_time_is_read_again(files, tmp_path):
    cache, stat = tmp_path / "digests.json", files[0].stat()
    first = weights_digest(files, cache=cache)
    files[0].write_bytes(b"x" * stat.st_size)
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights_digest(files, cache=cache) != first


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"x": 3}', '{"x": "zz"}', "\x00"])
def test_a_damaged_cache_is_rebuilt(files, tmp_path, read, damage):
    cache = tmp_path / "digests.json"
    cache.write_text(damage)
    assert weights_digest(files, cache=cache) == weights_digest(files)
    weights_digest(files, cache=cache)
    assert len(read) == 4


def test_names_and_borders_of_files_count(files, tmp_path):
    first = weights_digest(files)
    files[0].rename(tmp_path / "c.safetensors")
    assert weights_digest([tmp_path / "c.safetensors", files[1]]) != first
    with pytest.raises(ValueError, match="different names"):
        weights_digest([])


def test_a_state_digest_sees_name_dtype_shape_and_bytes():
    base = torch.arange(12.0)
    seen = {
        state_digest([("w", base)]),
        state_digest([("v", base)]),
        state_digest([("w", base.view(3, 4))]),
        state_digest([("w", base.bfloat16())]),
        state_digest([("w", base + 1)]),
        state_digest([("w", base), ("v", base)]),
    }
    assert len(seen) == 6


def test_a_state_digest_ignores_order_strides_and_gradients():
    wide = torch.randn(4, 6).bfloat16()
    a = [("x", wide.t()), ("y", torch.ones(()))]
    b = [("y", torch.ones(())), ("x", nn.Parameter(wide.t().contiguous()))]
    assert state_digest(a) == state_digest(b)
    assert state_digest(nn.Linear(2, 2).named_parameters())
