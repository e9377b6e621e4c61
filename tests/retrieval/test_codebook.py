"""Codebooks: trained by FAISS, the same every time; coding against brute force."""

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from retrieval import codebook as module
from retrieval.codebook import Codebook, Training, looked_up, nearest, train_codebook
from retrieval.metric import Metric, Moment, make_metric

ROOT = Path(__file__).parents[2]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(keys):
    return Metric(keys.mean(1, dtype=torch.float32), None, None)


def aware(keys, hq=4):
    moment = Moment(len(keys), keys.shape[2])
    moment.add(randn(hq, 200, keys.shape[2], seed=9) * torch.logspace(1, -1, keys.shape[2]))
    return make_metric(keys.mean(1, dtype=torch.float32), moment.value)


def clustered(hk, n, d, clusters=30, noise=0.1):
    pick = torch.randint(0, clusters, (hk, n), generator=torch.Generator().manual_seed(3))
    centres = 2 * randn(hk, clusters, d)
    return torch.stack([c[i] for c, i in zip(centres, pick)]) + noise * randn(hk, n, d, seed=4)


def cut(z, subspaces):
    return z.unflatten(-1, (subspaces, -1)).transpose(1, 2)  # [Hk, M, N, S]


@pytest.mark.parametrize("d", [64, 80, 128])
@pytest.mark.parametrize("make", [plain, aware])
@pytest.mark.parametrize("subspaces", [1, 16])
def test_every_key_gets_the_nearest_centroid(d, make, subspaces, monkeypatch):
    monkeypatch.setattr(module, "RUN_TOKENS", 100)
    monkeypatch.setattr(module, "RUN_ELEMENTS", 64 * 16 * subspaces)
    keys = clustered(2, 300, d)
    book = train_codebook(keys, make(keys), subspaces=subspaces, centroids=16)
    codes, errors = book.encode(keys)
    distances = torch.cdist(
        cut(book.metric.keys(keys).double(), subspaces), book.centroids.double()
    )
    chosen = distances.gather(-1, codes.mT[..., None]).squeeze(-1)
    torch.testing.assert_close(chosen, distances.amin(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(errors, chosen.square().sum(1).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("subspaces", [1, 8])
def test_a_distance_in_the_metric_is_that_of_h(subspaces):
    queries, keys = randn(4, 500, 64, seed=2) * torch.logspace(1, -1, 64), randn(2, 300, 64)
    moment = Moment(2, 64)
    moment.add(queries)
    metric = make_metric(keys.mean(1), moment.value, ridge=0.0)
    book = train_codebook(keys, metric, subspaces=subspaces, centroids=16)
    codes, errors = book.encode(keys)
    parts = [[b[m, c[:, m]] for m in range(subspaces)] for b, c in zip(book.centroids, codes)]
    coded = torch.stack([torch.cat(part, -1) for part in parts])  # z of the centroids
    back = (coded.double() @ metric.inverse.double()) + metric.mean[:, None]
    off = keys - back
    h = moment.value / moment.value.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    want = torch.einsum("hnd,hde,hne->hn", off, h, off)
    torch.testing.assert_close(errors.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [plain, aware])
@pytest.mark.parametrize("subspaces", [1, 16])
def test_the_table_of_a_query_adds_up_to_its_product_with_coded_keys(make, subspaces):
    keys, query = clustered(2, 300, 64) + 1, randn(4, 64, seed=5)
    book = train_codebook(keys, make(keys), subspaces=subspaces, centroids=16)
    z = torch.stack([b[:, 3].flatten() for b in book.centroids])[:, None]  # code 3 everywhere
    inverse = book.metric.inverse
    key = (z if inverse is None else z @ inverse) + book.metric.mean[:, None]
    want = (query.unflatten(0, (2, -1)) * key).sum(-1)
    torch.testing.assert_close(book.table(query)[..., 3].sum(-1), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_keys_give_the_same_codebook_whatever_the_threads(threads):
    keys = randn(3, 3000, 64)
    once = train_codebook(keys, plain(keys), subspaces=4, centroids=16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        again = train_codebook(keys, plain(keys), subspaces=4, centroids=16)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(once.centroids, again.centroids)


@pytest.mark.parametrize("setting", [{"seed": 1}, {"iterations": 3}, {"points": 5}])
def test_every_setting_of_training_changes_the_codebook(setting):
    keys = randn(1, 800, 64)  # all are drawn, unless points says otherwise
    usual = train_codebook(keys, plain(keys), centroids=16)
    differs = train_codebook(keys, plain(keys), centroids=16, training=Training(**setting))
    assert not torch.equal(usual.centroids, differs.centroids)


def test_clusters_are_found():
    keys = clustered(2, 3000, 64, clusters=8)
    book = train_codebook(keys, plain(keys), centroids=64)
    assert book.encode(keys).errors.mean() < 0.05 * 64  # of 0.01 * 64 within clusters, 256 about


def test_more_work_makes_better_codebooks():
    keys = randn(1, 4000, 32)
    little, much = (
        train_codebook(keys, plain(keys), centroids=64, training=training)
        .encode(keys)
        .errors.mean()
        for training in (Training(points=1, iterations=1), Training(points=64, iterations=20))
    )
    assert much < 0.9 * little


@pytest.mark.gpu
@pytest.mark.parametrize("subspaces", [1, 8])
def test_a_codebook_trained_on_a_gpu_is_as_good_as_one_of_the_cpu(subspaces):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    if not torch.cuda.is_available() or not faiss.get_num_gpus():
        pytest.skip("torch or FAISS finds no GPU on this machine")
    keys = clustered(2, 6000, 64, clusters=200, noise=1.0)
    books = [
        train_codebook(x, plain(x), subspaces=subspaces, centroids=64) for x in (keys, keys.cuda())
    ]
    assert books[1].centroids.is_cuda
    cpu, gpu = (float(b.encode(keys.to(b.centroids)).errors.mean()) for b in books)
    assert abs(gpu / cpu - 1) < 0.02


class Planted(types.ModuleType):
    """What training asks of a FAISS that is built for GPUs."""

    def __init__(self, gpus):
        super().__init__("faiss")
        self.count = gpus

    def get_num_gpus(self):
        return self.count

    def IndexFlatL2(self, size):
        return "on the CPU", size

    def GpuIndexFlatL2(self, resources, size, config):
        return "on the GPU", size, resources.taken, config.device

    class StandardGpuResources:
        def setTempMemory(self, taken):
            self.taken = taken

    class GpuIndexFlatConfig:
        device = None


@pytest.mark.parametrize(
    ("gpus", "device", "want"),
    [
        (0, "cuda:1", ("on the CPU", 8)),
        (2, "cpu", ("on the CPU", 8)),
        (2, "cuda:1", ("on the GPU", 8, module.GPU_BYTES, 1)),
        (2, "cuda", ("on the GPU", 8, module.GPU_BYTES, 0)),
    ],
)
def test_keys_on_a_gpu_are_clustered_there_if_faiss_can(gpus, device, want):
    assert module._nearest_by(Planted(gpus), 8, torch.device(device)) == want


@pytest.mark.parametrize("n", [1, 2, 15, 16])
@pytest.mark.parametrize("subspaces", [1, 4])
@pytest.mark.parametrize("make", [plain, aware])
def test_few_keys_are_their_own_centroids(n, subspaces, make, monkeypatch):
    monkeypatch.setattr(module, "faiss_module", lambda: pytest.fail("FAISS is not needed"))
    keys = randn(2, n, 64)
    book = train_codebook(keys, make(keys), subspaces=subspaces, centroids=16)
    assert book.centroids.shape[2] <= n
    assert book.encode(keys).errors.max() < 1e-3


def test_few_distinct_keys_are_found_among_many_and_in_every_head():
    keys = randn(2, 10, 64)
    repeated = torch.stack([keys[0].repeat(50, 1), keys[1, :3].repeat(167, 1)[:500]])
    book = train_codebook(repeated, plain(repeated), centroids=16)
    assert book.centroids.shape[2] == 10
    codes, errors = book.encode(repeated)
    assert errors.max() < 1e-3
    assert codes[1].max() < 3  # the last centroid, repeated, is not used
    late = torch.cat([keys[:, :1].expand(-1, 400, -1), randn(2, 100, 64)], 1)  # distinct ones later
    assert train_codebook(late, plain(late), centroids=16).centroids.shape[2] == 16


def test_a_key_that_comes_once_among_thousands_of_others_is_found():
    keys = randn(1, 10, 64)[:, torch.arange(9).repeat(400)]
    keys[:, 2345] = randn(1, 64, seed=6)
    training = Training(points=1)
    book = train_codebook(keys, aware(keys), centroids=16, training=training)
    assert book.encode(keys).errors.max() < 1e-3


def test_keys_whose_squares_overflow_are_refused_before_faiss_ends_the_process():
    keys = randn(1, 300, 8) * 1e20
    with pytest.raises(ValueError, match="distances are finite"):
        train_codebook(keys, plain(keys), centroids=256, training=Training(iterations=1))


def test_few_points_are_no_reason_for_a_word(capfd):
    keys = randn(2, 40, 64)
    train_codebook(keys, plain(keys), centroids=32)
    assert capfd.readouterr() == ("", "")


def test_no_keys_and_no_faiss_are_said(monkeypatch):
    keys = randn(1, 100, 64)
    with pytest.raises(ValueError, match="at least one key"):
        train_codebook(keys[:, :0], plain(keys), centroids=16)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install headrace\[cpu\]"):
        train_codebook(keys, plain(keys), centroids=16)


def test_faiss_is_imported_when_it_is_needed_and_not_before():
    run = "import sys, retrieval.vq, retrieval.pq; print('faiss' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    for path in (ROOT / "retrieval").rglob("*.py"):
        assert path.name == "codebook.py" or "import faiss" not in path.read_text(), path


def test_faiss_compares_by_blas_as_it_did_before_1_15():
    """The centroids of one iteration for 8,192 keys: 0.7 ms instead of 7."""
    faiss = pytest.importorskip("faiss")
    module.faiss_module()
    assert faiss.cvar.distance_compute_blas_threshold <= 64 * 16  # the fewest keys k-means gets


def test_the_state_of_a_codebook_is_the_codebook():
    keys = randn(2, 300, 64)
    for metric in (plain(keys), aware(keys)):
        book = train_codebook(keys, metric, subspaces=4, centroids=16)
        again = Codebook.from_state(book.state())
        assert torch.equal(again.encode(keys).codes, book.encode(keys).codes)
        assert torch.equal(again.table(keys[:, 0]), book.table(keys[:, 0]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_looking_up_is_indexing(dtype):
    table, codes = randn(2, 3, 20), torch.arange(34).reshape(2, 17).remainder(20).to(dtype)
    found = looked_up(table, codes)
    assert torch.equal(found[4], table[1, 1][codes[1].long()])
    assert found.shape == (6, 17)


def test_no_work_is_not_a_training():
    with pytest.raises(ValueError, match="points"):
        Training(points=0)
    assert importlib.import_module("faiss") is module.faiss_module()
    assert nearest(torch.zeros(1, 0, 4), torch.zeros(1, 2, 4))[0].shape == (1, 0)
