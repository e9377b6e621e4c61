"""One request as the event loop sees it: what it has read ends when the service is done with it."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest

from engine.errors import Busy, Cancelled
from engine.rag.catalogue import CatalogueError
from engine.rag.shelf import Reading
from engine.request import Completion, Event, RequestStats
from engine.serve.answering import Answering
from engine.service.ask import Ask, Failure, Listener, Ticket
from tests.engine.serve.server import LIMIT_S

ASK = Ask(prompt=[1], max_new_tokens=9)
DONE = Completion([1, 2], "ab", "stop", RequestStats(1, 0, 0.1, 0.2, 2))


class Slow:
    """A service that has not yet done what it is told."""

    def __init__(self) -> None:
        self.refusal: Exception | None = None
        self.cancelled: Queue[Ticket] = Queue()
        self.say: Listener = lambda event: None

    def submit(self, ask: Ask, listener: Listener) -> Ticket:
        if self.refusal is not None:
            raise self.refusal
        self.say = listener
        return Ticket(1)

    def cancel(self, ticket: Ticket) -> None:
        self.cancelled.put(ticket)


class Noted(Reading):
    """What becomes of a reading."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.over = threading.Event()

    def begin(self) -> None:
        self.said.append("begun")

    def withdraw(self) -> None:
        self.said.append("withdrawn")

    def end(self, generated: Sequence[int], done: Completion | None) -> None:
        self.said += [list(generated), done]
        self.over.set()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def answering(
    threads: ThreadPoolExecutor, act: Callable[[Answering, Slow, Noted], Coroutine[Any, Any, None]]
) -> None:
    async def whole() -> None:
        service: Any = Slow()
        await act(Answering(service, threads), service, Noted())

    asyncio.run(whole())


def test_a_reading_ends_after_the_last_word_of_a_request_that_was_cancelled(threads):
    async def act(made, service, reading):
        made.start(ASK, reading)
        service.say(Event(1, "a"))
        made.close()
        assert await asyncio.to_thread(service.cancelled.get, timeout=LIMIT_S) == Ticket(1)
        threads.submit(lambda: None).result(LIMIT_S)  # all that was to be done is done
        assert reading.said == ["begun"]  # KV may still be stored
        service.say(Event(2, "b"))
        service.say(Failure(Cancelled("it was")))
        assert await asyncio.to_thread(reading.over.wait, LIMIT_S)
        assert reading.said == ["begun", [1, 2], None]

    answering(threads, act)


def test_so_does_that_of_one_that_is_submitted_after_its_client_has_left(threads):
    async def act(made, service, reading):
        made.close()
        made.start(ASK, reading)
        assert service.cancelled.get(timeout=LIMIT_S) == Ticket(1)
        assert reading.said == ["begun"]
        service.say(Failure(Cancelled("it was")))
        assert await asyncio.to_thread(reading.over.wait, LIMIT_S)
        assert reading.said == ["begun", [], None]

    answering(threads, act)


def test_a_reading_ends_once_with_all_tokens_of_an_answer(threads):
    async def act(made, service, reading):
        made.start(ASK, reading)
        service.say(Event(1, "a"))
        service.say(Event(2, "b", DONE))
        assert len(await made.all()) == 2
        await made.settled()
        assert reading.said == ["begun", [1, 2], DONE]
        made.close()
        threads.submit(lambda: None).result(LIMIT_S)
        assert reading.said == ["begun", [1, 2], DONE]
        assert service.cancelled.empty()

    answering(threads, act)


@pytest.mark.parametrize("late", [False, True])
def test_a_reading_that_cannot_end_behind_its_clients_back_is_in_the_log(threads, caplog, late):
    def full(*_):
        raise CatalogueError("no space left")

    async def act(made, service, reading):
        reading.end = full
        made.start(ASK, reading)
        if late:
            made.close()
        service.say(Failure(Cancelled("it was")))
        made.close()
        threads.shutdown()
        [said] = [record for record in caplog.records if record.levelname == "ERROR"]
        assert said.getMessage() == "KV of an answer may outlive its documents: no space left"
        assert said.exc_info is None

    answering(threads, act)


def test_what_was_never_submitted_leaves_no_reading(threads):
    async def act(made, service, reading):
        service.refusal = Busy("too many")
        with pytest.raises(Busy):
            made.start(ASK, reading)
        made.close()
        assert reading.said == ["begun", "withdrawn"]

    answering(threads, act)


def test_tokens_count_that_nobody_has_taken(threads):
    async def act(made, service, reading):
        made.start(ASK, None)
        for number in range(5):
            service.say(Event(number, "x"))
        assert made.generated == 5

    answering(threads, act)
