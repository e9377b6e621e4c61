"""Bytes of a data file that are not what was written: no class of them yields wrong KV.

A flip in an entry or a record is a miss of its block alone, one in what nothing uses is none.
LMDB's own pages have no checksum: what a flip there may do is a miss, a clear error, or the end of
the process, and `kvstore.tables` finds it or not.
"""

import os
import random
import re
import signal
from contextlib import contextmanager

import torch

from kvstore import layout, tables
from kvstore.audit import audit_disk
from kvstore.disk import DiskTier
from kvstore.errors import StoreError
from tests.kvstore.faults.bytemap import CHECKED, SPARE, TABLES, ByteMap
from tests.kvstore.faults.children import Child, ended
from tests.kvstore.faults.count import Count
from tests.kvstore.make import chain, identity, items, same

SHAPES = (  # a record beside its entry, in a page of its own, and in three
    identity(num_layers=2, num_kv_heads=2, head_dim=16),
    identity(num_layers=2, num_kv_heads=2, head_dim=64),
    identity(num_layers=4, num_kv_heads=4, head_dim=80),
)
BLOCKS = 40  # of each shape
TABLE_SHARE = 0.1  # of the flips
SPARE_FLIPS = 20  # at a time
AUDITED = 20  # one in so many rounds, or flips of tables
WRITTEN = 20  # likewise
LIMIT_S = 20
KILLED = tuple(-x for x in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE))
NAMED = re.compile(r"^block (\w+): ", re.M)


def made(_say, folder):
    """A store of blocks, none of which rests on another, of one or two records; and free pages."""
    layout.TARGET_BYTES = 4 << 10
    tier = DiskTier(folder, 1 << 30)
    for number in range(2):
        for model in SHAPES:
            tier.put(known(model, 1000 * number))
    tier.delete([key for model in SHAPES for key, _ in known(model, 1000)])
    tier.put(known(SHAPES[0], 0))  # so that no page that was freed is in use by a meta page
    tier.close()


def known(model, first):
    keys = [chain(range(first + n, first + n + 4), model=model)[0] for n in range(BLOCKS)]
    return items(keys, model)


class Damage:
    """A data file, of which some bytes are changed for a while."""

    def __init__(self, path):
        self.whole = path.read_bytes()
        self._file = os.open(path, os.O_RDWR)

    @contextmanager
    def at(self, places, dice):
        for place in places:
            byte = self.whole[place] ^ dice.randint(1, 255)
            os.pwrite(self._file, bytes([byte]), place)
        try:
            yield
        finally:
            for place in places:
                os.pwrite(self._file, self.whole[place : place + 1], place)

    def undo(self):
        """All of it, whatever happened."""
        os.pwrite(self._file, self.whole, 0)
        os.truncate(self._file, len(self.whole))


def place_in(spans, dice):
    """A byte of some run, and its key; the same chance for every run."""
    start, end, key = dice.choice(spans)
    return dice.randrange(start, end), key


def checked(say, folder, wanted, seed, blocks):
    """Flip bytes that a checksum covers, and bytes that nothing uses, many at a time."""
    damage, dice = Damage(folder / "data.mdb"), random.Random(seed)
    spans, turn, done = ByteMap(damage.whole).spans, 0, dict.fromkeys((*CHECKED, *SPARE), 0)
    while sum(done.values()) < wanted:
        hit, places = {}, []
        for kind in CHECKED * (len(blocks) // 4):
            place, key = place_in(spans[kind], dice)
            if key[:32] not in hit:
                hit[key[:32]] = kind
                places.append(place)
                done[kind] += 1
        for kind in SPARE * (SPARE_FLIPS // len(SPARE)):
            places.append(place_in(spans[kind], dice)[0])
            done[kind] += 1
        with damage.at(places, dice):
            turn += 1
            say(outcome(folder, blocks, hit, turn))
    say({"done": done})


def outcome(folder, blocks, hit, turn):
    """Blocks that are wrong, missed for nothing, or served although they were hit."""
    tier = DiskTier(folder, 1 << 30)
    seen = {"wrong": 0, "lost": 0, "unseen": 0}
    for (key, block), found in zip(blocks, served(tier, blocks, at_once=turn % 2), strict=True):
        seen["wrong"] += found is not None and not same(found, block.data)
        seen["lost"] += found is None and key.digest not in hit
        seen["unseen"] += found is not None and key.digest in hit
    if turn % AUDITED == 0:
        tier._bad.clear()
        named = NAMED.findall("\n".join(audit_disk(tier, repair=False).problems))
        seen["unseen"] += len({digest.hex() for digest in hit} ^ set(named))
    tier._bad.clear()  # closing would delete them
    tier.close()
    return seen


def served(tier, blocks, *, at_once):
    """The KV of each block as the tier gives it; None for misses."""
    if not at_once:
        found = [tier.get(key) for key, _ in blocks]
        return [None if block is None else block.data for block in found]
    rows = []
    for first in range(0, len(blocks), BLOCKS):
        data = blocks[first][1].data
        keys = [key for key, _ in blocks[first : first + BLOCKS]]
        out = torch.empty(len(keys), *data.shape, dtype=data.dtype)
        there = tier.read_many(keys, range(len(data)), out)
        rows += [row if is_ else None for row, is_ in zip(out, there, strict=True)]
    return rows


def unchecked(say, folder, flips, blocks):
    """Flip bytes of LMDB's own pages, one at a time; says before each which, then what it did."""
    damage = Damage(folder / "data.mdb")
    for number, place, seed in flips:
        signal.alarm(LIMIT_S)
        say(number)
        with damage.at([place], random.Random(seed)):
            said = behind(folder, blocks, writes=number % WRITTEN == 0)
        damage.undo()
        say(said)


def behind(folder, blocks, *, writes):
    """What a store with a damaged page does: "right", "miss", "refused" or "WRONG"."""
    try:
        tier = DiskTier(folder, 1 << 30)
        found = served(tier, blocks, at_once=True)
        seen = "miss" if any(got is None for got in found) else "right"
        if writes:
            for first in (5000, 6000):  # on pages that a damaged book may call free
                tier.delete([key for key, _ in blocks[first // 1000 :: 7]])
                tier.put(known(SHAPES[2], first)[:10])
            found += served(tier, blocks, at_once=False)
        tier._bad.clear()
        tier.close()
    except StoreError:
        return "refused"
    put = [block.data for _, block in blocks] * 2
    wrong = any(got is not None and not same(got, data) for got, data in zip(found, put))
    return "WRONG" if wrong else seen


def flip(folder, flips, seed):
    """So many flips, TABLE_SHARE of them in LMDB's own pages."""
    count, dice, folder = Count(), random.Random(seed), folder / "store"
    blocks = [item for model in SHAPES for item in known(model, 0)]
    count.ended(ended(made, folder))
    few = int(TABLE_SHARE * flips)
    child = ended(checked, folder, flips - few, seed, blocks, limit_s=600)
    if count.ended(child):
        *rounds, last = child.said
        count.outcomes.update(last["done"])
        count.wrong += sum(seen["wrong"] for seen in rounds)
        count.lost += sum(seen["lost"] for seen in rounds)
        if unseen := sum(seen["unseen"] for seen in rounds):
            count.fail(f"{unseen} flips of entries and records were not seen")
    damage = Damage(folder / "data.mdb")
    spans = ByteMap(damage.whole).spans
    kinds = [TABLES[number % len(TABLES)] for number in range(few)]
    places = [place_in(spans[kind], dice)[0] for kind in kinds]
    flip_tables(folder, count, damage, kinds, places, blocks)
    count.rounds = sum(count.outcomes[kind] for kind in (*CHECKED, *SPARE, *TABLES))
    return count


def flip_tables(folder, count, damage, kinds, places, blocks):
    left = [(number, place, place + number) for number, place in enumerate(places)]
    while left:
        child = Child(unchecked, folder, left, blocks)
        while (number := child.hear()) is not None:
            said = child.hear()
            if said is not None:
                note(folder, count, damage, kinds[number], left.pop(0), said)
        dead = child.join()
        damage.undo()
        if not left:
            count.ended(dead)
        elif count.ended(dead, allowed=KILLED):
            note(
                folder,
                count,
                damage,
                kinds[left[0][0]],
                left.pop(0),
                signal.Signals(-dead.code).name,
            )
        else:
            left.pop(0)


def note(folder, count, damage, kind, flip, said):
    """Note what a flip of one of LMDB's own pages did, and sometimes whether it can be found."""
    number, place, seed = flip
    count.outcomes[kind] += 1
    count.outcomes[f"{kind}: {said}"] += 1
    count.wrong += said == "WRONG"
    if number % AUDITED == 0 and said != "right":
        with damage.at([place], random.Random(seed)):
            walk = ended(walked, folder)
        damage.undo()
        count.ended(walk, allowed=(0, 1, *KILLED))
        count.outcomes["tables walked: " + ("silent" if walk.code == 0 else "found")] += 1


def walked(_say, folder):
    os._exit(tables.main(folder))
