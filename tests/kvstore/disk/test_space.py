"""Free pages: never handed out twice, nor before what lay there is gone for good."""

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.disk import space as module
from kvstore.disk.space import Extent, Space, empty

STEPS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 5), max_size=4),  # pages to take
        st.sets(st.integers(0, 30), max_size=4),  # which extents to give back
        st.sampled_from(["commit", "commit", "abort", "doubt", "damage"]),
    ),
    max_size=12,
)


@pytest.fixture
def table(tmp_path):
    with lmdb.open(str(tmp_path / "lmdb"), max_dbs=1, map_size=1 << 30) as env:
        info = env.open_db(b"info")
        yield env, info


def change(env, info, used, take, give, ends, space=None):
    """A transaction that gives and takes; the extents in use after it."""
    space = space or Space(info)
    space.forget()
    with env.begin(write=True) as txn:
        file_pages = max((extent.end for extent in used), default=0)
        for extent in give:
            space.give(extent)
        taken = [Extent(space.take(txn, pages, lambda: file_pages), pages) for pages in take]
        if ends == "doubt":
            space.doubt()
        after = [extent for extent in used if extent not in give] + taken
        space.settle(txn, after)
        if ends == "abort":
            txn.abort()
            return taken, used
    return taken, after


def problems(env, info, used):
    with env.begin() as txn:
        return list(Space(info).problems(txn, used))


def fresh(env, info):
    with env.begin(write=True) as txn:
        txn.drop(info, delete=False)
        txn.put(*empty(), db=info)


@given(steps=STEPS)
def test_pages_are_never_taken_from_a_block_that_a_crash_could_bring_back(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("space")
    with lmdb.open(str(folder), max_dbs=1, map_size=1 << 30) as env:
        info = env.open_db(b"info")
        fresh(env, info)
        used: list[Extent] = []
        sound = True
        for take, which, ends in steps:
            if ends == "damage":
                with env.begin(write=True) as txn:
                    txn.put(module._NAME, b"damaged", db=info)
            give = [used[i] for i in which if i < len(used)]
            before = {page for extent in used for page in range(extent.start, extent.end)}
            taken, used = change(env, info, used, take, give, ends)
            pages = [page for extent in taken for page in range(extent.start, extent.end)]
            assert len(pages) == len(set(pages))
            assert not before & set(pages)
            if take or give or ends == "doubt":
                sound = sound or ends != "abort"
            elif ends == "damage":
                sound = False
            if sound:
                assert problems(env, info, used) == []


def test_what_came_back_is_used_again_and_neighbours_are_one(table):
    env, info = table
    fresh(env, info)
    taken, used = change(env, info, [], [4, 4, 4, 4], [], "commit")
    assert [extent.start for extent in taken] == [0, 4, 8, 12]
    _, used = change(env, info, used, [], taken[:1] + taken[2:3], "commit")
    _, used = change(env, info, used, [], taken[1:2], "commit")
    [got], used = change(env, info, used, [12], [], "commit")
    assert got == (0, 12)
    assert problems(env, info, used) == []


def test_the_smallest_extent_that_fits_is_taken_and_the_file_grows_last(table):
    env, info = table
    fresh(env, info)
    taken, used = change(env, info, [], [8, 1, 3, 1, 2], [], "commit")
    _, used = change(env, info, used, [], [taken[0], taken[2], taken[4]], "commit")
    got, used = change(env, info, used, [2, 3, 8, 9], [], "commit")
    assert [extent.start for extent in got] == [13, 9, 0, 15]


def test_free_pages_at_the_end_are_used_when_the_file_grows(table):
    env, info = table
    fresh(env, info)
    taken, used = change(env, info, [], [4, 4], [], "commit")
    _, used = change(env, info, used, [], taken[1:], "commit")
    [got], used = change(env, info, used, [6], [], "commit")
    assert got == (4, 6)
    assert problems(env, info, used) == []


def test_an_aborted_transaction_leaves_no_trace(table):
    env, info = table
    fresh(env, info)
    space = Space(info)
    taken, used = change(env, info, [], [4, 4], [], "commit", space)
    change(env, info, used, [3], taken[:1], "abort", space)
    [got], used = change(env, info, used, [4], [], "commit", space)
    assert got == (8, 4)  # not where the first one lies
    assert problems(env, info, used) == []


@pytest.mark.parametrize("note", [b"", b"x" * 8, b"x" * 24, None])
def test_a_damaged_note_costs_no_block_and_is_made_anew(table, note):
    env, info = table
    fresh(env, info)
    taken, used = change(env, info, [], [4, 4, 4], [], "commit")
    _, used = change(env, info, used, [], taken[:1], "commit")
    with env.begin(write=True) as txn:
        txn.delete(module._NAME, db=info)
        if note is not None:
            txn.put(module._NAME, note, db=info)
    assert problems(env, info, used) == ["the note of free pages is damaged"]
    [got], used = change(env, info, used, [4], [], "commit")
    assert got == (12, 4)
    assert problems(env, info, used) == []
    [got], used = change(env, info, used, [4], [], "commit")
    assert got == (0, 4)


def test_what_was_free_is_told_the_smallest_first_and_changes_nothing(table):
    env, info = table
    fresh(env, info)
    taken, used = change(env, info, [], [4, 1, 2, 1], [], "commit")
    _, used = change(env, info, used, [], [taken[0], taken[2]], "commit")
    space = Space(info)
    with env.begin(write=True) as txn:
        assert space.free(txn) == [(5, 2), (0, 4)]
        txn.put(module._NAME, b"damaged", db=info)
        assert space.free(txn) == []
        assert space.take(txn, 3, lambda: 8) == 8


def test_problems_are_named(table):
    env, info = table
    fresh(env, info)
    _, used = change(env, info, [], [4, 4, 4], [], "commit")
    assert problems(env, info, used[1:]) == ["pages 0 to 4 are neither taken nor free"]
    assert problems(env, info, [*used, Extent(5, 1)]) == [
        "page 5 is taken twice, or taken and free"
    ]
    assert problems(env, info, used[:2]) == ["the pages end at 8, not at 12"]
