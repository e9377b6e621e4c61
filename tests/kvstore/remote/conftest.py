"""A server for the tests that need one."""

import pytest

from tests.kvstore.remote.server import serving


@pytest.fixture(scope="module")
def one_server():
    with serving() as server:
        yield server


@pytest.fixture
def server(one_server):
    """Empty, and not to be killed: others use it afterwards."""
    with one_server.client() as client:
        client.flushall()
    return one_server
