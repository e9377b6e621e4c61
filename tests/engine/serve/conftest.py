"""What most tests of the server need."""

from collections.abc import Iterator

import pytest

from tests.engine.serve.server import Running, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server with the little model and the usual settings, for a whole file of tests."""
    with running() as made:
        yield made
