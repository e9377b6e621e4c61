"""What became of a request inside the engine, as its client is told."""

from engine.errors import Busy, DeadlineExceeded, PromptError, PromptTooLong, ServerStopping
from engine.serve.refusals import Refusal, crashed, invalid, overloaded, timed_out, too_long
from kvstore.errors import PoolFull


def refused(error: Exception) -> Refusal:
    """The answer for any exception. Only messages that are about the request are repeated: others
    may name folders and settings of the server's, and belong into its log."""
    match error:
        case Refusal():
            return error
        case PromptTooLong():
            return too_long(str(error), None)
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
