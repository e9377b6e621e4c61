"""Codebooks of a batch against the index of each request: vector and product quantization."""

import pytest
import torch

from native.gpu import interpreted
from retrieval.device.codebook import DeviceBooks
from retrieval.device.index import DeviceIndex
from retrieval.device.pq import DevicePQ8
from retrieval.device.vq import DeviceVQ
from retrieval.exact import Exact
from retrieval.kernels.score_lookup import score_lookup_triton
from retrieval.pq import PQIndex
from retrieval.vq import Guard, VQIndex
from tests.retrieval.captured import captured_step
from tests.retrieval.device.slots import SCALE, SLOTS, check, decode, queries
from tests.retrieval.keys import fill, make_keys

CAPACITY = 400
PROMPTS = {0: 300, 1: 9, 3: 127}  # slot 2 is free; slot 1 has fewer keys than centroids
GUARD = Guard(error=0.3, share=1.0, tokens=8)
KINDS = ["vq", "pq"]
EVERY = pytest.mark.parametrize("name", KINDS)


def make_device(
    name, heads, dim, dtype=torch.float32, where="cpu", *, capacity=CAPACITY, centroids=40
):
    if name == "pq":
        return DevicePQ8(SLOTS, heads, dim, capacity, where, subspaces=8)
    options = {"centroids": centroids, "exact_tokens": GUARD.tokens}
    return DeviceVQ(SLOTS, heads, dim, capacity, dtype, where, **options)


def make_index(name, keys, prompt, *, calibrated=True, centroids=32):
    """The index of one request: its prompt is final, further keys are appended one by one."""
    heads, _, dim = keys.shape
    options = {"iterations": 2}
    if name == "pq":
        index = PQIndex(heads, dim, keys.dtype, subspaces=8, **options)
    else:
        options |= {"centroids": centroids, "guard": GUARD}
        index = VQIndex(heads, dim, keys.dtype, **options)
    if calibrated:
        index.calibrate(make_keys(heads, 50, dim, seed=77))
    return fill(index, keys, range(prompt, keys.shape[1]), prompt)


@EVERY
@pytest.mark.parametrize(("heads", "group", "dim"), [(2, 4, 64), (1, 3, 80), (2, 1, 128)])
@pytest.mark.parametrize("calibrated", [True, False], ids=["metric", "plain"])
def test_every_slot_scores_as_its_own_index_after_adoption_and_after_appends(
    name, heads, group, dim, calibrated
):
    dtype = torch.bfloat16 if group == 4 else torch.float32
    device = make_device(name, heads, dim, dtype)
    assert isinstance(device, DeviceIndex)
    assert (device.unit_tokens, device.outliers) == (1, None)
    keys = {s: make_keys(heads, n + 40, dim, dtype, seed=s) for s, n in PROMPTS.items()}
    how = {"calibrated": calibrated}
    prompts = {s: make_index(name, x[:, : PROMPTS[s]], PROMPTS[s], **how) for s, x in keys.items()}
    if name == "vq":
        assert 0 < prompts[0].stats.exact_tokens <= GUARD.tokens
    for slot, index in prompts.items():
        device.adopt(slot, index)
    query = queries(heads * group, dim, dtype)
    check(device, prompts, query)
    decode(device, keys, PROMPTS, 40)
    check(device, {s: make_index(name, x, PROMPTS[s], **how) for s, x in keys.items()}, query)


@pytest.mark.skipif(not interpreted(), reason="kernels run on a CPU interpreted only")
@pytest.mark.parametrize(("name", "centroids"), [("vq", 32), ("vq", 300), ("pq", 32)])
def test_the_kernel_scores_as_each_index(name, centroids, monkeypatch):
    for module in ("pq", "vq"):
        monkeypatch.setattr(f"retrieval.device.{module}.score_lookup", score_lookup_triton)
    device = make_device(name, 1, 64, capacity=131, centroids=centroids)
    made = {s: make_keys(1, n, 64, seed=s) for s, n in [(0, 99), (3, 131)]}
    indexes = {s: make_index(name, x, x.shape[1]) for s, x in made.items()}
    for slot, index in indexes.items():
        device.adopt(slot, index)
    check(device, indexes, queries(4, 64))


def test_codes_of_16_bits_have_no_sign():
    """The kept keys' codes lie behind the centroids', here behind the sign bit."""
    device = make_device("vq", 1, 16, capacity=60, centroids=1 << 15)
    index = make_index("vq", make_keys(1, 60, 16), 60, centroids=4)
    assert index.stats.exact_tokens
    device.adopt(0, index)
    assert (device._codes < 0).any()
    check(device, {0: index}, queries(2, 16))


def test_a_kept_key_scores_exactly():
    keys, device = make_keys(2, 200, 64), make_device("vq", 2, 64)
    index = make_index("vq", keys, 200)
    device.adopt(1, index)
    query, kept = queries(4, 64), index.state()["exact"].repeat_interleave(2, 0)
    found = device.score(query, torch.tensor([0, 200, 0, 0], dtype=torch.int32), SCALE).raw[1]
    exact = Exact(2, 64)
    exact.append(keys)
    want = exact.score(query[1])[:, :200].gather(1, kept)
    torch.testing.assert_close(found.gather(1, kept), want, rtol=1e-5, atol=1e-4)


@EVERY
def test_a_slot_serves_another_request_after_clear(name):
    device = make_device(name, 2, 64)
    first, second = make_keys(2, 390, 64, seed=5), make_keys(2, 70, 64, seed=6)
    device.adopt(1, make_index(name, first, 390))
    device.clear(1)
    device._codes.fill_(-1 if name == "vq" and device._codes.dtype == torch.int16 else 255)
    index = make_index(name, second[:, :43], 43, calibrated=False, centroids=8)
    device.adopt(1, index)
    check(device, {1: index}, queries(6, 64))
    for position in range(43, 70):
        positions = torch.tensor([-1, position, -1, -1], dtype=torch.int32)
        device.append(second[None, :, position].expand(SLOTS, -1, -1), positions)
    check(device, {1: make_index(name, second, 43, calibrated=False, centroids=8)}, queries(6, 64))


@EVERY
def test_a_slot_without_a_position_keeps_what_it_has(name):
    device, index = make_device(name, 2, 64), make_index(name, make_keys(2, 45, 64), 45)
    device.adopt(0, index)
    device.append(torch.full((SLOTS, 2, 64), torch.nan), torch.full((SLOTS,), -1).int())
    check(device, {0: index}, queries(2, 64))


@EVERY
def test_what_does_not_fit_is_refused(name):
    keys, device = make_keys(2, 401, 64), make_device(name, 2, 64)
    with pytest.raises(ValueError, match="raise capacity"):
        device.adopt(0, make_index(name, keys, 401))
    with pytest.raises(ValueError, match="KV heads"):
        device.adopt(0, make_index(name, keys[:1, :9], 9))
    other = make_index("pq" if name == "vq" else "vq", keys[:, :9], 9)
    with pytest.raises(ValueError, match=f"need {'VQIndex' if name == 'vq' else 'PQIndex'}"):
        device.adopt(0, other)
    waiting = VQIndex(2, 64) if name == "vq" else PQIndex(2, 64)
    with pytest.raises(ValueError, match="finalize"):
        device.adopt(0, waiting)
    spaces = {"vq": "rotated", "pq": "unrotated"}
    wrong = {"vq": VQIndex, "pq": PQIndex}[name](2, 64, key_space=spaces[name])
    wrong.append(keys[:, :9])
    wrong.finalize()
    with pytest.raises(ValueError, match=f"got {spaces[name]} ones"):
        device.adopt(0, wrong)


def test_settings_and_codebooks_out_of_range_are_refused():
    keys = make_keys(2, 100, 64)
    with pytest.raises(ValueError, match=r"1 \.\. 65536 together"):
        DeviceVQ(1, 1, 8, 10, centroids=65530)
    with pytest.raises(ValueError, match="divide the 64"):
        DevicePQ8(1, 1, 64, 10, subspaces=7)
    with pytest.raises(ValueError, match="at most 16 centroids"):
        make_device("vq", 2, 64, centroids=16).adopt(0, make_index("vq", keys, 100))
    with pytest.raises(ValueError, match=r"kept keys in torch\.bfloat16"):
        make_device("vq", 2, 64, torch.bfloat16).adopt(0, make_index("vq", keys, 100))
    four = fill(PQIndex(2, 64, bits=4, iterations=1), keys, [], 100)
    with pytest.raises(ValueError, match="8 bits, got 4"):
        make_device("pq", 2, 64).adopt(0, four)


@EVERY
def test_bytes_are_those_of_its_tensors(name):
    device = make_device(name, 2, 64)
    parts = [x for x in vars(device).values() if isinstance(x, DeviceBooks)]
    held = [y for x in [device, *parts] for y in vars(x).values() if isinstance(y, torch.Tensor)]
    assert device.nbytes == sum(x.nbytes for x in held)


@pytest.mark.gpu
@EVERY
def test_an_append_and_its_scores_can_be_captured(name):
    keys, query = make_keys(2, 101, 64), queries(8, 64)
    device = make_device(name, 2, 64, where="cuda")
    device.adopt(0, make_index(name, keys[:, :100], 100))
    want = make_index(name, keys, 100).score(query[0])
    captured_step(device, keys[:, 100], 100, query, want, SCALE)
