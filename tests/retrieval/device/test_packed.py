"""4-bit codes of a batch, on a device: what every request's own index would say."""

import pytest
import torch

from retrieval.codebook import Codebook
from retrieval.device.index import DeviceIndex
from retrieval.device.pq import DevicePQ4
from retrieval.device.scalar import DeviceScalar
from retrieval.exact import Exact
from retrieval.kernels.scores import lse
from retrieval.metric import make_metric
from retrieval.pq import PQIndex
from retrieval.scalar import ScalarIndex
from retrieval.select import Policy, top_tokens
from tests.retrieval.coded import scalar_index, spread_keys

LENGTHS = [1, 127, 300]
SCALE = 0.1


def pq_index(hk, d, count, *, subspaces=16, seed=0, centroids=16, calibrated=True):
    """A finalized index with a codebook that was given: FAISS is not needed."""
    generator = torch.Generator().manual_seed(seed)
    keys = spread_keys(hk, d, count, seed=seed)
    moment = torch.randn(hk, 3 * d, d, generator=generator)
    metric = make_metric(keys.mean(1), moment.mT @ moment if calibrated else None)
    shape = (hk, subspaces, centroids, d // subspaces)
    book = Codebook(0.4 * torch.randn(shape, generator=generator), metric)
    index = PQIndex(hk, d, subspaces=subspaces, bits=4, codebook=book)
    index.append(keys)
    index.finalize()
    return index


def device_of(indexes, capacity=400):
    """A batch with one slot more than there are requests."""
    first = indexes[0].state()
    if isinstance(indexes[0], ScalarIndex):
        hk, _, d = first["mean"].shape
        bits = int(first["settings"][0])
        device = DeviceScalar(len(indexes) + 1, hk, d, capacity, bits=bits)
    else:
        (hk, d), subspaces = indexes[0].codebook.metric.mean.shape, int(first["settings"][0])
        device = DevicePQ4(len(indexes) + 1, hk, d, capacity, subspaces=subspaces)
    for slot, index in enumerate(indexes):
        device.adopt(slot, index)
    return device


def lengths_of(indexes):
    return torch.tensor([*(index.length for index in indexes), 0], dtype=torch.int32)


def queries(indexes, hk, g, d):
    return torch.randn(len(indexes) + 1, hk * g, d, generator=torch.Generator().manual_seed(3))


def says_what_requests_say(device, indexes, query, hk):
    found = device.score(query, lengths_of(indexes), SCALE)
    for slot, index in enumerate(indexes):
        want, length = index.score(query[slot]), index.length
        raw = found.raw[slot, :, :length]
        # a table's byte on the other side of a half makes a difference of one step
        torch.testing.assert_close(raw, want, rtol=1e-4, atol=2e-2)
        assert (raw - want).abs().mean() <= 1e-3
        assert (found.raw[slot, :, length:] == -torch.inf).all()
        torch.testing.assert_close(
            lse(found)[slot], torch.logsumexp(SCALE * want, -1), rtol=1e-4, atol=1e-3
        )
        policy = Policy(min(48, max(20, length // 3)))
        ids, wanted = (
            top_tokens(x, policy, num_kv_heads=hk, length=length, scale=SCALE) for x in (raw, want)
        )
        assert torch.equal(ids, wanted)
    assert (found.raw[-1] == -torch.inf).all()


@pytest.mark.parametrize(
    ("hk", "g", "d", "bits"),
    [(2, 1, 64, 1), (1, 3, 80, 2), (2, 4, 128, 2), (1, 8, 128, 4), (2, 4, 80, 1), (1, 1, 64, 4)],
)
def test_scores_and_ids_are_those_of_each_request(hk, g, d, bits):
    indexes = [
        scalar_index(hk, d, length, bits=bits, seed=i, decay=i) for i, length in enumerate(LENGTHS)
    ]
    device = device_of(indexes)
    assert isinstance(device, DeviceIndex)
    assert device.outliers is None
    says_what_requests_say(device, indexes, queries(indexes, hk, g, d), hk)


@pytest.mark.parametrize(
    ("g", "calibrated", "centroids"), [(1, True, 16), (4, False, 16), (3, True, 5)]
)
def test_product_quantization_does_too(g, calibrated, centroids):
    indexes = [
        pq_index(2, 64, length, seed=i, centroids=centroids, calibrated=calibrated)
        for i, length in enumerate(LENGTHS)
    ]
    device = device_of(indexes)
    assert isinstance(device, DeviceIndex)
    assert device.outliers is None
    says_what_requests_say(device, indexes, queries(indexes, 2, g, 64), 2)


@pytest.mark.parametrize("kind", ["scalar", "pq"])
def test_tokens_that_are_appended_are_coded_as_the_request_codes_them(kind):
    make = scalar_index if kind == "scalar" else pq_index
    indexes = [make(2, 64, length, seed=i) for i, length in enumerate(LENGTHS)]
    device = device_of(indexes)
    fresh = [spread_keys(2, 64, 70, seed=10 + i) for i in range(4)]
    for step in range(70):
        positions = lengths_of(indexes)
        positions[-1] = -1
        if step % 3 == 0:
            positions[1] = -1  # not every request takes a token in every step
        device.append(torch.stack([keys[:, step] for keys in fresh]), positions)
        for slot, index in enumerate(indexes):
            if positions[slot] >= 0:
                index.append(fresh[slot][:, step : step + 1])
    for slot, index in enumerate(indexes):
        state = index.state()
        own = device._codes.packed[slot, :, : state["packed"].shape[1] - 1]
        assert (own != state["packed"][:, :-1]).sum() <= 1  # on an edge, up to the order of a sum
        if kind == "scalar":
            scales = device._codes.scales[slot, :, : index.length]
            torch.testing.assert_close(scales, state["scales"], rtol=2e-3, atol=0)
    says_what_requests_say(device, indexes, queries(indexes, 2, 4, 64), 2)


@pytest.mark.parametrize("make", [scalar_index, pq_index])
def test_a_slot_serves_one_request_after_another(make):
    indexes = [make(1, 64, 300, seed=0), make(1, 64, 200, seed=1)]
    device = device_of(indexes)
    device.clear(0)
    device.clear(1)
    others = [make(1, 64, 33, seed=2), make(1, 64, 350, seed=3)]
    for slot, index in enumerate(others):
        device.adopt(slot, index)
    says_what_requests_say(device, others, queries(others, 1, 4, 64), 1)


def test_a_request_with_fewer_axes_meets_none_of_the_one_before():
    wide, narrow = scalar_index(1, 64, 100, bits=1, decay=0.0), ScalarIndex(1, 64, bits=1)
    narrow.append(20 * spread_keys(1, 64, 100))
    narrow.finalize()
    assert sum(narrow.state()["sizes"]) < sum(wide.state()["sizes"])
    device = device_of([wide])
    device.adopt(0, narrow)
    for key in 20 * spread_keys(1, 64, 3, seed=4).transpose(0, 1):
        device.append(torch.stack([key, key]), torch.tensor([narrow.length, -1]).int())
        narrow.append(key[:, None])
    state = narrow.state()
    assert (device._codes.packed[0, :, :4] != state["packed"]).sum() <= 1
    scales = device._codes.scales[0, :, : narrow.length]
    torch.testing.assert_close(scales, state["scales"], rtol=2e-3, atol=0)


def test_a_request_with_fewer_centroids_meets_none_of_the_one_before():
    device, few = device_of([pq_index(1, 64, 90, seed=2)]), pq_index(1, 64, 90, centroids=3)
    device.adopt(0, few)
    says_what_requests_say(device, [few], queries([few], 1, 4, 64), 1)


def test_what_does_not_fit_is_refused():
    device = device_of([scalar_index(2, 64, 30)], capacity=100)
    with pytest.raises(ValueError, match="ScalarIndex, got Exact"):
        device.adopt(0, Exact(2, 64))
    with pytest.raises(ValueError, match="finalize"):
        device.adopt(0, ScalarIndex(2, 64))
    for other in (
        scalar_index(1, 64, 30),
        scalar_index(2, 80, 30),
        scalar_index(2, 64, 30, bits=4),
        scalar_index(2, 64, 30, key_space="unrotated"),
    ):
        with pytest.raises(ValueError, match=r"need (\(KV heads|an index of rotated)"):
            device.adopt(0, other)
    with pytest.raises(ValueError, match="fit slots of 100 tokens"):
        device.adopt(0, scalar_index(2, 64, 101))
    with pytest.raises(ValueError, match="bfloat16"):
        device.append(torch.zeros(2, 2, 64).bfloat16(), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="bits must be"):
        DeviceScalar(1, 1, 62, 10, bits=1)


def test_product_quantization_that_does_not_fit_is_refused():
    device = device_of([pq_index(2, 64, 30)], capacity=100)
    with pytest.raises(ValueError, match="PQIndex, got ScalarIndex"):
        device.adopt(0, scalar_index(2, 64, 30))
    with pytest.raises(ValueError, match="finalize"):
        device.adopt(0, PQIndex(2, 64, bits=4))
    with pytest.raises(ValueError, match="KV heads"):
        device.adopt(0, pq_index(1, 64, 30))
    with pytest.raises(ValueError, match="codes a token"):
        device.adopt(0, pq_index(2, 64, 30, subspaces=8))
    with pytest.raises(ValueError, match="fit slots of 100 tokens"):
        device.adopt(0, pq_index(2, 64, 101))
    with pytest.raises(ValueError, match="need an index of unrotated keys"):
        DevicePQ4(1, 2, 64, 100, key_space="unrotated").adopt(0, pq_index(2, 64, 30))
    with pytest.raises(ValueError, match="bfloat16"):
        device.append(torch.zeros(2, 2, 64).bfloat16(), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="divide"):
        DevicePQ4(1, 1, 64, 10, subspaces=5)


@pytest.mark.parametrize("make", [scalar_index, pq_index])
def test_memory_is_counted_and_does_not_move(make):
    index = make(2, 64, 90)
    device = device_of([index], capacity=128)
    size, place = device.nbytes, device._codes.packed.data_ptr()
    device.append(torch.zeros(2, 2, 64), torch.tensor([90, -1], dtype=torch.int32))
    device.score(torch.zeros(2, 2, 64), torch.tensor([91, 0], dtype=torch.int32), SCALE)
    assert (size, place) == (device.nbytes, device._codes.packed.data_ptr())
    codes = 2 * 2 * 128 * (18 if make is scalar_index else 8)  # slots, heads, tokens
    books = 2 * 2 * 64 * 64 * 4 * (1 if make is scalar_index else 2)
    assert codes + books < size < 1.3 * (codes + books)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [scalar_index, pq_index])
def test_a_graph_appends_and_scores_as_the_cpu_does(make):
    index = make(2, 128, 300)
    cpu = device_of([index])
    cuda = type(cpu)(2, 2, 128, 400, device="cuda")
    cuda.adopt(0, index)
    keys, query = torch.randn(2, 2, 128).cuda(), torch.randn(2, 8, 128).cuda()
    positions = torch.tensor([299, -1], dtype=torch.int32, device="cuda")  # once, to compile
    lengths = positions + 1

    def step():
        positions.copy_(lengths.where(lengths > 0, -1))
        lengths.add_((lengths > 0).int())
        cuda.append(keys, positions)
        return cuda.score(query, lengths, SCALE)

    cuda.append(keys, positions.new_full((2,), -1))
    cuda.score(query, lengths, SCALE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for token in range(40):
        keys.copy_(torch.randn(2, 2, 128))
        graph.replay()
        cpu.append(keys.cpu(), torch.tensor([300 + token, -1], dtype=torch.int32))
    want = cpu.score(query.cpu(), torch.tensor([340, 0], dtype=torch.int32), SCALE)
    torch.testing.assert_close(found.raw.cpu(), want.raw, rtol=1e-3, atol=5e-2)
    assert ((found.raw.cpu() - want.raw).nan_to_num(0).abs() > 1e-2).float().mean() <= 0.02
