"""Answers for errors of the server's parts, and the log of what was its own fault."""

import logging
from collections.abc import Callable

from engine.errors import EngineError
from engine.rag.library import Unknown
from engine.serve.failures import refused
from engine.serve.limits import Exceeded
from engine.serve.refusals import Refusal, rate_limited
from kvstore.errors import StoreError

log = logging.getLogger(__name__)
UNNOTED = "KV of an answer may outlive its documents"


def logged(work: Callable[[], object], said: str) -> None:
    """Do what nobody waits for: the log is told if it goes wrong."""
    try:
        work()
    except (EngineError, StoreError) as error:  # they say themselves what it was
        log.error("%s: %s", said, error)
    except Exception:
        log.exception("%s", said)


def refusal_of(error: Exception) -> Refusal:
    """The answer for any error; see `engine.serve.failures` for those of the engine."""
    if isinstance(error, Exceeded):
        return rate_limited(str(error), error.retry_s, type=error.what)
    if isinstance(error, Unknown):
        return Refusal(404, str(error), param="documents", code="not_found")
    refusal = refused(error)
    if refusal.status == 500:
        known = isinstance(error, EngineError | StoreError)  # they say themselves what it was
        log.error("a request failed: %s", error, exc_info=None if known else error)
    return refusal
