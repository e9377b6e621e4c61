"""What sets each policy apart, one sentence at a time."""

from itertools import islice

from kvstore.policies.arc import ARC
from kvstore.policies.fifo import FIFO
from kvstore.policies.gdsf import GDSF
from kvstore.policies.lfu import LFU
from kvstore.policies.lru import LRU
from kvstore.policies.s3fifo import S3FIFO
from kvstore.policies.sieve import SIEVE


def filled(policy, names, parents=None):
    depths = {}
    for name in names:
        above = (parents or {}).get(name)
        depths[name] = depths.get(above, -1) + 1
        policy.add(name, above, 1, depths[name])
    return policy


def singles(text):
    return [letter.encode() for letter in text]


def order(policy):
    return b"".join(policy.victims(set())).decode()


def evict(policy, count=1):
    gone = list(islice(policy.victims(set()), count))
    for name in gone:
        policy.remove(name)
    return b"".join(gone).decode()


CHAIN = {b"b": b"a", b"c": b"b"}


def test_a_chain_goes_from_its_tail():
    lru = filled(LRU(), singles("abc"), CHAIN)
    assert list(lru.victims(set())) == [b"c", b"b", b"a"]
    assert list(lru.victims({b"b"})) == [b"c"]
    lru.touch([b"b", b"a"])  # whatever was used last, leaves go first
    assert list(lru.victims(set())) == [b"c", b"b", b"a"]


def test_of_blocks_used_together_the_last_goes_first():
    lru = filled(LRU(), singles("abc"))
    lru.touch(singles("abc"))
    assert order(lru) == "cba"


def test_the_oldest_leaf_goes_first():
    lru = filled(LRU(), singles("abcx"), CHAIN)
    lru.touch(singles("abc"))
    assert order(lru)[:2] == "xc"


def test_a_use_does_not_save_the_block_that_came_first():
    for make, last in ((LRU, "a"), (FIFO, "b")):
        policy = filled(make(), singles("ab"))
        policy.touch([b"a"])
        policy.add(b"a", None, 1)
        assert order(policy)[-1] == last


def test_the_first_chain_goes_first_and_from_its_tail():
    fifo = filled(FIFO(), singles("abxc"), CHAIN)
    assert order(fifo) == "xcba"  # c is young, and b has to wait


def test_a_leaf_keeps_its_turn_when_a_block_built_on_it_goes_out_of_turn():
    fifo = filled(FIFO(), singles("abcd"), {b"d": b"b"})
    fifo.remove(b"d")
    assert order(fifo) == "abc"


def test_what_was_used_often_outlasts_what_was_used_last():
    lfu = filled(LFU(), singles("abc"))
    lfu.touch([b"a"])
    lfu.touch([b"a"])
    lfu.touch([b"b"])
    assert order(lfu) == "cba"
    lfu.remove(b"a")
    lfu.add(b"a", None, 1)  # its uses went with it
    assert order(lfu) == "cab"


def test_the_hand_passes_what_was_used_once_and_goes_on_from_there():
    sieve = filled(SIEVE(), singles("abcd"))
    sieve.touch([b"a"])
    assert evict(sieve) == "b"
    sieve.touch([b"c"])
    filled(sieve, [b"e"])
    assert evict(sieve, 2) == "de"  # c was used, and e is the last before the hand is at a again
    assert evict(sieve, 2) == "ac"


def test_the_hand_begins_again_though_another_came_since_the_last_one_went():
    sieve = filled(SIEVE(), singles("abc"))
    sieve.touch(singles("ab"))
    assert evict(sieve) == "c"
    filled(sieve, [b"d"])
    assert evict(sieve) == "a"


def test_a_chain_that_was_used_is_passed_as_a_whole():
    sieve = filled(SIEVE(), singles("abcx"), CHAIN)
    sieve.touch(singles("abc"))
    assert evict(sieve, 4) == "xcba"


def test_what_comes_once_goes_before_what_was_used_twice_and_returns_to_stay():
    policy = filled(S3FIFO(), singles("abcdefghij"))
    for _ in range(2):
        policy.touch([b"a"])
    assert evict(policy, 5) == "bcdef"
    filled(policy, singles("bx"))  # b returns
    assert evict(policy, 5) == "ghijx"
    assert order(policy) == "ab"


def test_uses_are_spent_one_round_after_the_other_and_counted_up_to_three():
    policy = filled(S3FIFO(), singles("ab"))
    for name in (b"a", b"b"):
        policy.remove(name)
    filled(policy, singles("ab"))  # now in the main queue, if remembered
    for _ in range(9):
        policy.touch([b"b"])
    policy.touch([b"a"])
    assert order(policy) == "ab"
    assert policy._uses[b"b"] == 0


def test_blocks_used_again_are_safe_from_a_scan():
    arc = filled(ARC(), singles("abcdef"))
    arc.touch(singles("ab"))
    for fresh in singles("ghijkl"):
        evict(arc)
        filled(arc, [fresh])
    assert {b"a", b"b"} <= set(arc)


def test_the_side_whose_block_returns_gets_more_room():
    arc = filled(ARC(), singles("abcd"))
    arc.touch(singles("ab"))
    assert evict(arc) == "c"
    filled(arc, [b"c"])  # one for those used once; c counts as used again
    assert evict(arc) == "b"  # d is all that those used once have, and it is their share
    filled(arc, [b"b"])
    assert evict(arc) == "d"


def test_what_costs_more_to_compute_or_is_smaller_stays():
    gdsf = filled(GDSF(depth=1), singles("abcx"), CHAIN)
    assert order(gdsf) == "xcba"
    gdsf = filled(GDSF(depth=1 << 60), singles("abcx"), CHAIN)
    assert order(gdsf) == "cbax"  # where depth costs nothing, first come first
    gdsf = GDSF()
    for name, nbytes in ((b"b", 1), (b"a", 2)):
        gdsf.add(name, None, nbytes)
    assert order(gdsf) == "ab"


def test_worth_of_the_past_is_overtaken():
    gdsf, lfu = GDSF(), LFU()
    for policy in (gdsf, lfu):
        filled(policy, [b"a"])
        for _ in range(4):
            policy.touch([b"a"])
        for fresh in singles("bcdefghijk"):
            filled(policy, [fresh])
            evict(policy)
    assert b"a" in lfu
    assert b"a" not in gdsf
