"""The thread that turns tokens into events, while the next step is computed."""

import logging
import queue
import threading
import time
from collections.abc import Callable

from engine.request import Chosen
from engine.service.ask import Failure
from engine.service.live import Live

log = logging.getLogger(__name__)


class Outbox:
    """Decodes text, looks for stop strings, and calls listeners, in the order of `put`.

    Args:
        enough: called for a request whose text has ended, or whom nobody listens to any more,
            while the engine thread may still be at its next token.
    """

    def __init__(self, enough: Callable[[Live], None]) -> None:
        self._enough = enough
        self._items: queue.SimpleQueue[tuple[Live, Chosen | Failure, int] | None]
        self._items = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="headrace-outbox", daemon=True)
        self._thread.start()

    def put(self, live: Live, item: Chosen | Failure) -> None:
        """What happened to a request. Nothing is told after its end."""
        self._items.put((live, item, time.perf_counter_ns()))

    def close(self) -> None:
        """Return when all that was put is told."""
        self._items.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (entry := self._items.get()) is not None:
            live, item, put_ns = entry
            if not live.quiet:
                self._tell(live, item, put_ns)

    def _tell(self, live: Live, item: Chosen | Failure, put_ns: int) -> None:
        """One event; a listener that fails has heard enough."""
        try:
            event = item if isinstance(item, Failure) else live.run.tell(item)
        except Exception as error:  # a tokenizer's: it ends this request and no other
            log.exception("cannot decode the text of %s", live.ticket)
            event = Failure(error)
        live.quiet = isinstance(event, Failure) or event.completion is not None
        try:
            live.listener(event)
        except Exception:
            log.exception("the listener of %s failed", live.ticket)
            live.quiet = True
        if live.ask.trace is not None:
            live.ask.trace.add("detokenise", put_ns, time.perf_counter_ns())
        ended = isinstance(item, Failure) or item.ending is not None
        if live.quiet and not ended:
            self._enough(live)
