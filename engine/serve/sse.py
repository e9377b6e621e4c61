"""Server-sent events, as OpenAI frames them: one line of JSON each, and a last one."""

from engine.serve.refusals import Refusal

MEDIA_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"  # a comment: keeps the connection, and means nothing to a client


def framed(json: bytes) -> bytes:
    """One event. JSON of one line: control characters in it are escaped."""
    return b"data: " + json + b"\n\n"


def failed(refusal: Refusal) -> bytes:
    """The last event of a stream that ends with an error, when its status was sent long ago."""
    return framed(refusal.body())
