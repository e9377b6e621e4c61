"""Generators that work in threads, for callers that must not wait in theirs."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")


class _End:
    """The generator has ended: well, or with this error."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


async def in_thread(make: Callable[[], Generator[T]]) -> AsyncGenerator[T]:
    """What a generator yields, from a thread of its own, in which it is made, run and closed.

    Leaving early (also by cancellation) closes the generator at its next item, and returns when
    that is done: nothing goes on behind the caller's back.
    """
    loop, left = asyncio.get_running_loop(), threading.Event()
    items: asyncio.Queue[T | _End] = asyncio.Queue()

    def work() -> None:
        end = _End()
        try:
            with closing(make()) as made:
                for item in made:
                    loop.call_soon_threadsafe(items.put_nowait, item)
                    if left.is_set():
                        break
        except BaseException as error:  # belongs to whoever waits for the items
            end = _End(error)
        loop.call_soon_threadsafe(items.put_nowait, end)

    thread = threading.Thread(target=work, name="headrace-request", daemon=True)
    thread.start()
    end: T | _End | None = None
    try:
        while not isinstance(end := await items.get(), _End):
            yield end
    finally:
        left.set()
        while not isinstance(end, _End):
            end = await items.get()
        thread.join()
    if end.error is not None:
        raise end.error
