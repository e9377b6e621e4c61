"""Blocks of unrotated KV, as loops leave them behind."""

import pytest
import torch

from engine.model.hf import HFModel
from engine.recorder import Recorder
from tests.engine.families import build

SIZE, TOKENS = 16, 70


@pytest.fixture(scope="module")
def shape():
    return HFModel(build("llama")).shape


@pytest.fixture(scope="module")
def layers(shape):
    """Keys and values of every layer."""
    generator = torch.Generator().manual_seed(5)
    size = (shape.num_layers, 2, shape.num_kv_heads, TOKENS, shape.head_dim)
    return torch.randn(size, generator=generator)


def assert_blocks(found, layers, numbers):
    assert [number for number, _ in found] == list(numbers)
    for number, block in found:
        want = layers[..., number * SIZE : (number + 1) * SIZE, :]
        assert torch.equal(block.data, want)


@pytest.mark.parametrize("run", [1, 7, 16, 33, TOKENS])
@pytest.mark.parametrize("start", [0, 2 * SIZE])
def test_a_layer_after_the_other_or_a_run_after_the_other_the_blocks_are_the_same(
    shape, layers, run, start
):
    for by_layer in (True, False):
        recorder = Recorder(shape, size=SIZE, start=start)
        places = [(i, at) for i in range(shape.num_layers) for at in range(0, TOKENS, run)]
        for i, at in places if by_layer else sorted(places, key=lambda place: place[1]):
            recorder.write(i, at, *layers[i, :, :, at : at + run])
        assert_blocks(recorder.take(TOKENS), layers, range(start // SIZE, TOKENS // SIZE))
        ((number, rest),) = recorder.rest(TOKENS)
        assert number == TOKENS // SIZE
        assert torch.equal(rest.data, layers[..., number * SIZE :, :])


@pytest.mark.parametrize("stop", [0, SIZE - 1, SIZE, 2 * SIZE + 5, 10 * SIZE])
def test_what_is_not_whole_at_the_stop_is_not_recorded(shape, layers, stop):
    recorder = Recorder(shape, size=SIZE, start=0, stop=stop)
    for i in range(shape.num_layers):
        recorder.write(i, 0, *layers[i, :, :, : TOKENS - 1])
    recorder.write_token(TOKENS - 1, layers[..., TOKENS - 1, :])
    assert_blocks(recorder.take(TOKENS), layers, range(min(stop, TOKENS) // SIZE))
    assert bool(recorder._open) == (stop > TOKENS)


ELSEWHERE = torch.device("meta")  # as another device: it has tensors, but no numbers in them


def test_blocks_are_filled_where_it_was_said_and_move_with_what_is_in_them(shape, layers):
    recorder = Recorder(shape, size=SIZE, start=0)
    recorder.write(0, 0, *layers[0, :, :, :20])
    recorder.fill_on(ELSEWHERE)
    recorder.write(0, 20, *layers[0, :, :, 20:40])
    assert {block.device for block in recorder._open.values()} == {ELSEWHERE}
    recorder = Recorder(shape, size=SIZE, start=0)
    recorder.write(0, 0, *layers[0, :, :, :20])
    recorder.fill_on(torch.device("cpu"))
    recorder.write(0, 20, *layers[0, :, :, 20:])
    for i in range(1, shape.num_layers):
        recorder.write(i, 0, *layers[i])
    assert_blocks(recorder.take(TOKENS), layers, range(TOKENS // SIZE))


def test_blocks_lie_in_the_memory_that_a_store_gives(shape, layers):
    given = []

    def empty(size, dtype):
        given.append(torch.empty(size, dtype=dtype))
        return given[-1]

    recorder = Recorder(shape, size=SIZE, start=0, empty=empty)
    for i in range(shape.num_layers):
        recorder.write(i, 0, *layers[i])
    taken = [*recorder.take(TOKENS), *recorder.rest(TOKENS)]
    assert_blocks(taken[:-1], layers, range(TOKENS // SIZE))
    addresses = {tensor.data_ptr() for tensor in given}
    assert {block.data.data_ptr() for _, block in taken} <= addresses
    assert len(given) == len(taken) + 1  # the rest was filled in a whole one


def test_recording_starts_at_the_border_of_a_block(shape):
    with pytest.raises(ValueError, match="multiple of 16"):
        Recorder(shape, size=SIZE, start=17)
