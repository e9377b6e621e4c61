"""Senders that are killed, and a server that changes what it was sent."""

from tests.kvstore.faults.count import Count
from tests.kvstore.remote import crash
from tests.kvstore.remote.server import serving
from tests.kvstore.remote.test_tampering import KEYS, flip_all, written

FLIPS = 24  # at least: each of a class of the bytes of a value


def senders_killed(_folder, rounds, seed):
    with serving() as server:
        return counted(rounds, crash.campaign, server.url, rounds, seed)


def tampered(_folder, flips, _seed):
    """Bits flipped, of every class of bytes."""
    with serving() as server:
        values = written(server, KEYS)
        count = counted(0, flip_all, server, values, -(-flips // FLIPS))
    count.rounds = sum(count.outcomes.values())
    return count


def counted(rounds, campaign, *args):
    """What a campaign counts, which asserts that nothing is wrong."""
    count = Count(rounds)
    try:
        count.outcomes.update(campaign(*args))
    except AssertionError as error:
        count.fail(repr(error))
    return count
