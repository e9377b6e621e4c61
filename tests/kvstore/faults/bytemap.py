"""What every byte of a data file is: a walk of LMDB's trees, and what the store puts there.

meta page    [ header 16 | magic, version, address, map size | table of free pages, main table ]
branch, leaf [ header 16, with lower and upper | offsets u16 .. lower | .. | upper .. nodes ]
node         [ size or page u32, flags u16, key size u16 | key | value, or its page u64 ]
value of its own pages [ header 16 | value ... | rest ]        (lmdb 0.9, 64 bit)
"""

import struct
from collections import defaultdict

from kvstore.extent import PAGE_HEADER, span
from kvstore.record import HEADER_BYTES

PAGE = 4096
_TABLE = struct.Struct("<IHHQQQQQ")  # pad, flags, depth, pages of three sorts, entries, root
_NODE = struct.Struct("<HHHH")
_BRANCH, _LEAF, _META = 0x01, 0x02, 0x08
_BIG, _SUB = 0x01, 0x02
_NOWHERE = (1 << 64) - 1
_FREE, _MAIN = 40, 88  # of the two tables in a meta page
_SNAPSHOT = 144

TABLES = ("meta", "branch", "leaf", "page header")  # without a checksum
CHECKED = ("entry", "record header", "payload")
SPARE = ("slack", "free page")
CLASSES = (*TABLES, *CHECKED, *SPARE)


class ByteMap:
    """`spans`: by class, the (start, end, key) of runs of bytes; the key of the value or None."""

    def __init__(self, data):
        self.spans = defaultdict(list)
        self._data, self._seen = data, set()
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

    def _note(self, kind, at, nbytes, key=None):
        if nbytes:
            self.spans[kind].append((at, at + nbytes, key))

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
        if table == "data":
            self._note("record header", at, HEADER_BYTES, key)
            self._note("payload", at + HEADER_BYTES, size - HEADER_BYTES, key)
        else:
            self._note("entry" if table == "entries" else "leaf", at, size, key)
