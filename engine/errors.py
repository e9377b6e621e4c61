"""What can go wrong for a user of the engine.

    EngineError
    ├── ModelError     the model cannot be served: unknown, incomplete, quantized, not reproduced
    ├── PromptError    the request cannot be: empty, token ids out of range
    │   └── PromptTooLong  more tokens than the model has positions, or a budget holds
    ├── ConfigError    a setting is unknown or out of range
    ├── Busy           too many requests wait already: try again later
    ├── ServerStopping no new requests are taken
    ├── Cancelled      whoever asked has withdrawn the request
    └── DeadlineExceeded   the request did not end in the time it was given

Each message says what was needed, what came, and what to change. The store has its own
tree in `kvstore.errors`.
"""


class EngineError(Exception):
    """Base of the engine's errors: the message is for the user, no traceback needed."""


class ModelError(EngineError):
    """The model cannot be loaded or is not reproduced by its pieces."""


class PromptError(EngineError, ValueError):
    """The request cannot be served."""


class PromptTooLong(PromptError):
    """The request would be served if it were shorter."""


class ConfigError(EngineError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""


class Busy(EngineError):
    """As many requests wait as may wait: the same request can be served later."""


class ServerStopping(EngineError):
    """The service is being stopped: it takes no new requests, and ends those that take too long."""


class Cancelled(EngineError):
    """The request was withdrawn before it ended."""


class DeadlineExceeded(EngineError):
    """The request did not end before its deadline; what it made until then was delivered."""
