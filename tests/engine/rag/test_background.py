"""Generators in threads: the same items, errors where they belong, and nothing goes on unseen."""

import asyncio
import threading

import pytest

from engine.method import preset
from engine.rag import Rag
from engine.rag.background import in_thread
from tests.engine.rag.corpus import FACTS, Parts, documents


def test_items_come_in_order_from_another_thread():
    async def run():
        return [item async for item in in_thread(numbers)]

    def numbers():
        for number in range(5):
            yield number, threading.current_thread().name

    assert asyncio.run(run()) == [(number, "headrace-request") for number in range(5)]


@pytest.mark.parametrize("at", [0, 2])
def test_an_error_is_raised_where_the_items_are_waited_for(at):
    def failing():
        yield from range(at)
        raise ValueError("no more")

    async def collect():
        async for item in in_thread(failing):
            seen.append(item)

    seen = []
    with pytest.raises(ValueError, match="no more"):
        asyncio.run(collect())
    assert seen == list(range(at))


def test_leaving_early_closes_the_generator_before_it_returns():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    async def run():
        items = in_thread(endless)
        await anext(items)
        await items.aclose()
        assert closed.is_set()

    asyncio.run(run())
    assert not [t for t in threading.enumerate() if t.name == "headrace-request"]


# the SDK's async side


@pytest.fixture(scope="module")
def rag():
    sparse = dict(method=preset("headrace", budget=64), pinned_bytes=1 << 26)
    with Parts().engine(**sparse) as engine:
        made = Rag(engine, 128)
        made.add(documents())
        yield made


def test_async_answers_are_those_of_ask(rag):
    async def run():
        answers = [rag.aask(fact.question, max_new_tokens=8) for fact in FACTS[:2]]
        return await asyncio.gather(*answers)

    want = [rag.ask(fact.question, max_new_tokens=8).tokens for fact in FACTS[:2]]
    assert [answer.tokens for answer in asyncio.run(run())] == want


def test_the_event_loop_goes_on_while_an_answer_is_computed(rag):
    async def run():
        asked = asyncio.create_task(rag.aask(FACTS[0].question, max_new_tokens=8))
        turns = 0
        while not asked.done():
            await asyncio.sleep(0)
            turns += 1
        return turns, await asked

    turns, answer = asyncio.run(run())
    assert turns > 3
    assert FACTS[0].answered_by(answer.text)


def test_an_async_stream_ends_with_the_answer(rag):
    async def run():
        return [step async for step in rag.astream(FACTS[0].question, max_new_tokens=8)]

    steps = asyncio.run(run())
    assert steps[-1].answer.text == "".join(step.text for step in steps)


def test_cancelling_frees_the_request(rag):
    free = rag.engine.memory.pool.free_blocks

    async def run():
        asked = asyncio.create_task(rag.aask("Is there a tiger?", max_new_tokens=2000))
        while rag.engine.memory.pool.free_blocks == free:
            await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert rag.engine.memory.pool.free_blocks == free

    asyncio.run(run())


def test_what_is_wrong_is_raised_in_the_async_call(rag):
    with pytest.raises(ValueError, match="there is no chunk 'nobody'"):
        asyncio.run(rag.aask("tiger?", ["nobody"]))
