"""What every byte of a store's two files is: a walk of LMDB's trees, and what their entries say.

meta page    [ header 16 | magic, version, address, map size | table of free pages, main table ]
branch, leaf [ header 16, with lower and upper | offsets u16 .. lower | .. | upper .. nodes ]
node         [ size or page u32, flags u16, key size u16 | key | value, or its page u64 ]
value of its own pages [ header 16 | value ... | rest ]        (lmdb 0.9, 64 bit)
record, in the other file [ zeros 16 | header | payload | rest ]
"""

import struct
from collections import defaultdict

from kvstore.disk.entry import unpack
from kvstore.disk.extent import PAGE_HEADER, span
from kvstore.disk.space import empty
from kvstore.disk.values import pages_of
from kvstore.record import HEADER_BYTES

PAGE = 4096
_TABLE = struct.Struct("<IHHQQQQQ")  # pad, flags, depth, pages of three sorts, entries, root
_NODE = struct.Struct("<HHHH")
_BRANCH, _LEAF, _META = 0x01, 0x02, 0x08
_BIG, _SUB = 0x01, 0x02
_NOWHERE = (1 << 64) - 1
_FREE, _MAIN = 40, 88  # of the two tables in a meta page
_SNAPSHOT = 144
NOTE_NAME = empty()[0]

TABLES = ("meta", "branch", "leaf", "page header")  # without a checksum
CHECKED = ("entry", "record header", "payload")  # of one block each
NOTE = "note of free pages"  # checked, and of no block
SPARE = ("slack", "free page", "slack beside records", "free page of values")
CLASSES = (*TABLES, *CHECKED, NOTE, *SPARE)


class ByteMap:
    """`spans`: by class, the (start, end, digest) of runs of bytes; of their block or None.

    The bytes of the values count from where those of LMDB's file end.
    """

    def __init__(self, data, values):
        self.spans = defaultdict(list)
        self._data, self._seen, self._entries = data, set(), []
        for page in (0, 1):
            assert self._header(page)[2] == _META
            self._note("meta", page * PAGE, _SNAPSHOT + 8)
            self._note("slack", page * PAGE + _SNAPSHOT + 8, PAGE - _SNAPSHOT - 8)
            self._seen.add(page)
        newest = max((0, PAGE), key=lambda at: struct.unpack_from("<Q", data, at + _SNAPSHOT))
        self._walk(self._root(newest + _FREE), "free list")
        self._walk(self._root(newest + _MAIN), "main")
        for page in range(len(data) // PAGE):
            if page not in self._seen:
                self._note("free page", page * PAGE, PAGE)
        self._records(len(data), len(values))

    def _note(self, kind, at, nbytes, digest=None):
        if nbytes:
            self.spans[kind].append((at, at + nbytes, digest))

    def _header(self, page):
        return PAGE_HEADER.unpack_from(self._data, page * PAGE)

    def _root(self, at):
        return _TABLE.unpack_from(self._data, at)[-1]

    def _walk(self, page, table):
        if page == _NOWHERE:
            return
        self._seen.add(page)
        start, flags = page * PAGE, self._header(page)[2]
        lower, upper = struct.unpack_from("<HH", self._data, start + 12)
        kind = {_BRANCH: "branch", _LEAF: "leaf"}[flags & 0x0F]
        self._note(kind, start, lower)
        self._note("slack", start + lower, upper - lower)
        for (offset,) in struct.iter_unpack("<H", self._data[start + 16 : start + lower]):
            end = (self._branch if kind == "branch" else self._node)(start + offset, table)
            self._note("slack", end, end % 2)  # nodes start at even places

    # of a node: all to the end, which is returned
    def _branch(self, at, table):
        low, high, top, key_bytes = _NODE.unpack_from(self._data, at)
        self._note("branch", at, _NODE.size + key_bytes)
        self._walk(low | high << 16 | top << 32, table)
        return at + _NODE.size + key_bytes

    def _node(self, at, table):
        low, high, flags, key_bytes = _NODE.unpack_from(self._data, at)
        key = bytes(self._data[at + 8 : at + 8 + key_bytes])
        value, size = at + 8 + key_bytes, low | high << 16
        self._note("leaf", at, 8 + key_bytes)
        if flags & _BIG:
            self._note("leaf", value, 8)
            self._big(table, struct.unpack_from("<Q", self._data, value)[0], key, size)
            return value + 8
        if flags & _SUB:
            self._note("leaf", value, size)
            self._walk(self._root(value), key.decode())
        else:
            self._value(table, key, value, size)
        return value + size

    def _big(self, table, page, key, size):
        pages = span(size, PAGE)
        self._seen.update(range(page, page + pages))
        self._note("page header", page * PAGE, PAGE_HEADER.size)
        end = page * PAGE + PAGE_HEADER.size + size
        self._value(table, key, end - size, size)
        self._note("slack", end, (page + pages) * PAGE - end)

    def _value(self, table, key, at, size):
        if table == "entries":
            self._note("entry", at, size, key)
            self._entries.append(unpack(key, self._data[at : at + size]))
        else:
            self._note(NOTE if key == NOTE_NAME else "leaf", at, size)

    def _records(self, start, nbytes):
        used = set()
        for entry in self._entries:
            for page, size in zip(entry.pages, entry.sizes, strict=True):
                at = start + page * PAGE
                end = at + PAGE + size
                self._note("record header", at, HEADER_BYTES, entry.key.digest)
                self._note("slack beside records", at + HEADER_BYTES, PAGE - HEADER_BYTES)
                self._note("payload", at + PAGE, size, entry.key.digest)
                behind = start + (page + pages_of(size)) * PAGE
                self._note("slack beside records", end, behind - end)
                used.update(range(page, page + pages_of(size)))
        for page in range(nbytes // PAGE):
            if page not in used:
                self._note("free page of values", start + page * PAGE, PAGE)
