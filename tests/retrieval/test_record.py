"""An index that was stored and attached again, by another process, finds the same tokens."""

import subprocess
import sys
from pathlib import Path

import lmdb
import pytest
import torch

from retrieval.exact import Exact
from retrieval.landmarks import Landmarks
from retrieval.pq import PQIndex
from retrieval.quest import Quest
from retrieval.record import from_bytes, to_bytes
from retrieval.scalar import ScalarIndex
from retrieval.select import Policy, top_tokens
from retrieval.vq import VQIndex

ROOT = Path(__file__).parents[2]
KINDS = {
    "exact": Exact,
    "landmarks": lambda *a: Landmarks(*a, outlier_chunks=2),
    "quest": Quest,
    "scalar": ScalarIndex,
    "vq": lambda *a: VQIndex(*a, centroids=32),
    "pq": lambda *a: PQIndex(*a, subspaces=8, bits=4),
}
CLASSES = dict(
    exact=Exact, landmarks=Landmarks, quest=Quest, scalar=ScalarIndex, vq=VQIndex, pq=PQIndex
)


def keys(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 64, generator=generator)


def chosen(index):
    query = torch.randn(4, 64, generator=torch.Generator().manual_seed(9))
    return top_tokens(
        index.score(query), Policy(60), num_kv_heads=2, length=index.length, scale=0.125,
        unit=index.spec.unit_tokens, outliers=index.outliers,
    )  # fmt: skip


def built(kind):
    index = KINDS[kind](2, 64)
    index.append(keys(300, 1))
    index.finalize()
    index.append(keys(21, 2))
    return index


OTHER = """
import sys, lmdb, torch
from tests.retrieval.test_record import CLASSES, chosen, from_bytes, keys
path, kind = sys.argv[1:]
with lmdb.open(path) as env, env.begin() as txn:
    index = CLASSES[kind].from_state(from_bytes(txn.get(kind.encode()), kind))
index.append(keys(40, 3))
print(chosen(index).tolist())
"""


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_goes_to_lmdb_and_another_process_selects_the_same_ids(kind, tmp_path):
    index = built(kind)
    with lmdb.open(str(tmp_path)) as env, env.begin(write=True) as txn:
        txn.put(kind.encode(), to_bytes(index.state(), kind))
    run = [sys.executable, "-c", OTHER, str(tmp_path), kind]
    found = subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    index.append(keys(40, 3))
    assert found.strip() == str(chosen(index).tolist())


def test_a_record_keeps_what_was_there_when_it_was_written():
    index = built("scalar")
    before, record = chosen(index), to_bytes(index.state(), "scalar")
    index.append(keys(100, 5))
    again = ScalarIndex.from_state(from_bytes(record, "scalar"))
    assert torch.equal(chosen(again), before)


def test_what_is_no_record_of_this_index_is_refused():
    record = to_bytes(built("quest").state(), "quest")
    with pytest.raises(ValueError, match="scalar"):
        from_bytes(record, "scalar")
    with pytest.raises(ValueError, match="not a record"):
        from_bytes(record[: len(record) // 2], "quest")
    with pytest.raises(ValueError, match="not a record"):
        from_bytes(b"", "quest")
