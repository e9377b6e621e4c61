"""What became of a request inside the engine, as its client is told."""

from engine.errors import Busy, DeadlineExceeded, PromptError, PromptTooLong, ServerStopping
from engine.serve.refusals import Refusal, crashed, invalid, overloaded, timed_out, too_long
from kvstore.errors import PoolFull

TOO_LONG = (
    "This is longer than what this server takes in one request. Please reduce the length of the "
    "messages, prompt or title, name fewer documents, or ask for fewer tokens."
)


def refused(error: Exception) -> Refusal:
    """The answer for any exception. Only messages that are about the request are repeated: others
    name settings and folders of the server's, which a client can neither see nor change."""
    match error:
        case Refusal():
            return error
        case PromptTooLong():
            return too_long(TOO_LONG, None)
        case PromptError():
            return invalid(str(error))
        case DeadlineExceeded():
            return timed_out("The request was not complete within its timeout_s.")
        case Busy():
            return overloaded("The server is overloaded: too many requests wait already.")
        case PoolFull():
            return overloaded("The server has no memory left for this request at the moment.")
        case ServerStopping():
            return overloaded("The server is shutting down.", 5.0, code="shutting_down")
    return crashed()
