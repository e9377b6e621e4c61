"""What a running server says, over HTTP."""

import os
import urllib.request

from engine.errors import ConfigError

KEY_VARIABLE = "HEADRACE_API_KEY"


def said(url: str, page: str, key: str | None, timeout_s: float) -> bytes:
    """The body of a page of the server at `url`.

    Args:
        key: an API key; None for that in the environment, if there is one.
    Raises:
        ConfigError: the URL or the key cannot be sent.
        OSError, http.client.HTTPException: as of `urllib.request`.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url starts with http:// or https://, got {url}")
    key = key or os.environ.get(KEY_VARIABLE)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/{page}", headers=headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return bytes(answer.read())
    except ValueError as error:  # of the URL, or of letters that a header cannot have
        raise ConfigError(f"--url or --key cannot be sent: {error}") from error
