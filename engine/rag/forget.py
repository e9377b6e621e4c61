"""Deleting KV that belongs to no document any more, wherever prompts have put it."""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from engine.blend.segments import Segments, digest
from engine.engine import Engine
from engine.rag.catalogue import Catalogue, Origin, Trace
from engine.request import Completion
from kvstore.block import BlockKey, Kind, Precision

TRACES = 1024  # with so many more than last time, those whose blocks were evicted are looked for
ORIGINS = 128  # likewise, of prefixes


class Doomed(NamedTuple):
    """Chunks that belong to no document, all names that their KV may have, and where it was put."""

    chunks: list[str]
    names: list[BlockKey | bytes]
    traces: list[Trace]


class Forgetting:
    """Knows where KV of chunks is: under their own names, and in prompts that were computed whole.

    Shares its owner's catalogue, and its owner's turns.
    """

    def __init__(self, engine: Engine, catalogue: Catalogue) -> None:
        self._engine, self._catalogue = engine, catalogue
        self._enough, self._enough_origins = TRACES, ORIGINS
        self._seen: dict[Origin, BlockKey] = {}  # a block of a chunk that was there the last time

    def doomed(self) -> Doomed:
        """All doomed chunks, also those of a process that died. `gone` must follow."""
        return self._found({chunk.id: chunk.tokens for chunk in self._catalogue.doomed.values()})

    def gone(self, doomed: Doomed) -> None:
        """Their KV is deleted."""
        stale = self._stale()
        if doomed.chunks or doomed.traces or stale:
            self._catalogue.settle(doomed.chunks, doomed.traces, evicted=stale)

    def after(self, chunks: Mapping[str, Sequence[int]]) -> None:
        """Of chunks whose KV was just stored, delete what was deleted in the meantime."""
        known, doomed = self._catalogue.chunks, self._catalogue.doomed.values()
        gone = {id_: tokens for id_, tokens in chunks.items() if id_ not in known}
        found = self._found(gone | {chunk.id: chunk.tokens for chunk in doomed})
        if found.names:
            self._engine.store.delete(found.names)
        self.gone(found)

    def note(
        self,
        segments: Segments,
        ids: Sequence[str | None],
        generated: Sequence[int],
        done: Completion | None,
    ) -> None:
        """Remember which blocks of a prompt rest on its chunks, unless none was stored.

        Args:
            ids: of its chunks; None for one that belongs to no document, which stays.
            done: None for a request that was cancelled, of which nothing is known.
        """
        report = None if done is None else done.stats.blend
        if report is not None and report.loaded:
            return  # what is blended is not stored
        orders = self._orders(segments) if report is None else {report.order}
        self._catalogue.note(
            trace
            for order in orders
            for trace in self._traces(
                segments.ordered(order), [ids[number] for number in order], generated
            )
        )

    def _orders(self, segments: Segments) -> set[tuple[int, ...]]:
        """In which a prompt that was cancelled may have been read: the one asked for, and that in
        which most of it is stored now."""
        changed = self._precisions if self._engine.config.blend.reorder else ()
        asked = tuple(range(len(segments.chunks)))
        return {asked, *(self._engine.blending.order(segments, p) for p in changed)}

    def _traces(
        self, segments: Segments, ids: Sequence[str | None], generated: Sequence[int]
    ) -> Iterator[Trace]:
        size = self._engine.config.block_tokens
        for precision in self._precisions:
            keys = self._keys([*segments.tokens, *generated], size, precision=precision)
            for id_, span in zip(ids, segments.spans, strict=True):
                if id_ is not None and span.start // size < len(keys):
                    yield Trace(id_, keys[span.start // size].digest.hex())

    @property
    def _precisions(self) -> set[Precision]:
        """Of which KV of a prompt may be."""
        return {Precision.EXACT, self._engine.config.store.precision}

    def prune(self, needed: Set[Origin]) -> None:
        """Forget the prefixes of which no chunk's KV is left, if there are too many.

        Without that, a prefix that is new with every prompt (the time is in it) would stay.
        """
        origins = self._catalogue.origins.keys()
        if len(origins) <= self._enough_origins:
            return
        self._engine.store.settle()
        stale = [origin for origin in origins - needed if not self._stored(origin)]
        self._enough_origins = len(origins) - len(stale) + ORIGINS
        self._seen = {origin: key for origin, key in self._seen.items() if origin not in stale}
        self._catalogue.settle(origins=stale)

    def _stored(self, origin: Origin) -> bool:
        """Whether any chunk has KV behind a prefix. Only of the first such chunk all are tried."""
        if origin in self._seen and self._seen[origin] in self._engine.store:
            return True
        size, catalogue, warmup = origin.block_tokens, self._catalogue, digest(origin.prefix)
        known = [chunk.tokens for chunk in catalogue.chunks.values()]
        known += [chunk.tokens for chunk in catalogue.doomed.values()]
        for tokens in known:
            for key in self._of_chunk(tokens[:size], size, warmup):
                if key in self._engine.store:
                    self._seen[origin] = key
                    return True
        return False

    def _found(self, chunks: Mapping[str, Sequence[int]]) -> Doomed:
        traces = [trace for trace in self._catalogue.traces if trace.chunk in chunks]
        names: list[BlockKey | bytes] = [bytes.fromhex(trace.block) for trace in traces]
        for tokens in chunks.values():
            for origin in self._catalogue.origins:
                warmup = digest(origin.prefix)
                names += self._of_chunk(tokens, origin.block_tokens, warmup)
        return Doomed(list(chunks), names, traces)

    def _stale(self) -> list[Trace]:
        """Traces of blocks that are in no tier any more, if there are too many traces."""
        traces = list(self._catalogue.traces)
        if len(traces) <= self._enough:
            return []
        self._engine.store.settle()  # what waits to be written is not lost
        stale = [trace for trace in traces if bytes.fromhex(trace.block) not in self._engine.store]
        self._enough = len(traces) - len(stale) + TRACES
        return stale

    def _of_chunk(self, tokens: Sequence[int], size: int, warmup: bytes) -> list[BlockKey]:
        """Names of a chunk's blocks, whatever codec was or will be set."""
        chains = [
            self._keys(tokens, size, kind=Kind.CHUNK, warmup=warmup, precision=precision)
            for precision in Precision
        ]
        return [key for chain in chains for key in chain]

    def _keys(self, tokens: Sequence[int], size: int, **kind: Any) -> list[BlockKey]:
        identity, tenant = self._engine.identity, self._engine.config.tenant.encode()
        return BlockKey.chain(tokens, identity=identity, tenant=tenant, size=size, **kind)
