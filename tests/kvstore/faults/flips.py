"""Bytes of a store's two files that are not what was written: no class of them yields wrong KV.

A flip in an entry or a record is a miss of its block alone, one in what nothing uses is none, and
one in the note of free pages costs nothing, either: the next change makes that anew. LMDB's own
pages have no checksum: what a flip there may do is a miss, a clear error, or the end of the
process, and `kvstore.disk.tables` finds it or not.
"""

import os
import random
import re
import signal
from contextlib import contextmanager

import torch

from kvstore import layout
from kvstore.disk import tables
from kvstore.disk.audit import audit_disk
from kvstore.disk.environment import files_of
from kvstore.disk.tier import DiskTier
from kvstore.errors import StoreError
from tests.kvstore.faults.bytemap import CHECKED, CLASSES, NOTE, SPARE, TABLES, ByteMap
from tests.kvstore.faults.children import Child, ended
from tests.kvstore.faults.count import Count
from tests.kvstore.make import chain, identity, items, same

SHAPES = (  # a record in a page, one in two, and four records in two pages each
    identity(num_layers=2, num_kv_heads=2, head_dim=16),
    identity(num_layers=2, num_kv_heads=2, head_dim=64),
    identity(num_layers=4, num_kv_heads=4, head_dim=80),
)
BLOCKS = 44  # of each shape
TABLE_SHARE, NOTE_SHARE = 0.1, 0.02  # of the flips
NEW = BLOCKS  # put behind a flip of the note, twice
SPARE_FLIPS = 40  # at a time
AUDITED = 20  # one in so many rounds, or flips of tables
WRITTEN = 20  # likewise
LIMIT_S = 20
KILLED = tuple(-x for x in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE))
NAMED = re.compile(r"^block (\w+): ", re.M)


def made(_say, folder):
    """A store of blocks, none of which rests on another, of one or four records; and free pages.

    Of these there are so many, none beside another, that their note has pages of its own.
    """
    layout.TARGET_BYTES = 4 << 10
    tier = DiskTier(folder, 1 << 30)
    for model in SHAPES:
        tier.put([item for pair in zip(known(model, 0), known(model, 1000)) for item in pair])
    tier.delete([key for model in SHAPES for key, _ in known(model, 1000)])
    with tier.access.changing() as txn:  # so that no page that was freed is in use by a meta page
        tier.access.ledger.stamp(txn, [known(SHAPES[0], 0)[0][0].digest])
    tier.close()


def known(model, first):
    keys = [chain(range(first + n, first + n + 4), model=model)[0] for n in range(BLOCKS)]
    return items(keys, model)


class Damage:
    """A store's two files, of which some bytes are changed for a while."""

    def __init__(self, folder):
        files = files_of(folder)
        self.whole = [file.read_bytes() for file in files]
        self.spans = ByteMap(*self.whole).spans
        self._files = [os.open(file, os.O_RDWR) for file in files]

    @contextmanager
    def at(self, places, dice):
        for place in places:
            self._write(place, dice.randint(1, 255))
        try:
            yield
        finally:
            for place in places:
                self._write(place, 0)

    def undo(self):
        """All of it, whatever happened."""
        for file, whole in zip(self._files, self.whole, strict=True):
            os.pwrite(file, whole, 0)
            os.truncate(file, len(whole))

    def _write(self, place, change):
        tables = len(self.whole[0])
        number, at = (0, place) if place < tables else (1, place - tables)
        os.pwrite(self._files[number], bytes([self.whole[number][at] ^ change]), at)


def place_in(spans, dice):
    """A byte of some run, and its block; the same chance for every run."""
    start, end, digest = dice.choice(spans)
    return dice.randrange(start, end), digest


def checked(say, folder, wanted, seed, blocks):
    """Flip bytes that a checksum covers, and bytes that nothing uses, many at a time."""
    damage, dice = Damage(folder), random.Random(seed)
    spans, turn, done = damage.spans, 0, dict.fromkeys((*CHECKED, *SPARE), 0)
    while sum(done.values()) < wanted:
        hit, places = {}, []
        for kind in CHECKED * (len(blocks) // 4):
            place, digest = place_in(spans[kind], dice)
            if digest not in hit:
                hit[digest] = kind
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
        tier.access.bad.clear()
        named = NAMED.findall("\n".join(audit_disk(tier, repair=False).problems))
        seen["unseen"] += len({digest.hex() for digest in hit} ^ set(named))
    tier.access.bad.clear()  # closing would delete them
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


def noted(say, folder, wanted, seed, blocks):
    """Flip bytes of the note of free pages, one at a time, and store more than these hold."""
    damage, dice = Damage(folder), random.Random(seed)
    new = [item for model in SHAPES for item in known(model, 2000)]
    for turn in range(wanted):
        with damage.at([place_in(damage.spans[NOTE], dice)[0]], dice):
            tier = DiskTier(folder, 1 << 30)
            unseen = misnoted(tier) != ["the note of free pages is damaged"]
            tier.put(dice.sample(new, NEW))  # takes what it believes to be free
            tier.put(dice.sample(new, NEW))  # and what the note says that was made anew
            say(missed(tier, blocks, at_once=turn % 2) | {"unseen": unseen or misnoted(tier)})
            tier.close()
        damage.undo()


def misnoted(tier):
    """What is wrong with the note of free pages."""
    with tier.access.reading() as txn:
        return list(tier.access.ledger.space.problems(txn, list(tier.access.ledger.extents(txn))))


def missed(tier, blocks, *, at_once):
    """How many blocks are wrong, or not there."""
    seen = {"wrong": 0, "lost": 0}
    for (_, block), found in zip(blocks, served(tier, blocks, at_once=at_once), strict=True):
        seen["wrong"] += found is not None and not same(found, block.data)
        seen["lost"] += found is None
    return seen


def unchecked(say, folder, flips, blocks):
    """Flip bytes of LMDB's own pages, one at a time; says before each which, then what it did."""
    damage = Damage(folder)
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
        tier.access.bad.clear()
        tier.close()
    except StoreError:
        return "refused"
    put = [block.data for _, block in blocks] * 2
    wrong = any(got is not None and not same(got, data) for got, data in zip(found, put))
    return "WRONG" if wrong else seen


def flip(folder, flips, seed):
    """So many flips, TABLE_SHARE of them in LMDB's own pages, NOTE_SHARE in the note."""
    count, dice, folder = Count(), random.Random(seed), folder / "store"
    blocks = [item for model in SHAPES for item in known(model, 0)]
    count.ended(ended(made, folder))
    few, notes = int(TABLE_SHARE * flips), int(NOTE_SHARE * flips)
    child = ended(checked, folder, flips - few - notes, seed, blocks, limit_s=600)
    if count.ended(child):
        *rounds, last = child.said
        count.outcomes.update(last["done"])
        count.wrong += sum(seen["wrong"] for seen in rounds)
        count.lost += sum(seen["lost"] for seen in rounds)
        if unseen := sum(seen["unseen"] for seen in rounds):
            count.fail(f"{unseen} flips of entries and records were not seen")
    flip_note(folder, count, notes, seed, blocks)
    damage = Damage(folder)
    kinds = [TABLES[number % len(TABLES)] for number in range(few)]
    places = [place_in(damage.spans[kind], dice)[0] for kind in kinds]
    flip_tables(folder, count, damage, kinds, places, blocks)
    count.rounds = sum(count.outcomes[kind] for kind in CLASSES)
    return count


def flip_note(folder, count, flips, seed, blocks):
    child = ended(noted, folder, flips, seed, blocks, limit_s=600)
    if count.ended(child):
        count.outcomes[NOTE] += len(child.said)
        for seen in child.said:
            count.wrong += seen["wrong"]
            count.lost += seen["lost"]
            if seen["unseen"]:
                count.fail(f"a flip of the {NOTE} was not seen, or not mended: {seen['unseen']}")


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
