"""The body of a request: not longer, and not slower, than allowed."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from engine.serve.refusals import Refusal, too_large, wrong_encoding, wrong_media_type

T = TypeVar("T")
DRAINED = 4  # times the limit: so much of a body that is too long is read, and dropped


class Gone(Exception):
    """The client has left."""


async def read_body(request: Request, limit_bytes: int, timeout_s: float) -> bytes:
    """The whole body, which is said to be JSON, as it is.

    Raises:
        Refusal: 413, 415, or 408 for one that does not arrive in time.
        Gone: half of it came.
    """
    given = request.headers.get("content-type", "application/json")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise _closing(wrong_media_type(given))
    if (encoding := request.headers.get("content-encoding", "identity")).lower() != "identity":
        raise _closing(wrong_encoding(encoding))
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(request, limit_bytes)
    except TimeoutError:
        message = f"The request body took longer than {timeout_s:g} s."
        raise _closing(Refusal(408, message, code="request_timeout")) from None
    except ClientDisconnect:
        raise Gone from None


async def _read(request: Request, limit_bytes: int) -> bytes:
    length = request.headers.get("content-length", "0")  # h11 has checked that it is a number
    size, drained = int(length), DRAINED * limit_bytes
    if size > drained:
        raise _closing(too_large(limit_bytes))
    parts: list[bytes] = []
    total = 0
    async for part in request.stream():
        total += len(part)
        if total <= limit_bytes:
            parts.append(part)
        elif total > drained:
            break
        else:  # most clients look at the answer only when all is sent
            parts.clear()
    if total > limit_bytes:
        raise _closing(too_large(limit_bytes))
    return b"".join(parts)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` makes, cancelled as soon as the client leaves. Call it when the body is read.

    Raises:
        Gone: it left.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.wait({task, watch})
        del task, one  # whose error knows this frame: a ring, which would keep all of the request


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # what follows a whole body is nothing


def _closing(refusal: Refusal) -> Refusal:
    """The same, and the connection ends: there may be more of the body."""
    refusal.headers["connection"] = "close"
    return refusal
