"""Policies as their definitions read, looking through all blocks for every victim."""

from collections import Counter


class Model:
    """Blocks, and which of them could go: `choose` says who of several leaves does."""

    def __init__(self, parents, sizes):
        self.parents, self.size = parents, sizes
        self.times, self.now, self.room = {}, 0, 0

    def held(self, blocks=None):
        return sum(self.size[x] for x in (self.times if blocks is None else blocks))

    def add(self, name):
        if name in self.times:
            self.touch([name])
            return
        self.stamp([name])
        self.room = max(self.room, self.held())
        self.came(name)

    def touch(self, names):
        known = [x for x in names if x in self.times]
        self.used(known)

    def remove(self, name):
        if name in self.times:
            del self.times[name]
            self.went(name)

    def victims(self, pinned):
        gone = set()
        while leaves := [x for x in self.leaves(gone) if x not in pinned]:
            name = self.choose(leaves, gone)
            if name is not None:
                gone.add(name)
                yield name

    def leaves(self, gone):
        left = self.times.keys() - gone
        return [x for x in self.times if x in left and x not in {self.parents[y] for y in left}]

    def run(self, leaf, gone):
        """A leaf and the blocks above it that have one child each."""
        left = self.times.keys() - gone
        yield leaf
        while (leaf := self.parents[leaf]) in left:
            if [self.parents[x] for x in left].count(leaf) > 1:
                return
            yield leaf

    def stamp(self, names):
        for name in reversed(names):
            self.now += 1
            self.times[name] = self.now

    def came(self, name):
        pass

    def used(self, names):
        pass

    def went(self, name):
        pass


class FIFO(Model):
    def choose(self, leaves, gone):
        return min(leaves, key=self.times.get)


class LRU(FIFO):
    def used(self, names):
        self.stamp(names)


class LFU(Model):
    def __init__(self, *args):
        super().__init__(*args)
        self.uses = Counter()

    def came(self, name):
        self.uses[name] = 1

    def used(self, names):
        self.stamp(names)
        self.uses.update(names)

    def choose(self, leaves, gone):
        return min(leaves, key=lambda x: (self.uses[x], self.times[x]))


class GDSF(LFU):
    depth, clock = 4, 0

    def __init__(self, *args):
        super().__init__(*args)
        self.clocks = {}

    def came(self, name):
        super().came(name)
        self.clocks[name] = self.clock

    def used(self, names):
        super().used(names)
        self.clocks |= dict.fromkeys(names, self.clock)

    def rank(self, name):
        depth, above = 0, self.parents[name]
        while above is not None:
            depth, above = depth + 1, self.parents[above]
        return self.clocks[name] + self.uses[name] * (1 + depth / self.depth) / self.size[name]

    def choose(self, leaves, gone):
        name = min(leaves, key=lambda x: (self.rank(x), self.times[x]))
        self.clock = max(self.clock, self.rank(name))
        return name


class SIEVE(Model):
    def __init__(self, *args):
        super().__init__(*args)
        self.marked, self.passed = set(), set()  # passed: by the hand, in this round
        self.seen, self.new = set(), set()  # here when the hand moved before, and not

    def used(self, names):
        self.marked.update(names)

    def went(self, name):
        self.marked.discard(name)
        self.passed.discard(name)
        self.seen.discard(name)

    def victims(self, pinned):
        self.new = self.times.keys() - self.seen
        self.seen = set(self.times)
        yield from super().victims(pinned)

    def choose(self, leaves, gone):
        ahead = [x for x in leaves if x not in self.passed]
        if not ahead:
            self.passed.clear()
            return None
        leaf = min(ahead, key=self.times.get)
        new, self.new = self.new, set()
        if leaf in new:  # when it came, the hand stood at the end
            self.passed.clear()
            return None
        if leaf not in self.marked:
            return leaf
        for name in self.run(leaf, gone):
            if name not in self.marked:
                break
            self.marked.remove(name)
        self.passed.add(leaf)
        return None


class S3FIFO(Model):
    def __init__(self, *args):
        super().__init__(*args)
        self.small, self.ghosts, self.uses = set(), [], Counter()

    def came(self, name):
        self.uses[name] = 0
        if name in self.ghosts:
            self.ghosts.remove(name)
        else:
            self.small.add(name)

    def used(self, names):
        for name in names:
            self.uses[name] = min(self.uses[name] + 1, 3)

    def went(self, name):
        if name in self.small:
            self.small.remove(name)
            self.ghosts.append(name)
        while self.held(self.ghosts) > int(0.9 * self.room):
            self.ghosts.pop(0)

    def choose(self, leaves, gone):
        small = [x for x in leaves if x in self.small]
        main = [x for x in leaves if x not in self.small]
        turn = self.held(self.small - gone) >= 0.1 * self.room
        leaf = min((small or main) if turn else (main or small), key=self.times.get)
        enough = 2 if leaf in self.small else 1
        if self.uses[leaf] < enough:
            return leaf
        was_small = leaf in self.small
        for name in self.run(leaf, gone):
            if (name in self.small) != was_small or self.uses[name] < enough:
                break
            self.uses[name] = 0 if was_small else self.uses[name] - 1
            self.small.discard(name)
        self.stamp([leaf])
        return None


class ARC(Model):
    def __init__(self, *args):
        super().__init__(*args)
        self.t1, self.b1, self.b2, self.p = set(), [], [], 0

    def came(self, name):
        sizes = self.held(self.b1), self.held(self.b2)
        if name in self.b1:
            self.p = min(self.room, self.p + self.size[name] * max(1, sizes[1] / sizes[0]))
            self.b1.remove(name)
        elif name in self.b2:
            self.p = max(0, self.p - self.size[name] * max(1, sizes[0] / sizes[1]))
            self.b2.remove(name)
        else:
            self.t1.add(name)
        self.trim()

    def used(self, names):
        self.stamp(names)
        self.t1.difference_update(names)

    def went(self, name):
        (self.b1 if name in self.t1 else self.b2).append(name)
        self.t1.discard(name)
        self.trim()

    def trim(self):
        while self.b1 and self.held(self.t1) + self.held(self.b1) > self.room:
            self.b1.pop(0)
        while self.b2 and self.held() + self.held(self.b1) + self.held(self.b2) > 2 * self.room:
            self.b2.pop(0)

    def choose(self, leaves, gone):
        once = [x for x in leaves if x in self.t1]
        again = [x for x in leaves if x not in self.t1]
        turn = self.held(self.t1 - gone) > self.p
        return min((once or again) if turn else (again or once), key=self.times.get)
