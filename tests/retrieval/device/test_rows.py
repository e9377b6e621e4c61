"""Rows of a batch against the index of each request: landmarks, bounds and keys."""

import pytest
import torch

from native.gpu import interpreted
from retrieval.device.index import DeviceIndex
from retrieval.device.rows import BOUNDS, KEYS, LANDMARKS, DeviceRows
from retrieval.exact import Exact
from retrieval.kernels.score_rows import score_rows_triton
from retrieval.landmarks import Landmarks
from retrieval.quest import Quest
from tests.retrieval.captured import captured_step
from tests.retrieval.device.slots import SCALE, SLOTS, check, decode, queries
from tests.retrieval.keys import fill, make_keys

CAPACITY, OUTLIERS = 400, 3
PROMPTS = {0: 300, 1: 1, 3: 127}  # slot 2 is free
KINDS = {
    "landmarks": (LANDMARKS, Landmarks, {"chunk": 8, "outlier_chunks": OUTLIERS}),
    "bounds": (BOUNDS, Quest, {"page": 16}),
    "keys": (KEYS, Exact, {}),
}
EVERY = pytest.mark.parametrize("name", KINDS)


def make_device(name, heads, dim, dtype, where="cpu", *, capacity=CAPACITY):
    kind, _, options = KINDS[name]
    unit = options.get("chunk", options.get("page", 1))
    outlier_units = options.get("outlier_chunks", 0)
    return DeviceRows(
        *(kind, SLOTS, heads, dim, capacity, dtype, where), unit=unit, outlier_units=outlier_units
    )


def make_index(name, keys, prompt):
    """The index of one request: its prompt is final, further keys are appended one by one."""
    _, kind, options = KINDS[name]
    index = kind(len(keys), keys.shape[2], keys.dtype, **options)
    return fill(index, keys, range(prompt, keys.shape[1]), prompt)


def make_requests(heads, dim, dtype, more):
    """Keys of the request of each slot in use, `more` behind its prompt."""
    return {s: make_keys(heads, n + more, dim, dtype, seed=s) for s, n in PROMPTS.items()}


@EVERY
@pytest.mark.parametrize(("heads", "group", "dim"), [(2, 4, 64), (1, 3, 80), (2, 1, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_slot_scores_as_its_own_index_after_adoption_and_after_appends(
    name, heads, group, dim, dtype
):
    device, requests = make_device(name, heads, dim, dtype), make_requests(heads, dim, dtype, 40)
    assert isinstance(device, DeviceIndex)
    assert device.outliers is None or (device.outliers == -1).all()
    prompts = {s: make_index(name, x[:, : PROMPTS[s]], PROMPTS[s]) for s, x in requests.items()}
    for slot, index in prompts.items():
        device.adopt(slot, index)
    query = queries(heads * group, dim, dtype)
    check(device, prompts, query)
    decode(device, requests, PROMPTS, 40)
    check(device, {s: make_index(name, x, PROMPTS[s]) for s, x in requests.items()}, query)


@EVERY
def test_an_index_may_be_adopted_in_the_middle_of_a_unit_that_was_appended_to(name):
    requests = make_requests(2, 64, torch.bfloat16, 13)
    device = make_device(name, 2, 64, torch.bfloat16)
    indexes = {s: make_index(name, x, PROMPTS[s]) for s, x in requests.items()}
    for slot, index in indexes.items():
        device.adopt(slot, index)
    check(device, indexes, queries(8, 64))


@EVERY
def test_a_slot_serves_another_request_after_clear(name):
    device = make_device(name, 2, 64, torch.float32)
    first, second = make_keys(2, 390, 64, seed=5), make_keys(2, 70, 64, seed=6)
    device.adopt(1, make_index(name, first, 390))
    device.clear(1)
    assert device.outliers is None or (device.outliers == -1).all()
    for part in (device._rows, device._open):
        part.fill_(torch.nan)  # what another left does not matter
    index = make_index(name, second[:, :43], 43)
    device.adopt(1, index)
    check(device, {1: index}, queries(6, 64))
    for position in range(43, 70):
        positions = torch.tensor([-1, position, -1, -1], dtype=torch.int32)
        device.append(second[None, :, position].expand(SLOTS, -1, -1), positions)
    check(device, {1: make_index(name, second, 43)}, queries(6, 64))


@pytest.mark.skipif(not interpreted(), reason="kernels run on a CPU interpreted only")
@EVERY
def test_the_kernel_scores_as_each_index(name, monkeypatch):
    monkeypatch.setattr("retrieval.device.rows.score_rows", score_rows_triton)
    device = make_device(name, 2, 64, torch.bfloat16, capacity=131)
    indexes = {
        s: make_index(name, make_keys(2, n, 64, torch.bfloat16), n) for s, n in [(0, 99), (3, 131)]
    }
    for slot, index in indexes.items():
        device.adopt(slot, index)
    check(device, indexes, queries(6, 64, torch.bfloat16))


@EVERY
def test_a_slot_without_a_position_keeps_what_it_has(name):
    device = make_device(name, 2, 64, torch.float32)
    index = make_index(name, make_keys(2, 45, 64), 45)
    device.adopt(0, index)
    device.append(torch.full((SLOTS, 2, 64), torch.nan), torch.full((SLOTS,), -1).int())
    check(device, {0: index}, queries(2, 64))


@EVERY
def test_a_prompt_may_be_empty_and_a_slot_full(name):
    device = make_device(name, 1, 64, torch.float32, capacity=33)
    keys = make_keys(1, 33, 64)
    device.adopt(2, make_index(name, keys[:, :0], 0))
    for position in range(33):
        positions = torch.tensor([-1, -1, position, -1], dtype=torch.int32)
        device.append(keys[None, :, position].expand(SLOTS, -1, -1), positions)
    check(device, {2: make_index(name, keys, 0)}, queries(3, 64))


def test_an_outlier_has_no_share_in_the_softmax_and_its_tokens_are_named():
    device = make_device("landmarks", 1, 64, torch.float32)
    index = make_index("landmarks", make_keys(1, 200, 64), 200)
    device.adopt(0, index)
    found = device.score(queries(1, 64), torch.tensor([200, 0, 0, 0]).int(), SCALE)
    assert device.outliers.shape == (SLOTS, 1, OUTLIERS * 8)
    chosen = device.outliers[0, 0, ::8].long() // 8
    assert (found.raw[0, 0, chosen] == -torch.inf).all()
    assert found.raw[0, 0, :25].isfinite().sum() == 25 - OUTLIERS


@EVERY
def test_what_does_not_fit_is_refused(name):
    device, kind = make_device(name, 2, 64, torch.float32), KINDS[name][1]
    keys = make_keys(2, 401, 64)
    with pytest.raises(ValueError, match="raise capacity"):
        device.adopt(0, make_index(name, keys, 401))
    with pytest.raises(ValueError, match="row width, dtype"):
        device.adopt(0, make_index(name, keys[:, :9].bfloat16(), 9))
    with pytest.raises(ValueError, match="row width, dtype"):
        device.adopt(0, make_index(name, keys[:1, :9], 9))
    other = next(x for x in KINDS if x != name)
    with pytest.raises(ValueError, match=f"need a {kind.__name__}"):
        device.adopt(0, make_index(other, keys[:, :9], 9))


@pytest.mark.parametrize("name", ["landmarks", "bounds"])
def test_an_index_that_holds_its_keys_is_refused(name):
    _, kind, options = KINDS[name]
    with pytest.raises(ValueError, match="finalize"):
        make_device(name, 2, 64, torch.float32).adopt(0, kind(2, 64, **options))


def test_units_and_outliers_are_those_of_the_kind():
    device = make_device("landmarks", 2, 64, torch.float32)
    with pytest.raises(ValueError, match="unit"):
        device.adopt(0, fill(Landmarks(2, 64, chunk=4), make_keys(2, 20, 64), [], 20))
    with pytest.raises(ValueError, match="raise capacity or outlier_units"):
        device.adopt(0, fill(Landmarks(2, 64, outlier_chunks=4), make_keys(2, 99, 64), [], 99))
    for kind, options in [
        (KEYS, {"unit": 2}),
        (BOUNDS, {"outlier_units": 1}),
        (LANDMARKS, {"unit": 0}),
        (LANDMARKS, {"outlier_units": -1}),
    ]:
        with pytest.raises(ValueError, match="unit"):
            DeviceRows(kind, 1, 1, 8, 10, **options)


@EVERY
def test_bytes_are_those_of_its_tensors(name):
    device = make_device(name, 2, 64, torch.bfloat16)
    held = [x for x in vars(device).values() if isinstance(x, torch.Tensor)]
    assert device.nbytes == sum(x.nbytes for x in held)


@pytest.mark.gpu
@EVERY
def test_an_append_and_its_scores_can_be_captured(name):
    keys, query = make_keys(2, 101, 64, torch.bfloat16), queries(8, 64)
    device = make_device(name, 2, 64, torch.bfloat16, "cuda")
    device.adopt(0, make_index(name, keys[:, :100], 100))
    want = make_index(name, keys, 100).score(query[0])
    captured_step(device, keys[:, 100], 100, query, want, SCALE)
