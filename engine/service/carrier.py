"""What plans say, done: caches made, KV loaded and moved, steps computed, tokens chosen."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from copy import copy
from functools import partial
from itertools import repeat
from pathlib import Path
from traceback import clear_frames
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from engine.cache import Cache
from engine.decoding import places, seats
from engine.engine import Engine
from engine.plain import ATTEMPTS
from engine.request import Chosen
from engine.service.below import SwapStats
from engine.service.live import Live
from engine.service.plan import Plan, Started
from engine.service.room import Limits
from engine.service.slab import SlabCache
from engine.service.swap import Swap
from engine.sparse.cache import SparseCache
from engine.step import Piece, step
from kvstore.pool.spill import Spill
from native.threads import use_one_core

GROWTH = 256  # tokens by which a request's memory grows, on a CPU, which backs it as it is used


class Done(NamedTuple):
    """What a step came to, by request."""

    chosen: list[tuple[Live, Chosen]]
    failed: list[tuple[Live, Exception]]


class Carrier:
    """Carries out plans with one engine's model, store and memory. For the engine thread alone."""

    def __init__(self, engine: Engine) -> None:
        self._model, self._memory, self._store = engine.model, engine.memory, engine.store
        self._device, self._config = engine.model.shape.device, engine.config
        self.max_tokens = engine.config.schedule.max_tokens or engine.model.shape.max_positions
        self.max_running = places(
            *(self._model, self._memory, engine.config.schedule.max_running, self.max_tokens),
            engine.config.cache_bytes,
        )
        self._batch = seats(self._model, self._memory, self.max_running, self.max_tokens)
        self.swap = self._new_swap()
        self._unsettled: list[Live] = []  # prompts that are complete, but for their indexes
        self._promoter = ThreadPoolExecutor(1, "headrace-promoter", use_one_core)

    @property
    def movable(self) -> bool:
        """Whether KV of running requests may move: that of sparse ones is in the pool anyway."""
        return self._memory.pool is None

    def limits(self) -> Limits:
        """What all requests together may take."""
        schedule, on_gpu = self._config.schedule, self._device.type == "cuda"
        return Limits(
            step_tokens=schedule.step_tokens or self._config.chunk(self._device),
            max_running=self.max_running,
            max_waiting=schedule.max_waiting,
            device_bytes=self._config.cache_bytes,
            lower_bytes=0 if self.swap is None else self.swap.capacity_bytes,
            pool_bytes=self._memory.pool_bytes,
            granule=None if on_gpu else GROWTH,
        )

    @property
    def slack_bytes(self) -> int:
        """What a request's place below may take beside its KV."""
        return 0 if self.swap is None else self.swap.slack_bytes

    def swap_stats(self) -> SwapStats:
        """What was moved."""
        return SwapStats() if self.swap is None else copy(self.swap.stats)

    def _new_swap(self) -> Swap | None:
        """Where KV may be moved to; None where there is no such place."""
        config, spill = self._config, None
        if not self.movable:
            return None
        if config.spill_path is not None:
            spill = Spill(Path(config.spill_path), config.spill_bytes)
        if spill is None and not config.schedule.swap_bytes:
            return None
        return Swap(self._model.shape, config.schedule.swap_bytes, spill)

    # places

    def start(self, live: Live, *, alone: bool) -> Started:
        """See what is stored of a request's prompt; `place` follows, when there is room for it.

        Args:
            alone: nobody would be held up if the step waited for it, layer by layer.
        """
        live.mark("load" if live.attempts else "queue")
        if live.run.segments is not None:
            live.work = live.engine.blending.prefill_slices(live.run)
            return Started(0, ready=True)
        usable = live.usable if live.attempts < ATTEMPTS else []
        if live.attempts:  # not all that was there then could be read
            live.run.shared = None
        live.attempts += 1
        live.pins.enter_context(self._store.pin(usable))
        live.found = live.engine.plain.found(usable, live.run)
        live.waits = bool(live.found) and not alone
        live.mark("lookup")
        return Started(len(live.found) * self._config.block_tokens, ready=not live.waits)

    def place(self, live: Live, stir: Callable[[], None]) -> None:
        """Make the cache of a request that was started, and begin to load what is stored.

        Args:
            stir: called from another thread when that is there.
        """
        if live.work is not None:
            return
        live.loader = live.engine.plain.begin(live.run, live.found)
        if live.waits and live.loader is not None:
            live.coming = live.loader
            live.loader.add_done_callback(lambda _: stir())

    def forget(self, live: Live) -> None:
        """Free what a prompt that has to be read anew has."""
        live.loaded()
        live.run.release()

    def arrived(self, live: Live) -> None:
        """Take note of what has come: stored KV, or what was moved down. Raises what went wrong."""
        coming, live.coming = live.coming, None
        assert coming is not None
        coming.result()
        live.mark("load" if coming is live.loader else "swap")
        if live.loader is not None and coming is live.loader:
            live.engine.speeds.loaded(live.found, live.loader.load_s, live.run.shared)
        live.loaded()

    def out(self, live: Live) -> None:
        """Move a request's KV down."""
        live.mark("decode" if live.run.tokens else "prefill")
        assert self.swap is not None
        self.swap.out(_slab(live))
        live.mark("swap")

    def back(self, live: Live, stir: Callable[[], None]) -> None:
        """Begin to bring it back; `stir` as in `place`."""
        assert self.swap is not None
        live.coming = self.swap.back(_slab(live))
        live.coming.add_done_callback(lambda _: stir())

    def end(self, live: Live) -> None:
        """Free all that a request has, and keep near what it had from the store."""
        if live in self._unsettled:
            self._unsettled.remove(live)
        with ExitStack() as parts:  # each, whatever becomes of the others
            if live.run.stored:  # by another thread: it may read from the disk
                parts.callback(self._promoter.submit, self._store.promote, live.run.stored)
            parts.callback(live.release)
            if self._batch is not None:
                self._batch.leave(live.run)
            if self.swap is not None and isinstance(live.run.cache, SlabCache):
                self.swap.forget(live.run.cache)

    def close(self) -> None:
        """Free what requests were moved to."""
        self._promoter.shutdown()
        if self.swap is not None:
            self.swap.close()

    # steps

    def step(self, plan: Plan, lives: Mapping[int, Live]) -> Done:
        """Compute what a plan says; what fails in one request changes nothing for the others."""
        done = Done([], [])
        for live, row in [*self._packed(plan, lives, done), *self._parts(plan, lives, done)]:
            self._attempt(live, done, partial(self._complete, row=row))
        for live in list(self._unsettled):
            self._attempt(live, done, self._settle)
        return done

    def learn(self, plan: Plan, lives: Mapping[int, Live], seconds: float) -> None:
        """Note the speed of a step that read one prompt, all of what was not stored, and no more.

        Its logits were fetched, so that a GPU was done; nothing was loaded meanwhile.
        """
        if plan.decode or len(plan.prompt) != 1:
            return
        ((job, count),) = plan.prompt
        live = lives.get(job.id)
        if live is None or live.work is not None:
            return
        start = len(live.found) * self._config.block_tokens
        if count == len(live.run.request.prompt) - start and (live.waits or not start):
            live.engine.speeds.computed(count, seconds, start)

    @property
    def unsettled(self) -> bool:
        """Whether there is work beside what plans know of."""
        return bool(self._unsettled)

    def _packed(
        self, plan: Plan, lives: Mapping[int, Live], done: Done
    ) -> Iterator[tuple[Live, Float[Tensor, " vocab"]]]:
        """The rows of logits after newest tokens and complete prompts."""
        running = [lives[job.id] for job in plan.decode if job.id in lives]
        if self._batch is not None and running:
            seated = self._batch.step([live.run for live in running])
            yield from self._landed(zip(running, seated, repeat(None)), done)
        pieces = {} if self._batch is not None else {live: self._newest(live) for live in running}
        for job, count in plan.prompt:
            live = lives.get(job.id)  # none that could not be placed
            if live is not None and live.work is None:
                pieces[live] = self._chunk(live, count)
        rows = _fetched(step(self._model, list(pieces.values()))) if pieces else []
        errors = [piece.error for piece in pieces.values()]
        yield from self._landed(zip(pieces, rows, errors, strict=True), done)

    def _landed(
        self, results: Iterable[tuple[Live, Tensor | None, Exception | None]], done: Done
    ) -> Iterator[tuple[Live, Float[Tensor, " vocab"]]]:
        """What became complete goes to the store; the rows of logits that there are, go on."""
        for live, row, error in results:
            live.mark("decode" if live.run.tokens else "prefill")
            if error is not None:
                done.failed.append((live, error))
            elif self._attempt(live, done, _save) and row is not None:
                yield live, row

    def _newest(self, live: Live) -> Piece:
        newest = torch.tensor(live.run.tokens[-1:], device=self._device)
        return Piece(_cache(live), newest, prompt=False)

    def _chunk(self, live: Live, count: int) -> Piece:
        cache, prompt = _cache(live), live.run.request.prompt
        stop = cache.length + count
        tokens = torch.tensor(prompt[cache.length : stop], device=self._device)
        last = stop == len(prompt)
        return Piece(cache, tokens, prompt=True, logits=last, loader=live.loader)

    def _parts(
        self, plan: Plan, lives: Mapping[int, Live], done: Done
    ) -> Iterator[tuple[Live, Float[Tensor, " vocab"]]]:
        """The rows of logits after prompts of parts that became complete."""
        for job, count in plan.prompt:
            live = lives.get(job.id)
            if live is None or live.work is None:
                continue
            live.credit += count
            try:
                while live.credit > 0:
                    live.credit -= next(live.work)
            except StopIteration as end:
                live.work = None
                if self._attempt(live, done, _save):
                    yield live, end.value
            except Exception as error:
                clear_frames(error.__traceback__)  # they hold the cache
                done.failed.append((live, error))
            live.mark("blend")

    def _complete(self, live: Live, row: Float[Tensor, " vocab"]) -> Chosen | None:
        """After a row of logits: the next token, or, of a new prompt, its indexes first."""
        cache = live.run.cache
        if not live.run.tokens and live.run.segments is None:
            live.loaded()
            if isinstance(cache, SparseCache):
                live.logits, live.settling = row, cache.settle()
                self._unsettled.append(live)
                return None
        return self._choose(live, row)

    def _choose(self, live: Live, row: Float[Tensor, " vocab"]) -> Chosen:
        """The next token; with its first one a request takes its place in the batch."""
        if not live.run.tokens and self._batch is not None:
            self._batch.join(live.run)
        chosen = live.run.choose(row)
        live.mark("sample")
        return chosen

    def _settle(self, live: Live) -> Chosen | None:
        """One more layer of a complete prompt moves to the pool and gets its index."""
        assert live.settling is not None
        try:
            next(live.settling)
        except StopIteration:
            self._unsettled.remove(live)
            assert live.logits is not None
            row, live.logits, live.settling = live.logits, None, None
            live.mark("prefill")
            return self._choose(live, row)
        live.mark("prefill")
        return None

    def _attempt(self, live: Live, done: Done, act: Callable[[Live], Chosen | None]) -> bool:
        """Do something for one request; whether that went well."""
        try:
            chosen = act(live)
        except Exception as error:
            clear_frames(error.__traceback__)
            done.failed.append((live, error))
            return False
        if chosen is not None:
            done.chosen.append((live, chosen))
        return True


def _fetched(rows: list[Float[Tensor, " vocab"] | None]) -> list[Float[Tensor, " vocab"] | None]:
    """Rows of logits where tokens are chosen, in one copy."""
    there = [row for row in rows if row is not None]
    if not there or not there[0].is_cuda:
        return rows
    here = iter(torch.stack(there).cpu())
    return [None if row is None else next(here) for row in rows]


def _cache(live: Live) -> Cache:
    assert live.run.cache is not None, "it was started"
    return live.run.cache


def _slab(live: Live) -> SlabCache:
    assert isinstance(live.run.cache, SlabCache), "only those are movable"
    return live.run.cache


def _save(live: Live) -> None:
    live.engine.plain.save(live.run)
