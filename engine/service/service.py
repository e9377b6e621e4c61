"""Requests that run together over time: one thread takes step after step, others ask and listen."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from typing import TypeVar

import torch

from engine.blend.segments import Segments
from engine.engine import Engine
from engine.errors import Cancelled, DeadlineExceeded, EngineError, PromptTooLong, ServerStopping
from engine.loading import BlocksLost
from engine.request import Chosen
from engine.service.ask import Ask, Failure, Listener, Ticket
from engine.service.carrier import Carrier
from engine.service.chores import Chores
from engine.service.job import Job, State
from engine.service.live import Live
from engine.service.outbox import Outbox
from engine.service.pace import Pace
from engine.service.plan import Plan, Started
from engine.service.scheduler import Scheduler
from engine.service.stats import ServiceStats
from engine.slices import Slices
from native.heap import give_back

log = logging.getLogger(__name__)
T = TypeVar("T")
QUIET_S = 0.5  # with nothing to do, until freed memory is given back


class Service:
    """Serves requests with one engine, as they come. All methods may be called from any thread.

    Every step computes a token of each running request and chunks of prompts beside them; see
    `engine.service.scheduler`. Answers are those that each request would get alone, up to the
    rounding of matrix products of other sizes.

    The engine's `cache_bytes`, pool and `schedule` bound what runs. The engine stays its owner's:
    close it after the service, and use it for little else meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._carrier = Carrier(engine)
        try:
            self._scheduler = Scheduler(self._carrier.limits(), engine.config.schedule.order())
        except Exception:
            self._carrier.close()
            raise
        self._live: dict[int, Live] = {}  # by the job's id
        self._pace = Pace(engine.config.schedule.slowdown)
        self._started: list[Live] = []  # by the plan of this turn
        self._numbers = count(1)
        self._door = threading.Condition()  # guards the scheduler, and all of these
        self._stirred = self._draining = self._closed = False
        self._unused = True  # nothing was done since freed memory was given back
        self._stats = ServiceStats()
        self._chores = Chores()
        self._outbox = Outbox(lambda live: self._end_by(live, Cancelled("it has all it asked for")))
        self._thread = threading.Thread(target=self._work, name="headrace-engine", daemon=True)
        self._thread.start()

    def submit(self, ask: Ask, listener: Listener) -> Ticket:
        """Take a request; events come to the listener, from one thread, which it must not hold up.

        The last event has a completion, or is a `Failure`.

        Raises:
            PromptError: it can never be served, and why.
            Busy: too many requests wait already.
            ServerStopping: the service takes no more.
        """
        live = self._accept(ask, listener)
        with self._door:
            self._refuse_stopping()
            self._scheduler.add(live.job)
            self._live[live.job.id] = live
            self._stir()
        return live.ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request at its next step; its listener gets a `Failure`. Idempotent."""
        with self._door:
            if (live := self._live.get(ticket.id)) is not None:
                self._end_by(live, Cancelled("the request was cancelled"))

    def background(self, work: Callable[[], Slices[T]], owner: str = "") -> Future[T]:
        """Do what can wait, a slice at a time between steps; owners take turns.

        Raises:
            ServerStopping: no more is taken.
        """
        with self._door:
            self._refuse_stopping()
            self._stir()
            return self._chores.add(work, owner)

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer that budgets let one request have."""
        return min(self._carrier.max_tokens, self.engine.memory.longest)

    @property
    def draining(self) -> bool:
        """Whether it takes no more requests."""
        return self._draining

    def stats(self) -> ServiceStats:
        """What it does now, and what it did since it began."""
        with self._door:
            stats = self._stats.now(self._scheduler, len(self._chores))
            stats.swap = self._carrier.swap_stats()
        return stats

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests, and wait for those there are; whether all have ended."""
        with self._door:
            self._draining = True
            longest = min(timeout_s, threading.TIMEOUT_MAX)
            return self._door.wait_for(lambda: not (self._live or self._chores), longest)

    def close(self) -> None:
        """End all requests, and the thread. Idempotent."""
        with self._door:
            self._draining = self._closed = True
            self._stir()
        self._thread.join()
        self._outbox.close()
        self._carrier.close()

    def _accept(self, ask: Ask, listener: Listener) -> Live:
        engine, number = ask.engine or self.engine, next(self._numbers)
        run = engine.accept(
            ask.prompt, ask.max_new_tokens, ask.sampling, ask.stop, ask.blend, ask.logprobs,
            exact=ask.exact,
        )  # fmt: skip
        run.movable, prompt = self._carrier.movable, len(run.request.prompt)
        if run.capacity > self._carrier.max_tokens:
            raise PromptTooLong(
                f"{prompt} tokens of prompt and {ask.max_new_tokens} of answer are more than "
                f"schedule.max_tokens ({self._carrier.max_tokens}): raise it, or ask for less"
            )
        job = Job(
            id=number,
            tenant=ask.tenant,
            prompt=prompt,
            limit=run.capacity + 1 - prompt,
            need=engine.memory.need(run, slack=self._carrier.slack_bytes),
            priority=ask.priority,
            whole=isinstance(ask.prompt, Segments),
        )
        live = Live(Ticket(number), ask, engine, run, job, listener)
        if job.whole:  # here, as it takes long for long prompts
            run.shared = engine.blending.shared(run)
        else:
            live.usable = engine.plain.usable(run)
            run.shared = engine.store.shared(live.usable)
        return live

    # the engine thread

    @torch.inference_mode()
    def _work(self) -> None:
        try:
            while not self._closed:
                try:
                    busy = self._turn()
                except Exception:  # a fault of ours: nobody knows what state requests are in
                    log.exception("the engine thread failed")
                    busy = True
                    self._fail_all(EngineError("the engine failed"))
                self._unused = self._unused and not busy
                if not (busy or self._rest() or self._live or self._unused):
                    give_back()
                    self._unused = True
        finally:
            with self._door:
                self._draining = self._closed = True
            self._fail_all(ServerStopping("the service was stopped"))
            with self._door:
                self._chores.cancel()
                self._door.notify_all()

    def _turn(self) -> bool:
        """One step; False if there was nothing to do, and nobody stirred since."""
        with self._door:
            self._stirred, self._started = False, []
        self._sweep()
        with self._door:
            plan = self._scheduler.next(self._start, self._pace.allows())
        self._move(plan)
        worked = self._step(plan)
        with self._door:
            reading = bool(plan.prompt)
            chore = self._chores.next(reading=reading) if self._pace.may_pause() else None
        if chore is not None:
            began = time.perf_counter()
            chore.slice()
            self._pace.paused(time.perf_counter() - began)
            with self._door:
                self._chores.put_back(chore)
                self._door.notify_all()
        return worked or chore is not None or bool(plan.out or plan.back)

    def _move(self, plan: Plan) -> None:
        """KV leaves the device before any comes, or is made room for."""
        for job in plan.out:
            self._guarded(self._live[job.id], self._carrier.out)
        for live in self._started:
            self._guarded(live, lambda live: self._carrier.place(live, self._wake))
        for job in plan.back:
            self._guarded(self._live[job.id], lambda live: self._carrier.back(live, self._wake))

    def _step(self, plan: Plan) -> bool:
        """Compute a plan's tokens; whether there was anything to do."""
        began = time.perf_counter()
        try:
            step = self._carrier.step(plan, self._live)
        except Exception as error:  # the model's: nobody's alone of those in the step
            log.exception("a step failed")
            jobs = [*plan.decode, *(job for job, _ in plan.prompt)]
            for live in [self._live[job.id] for job in jobs if job.id in self._live]:
                self._fail(live, EngineError(f"a step failed: {type(error).__name__}"))
            return True
        read = sum(count for _, count in plan.prompt)
        seconds = time.perf_counter() - began
        self._pace.learn(len(plan.decode), read, seconds)
        self._carrier.learn(plan, self._live, seconds)
        with self._door:
            self._scheduler.done(plan)
            self._stats.steps += bool(plan.tokens)
            self._stats.prompt_tokens += read
        for live, failure in step.failed:
            self._failed(live, failure)
        for live, chosen in step.chosen:
            self._chose(live, chosen)
        return bool(plan.tokens or step.chosen or step.failed) or self._carrier.unsettled

    def _sweep(self) -> None:
        """End what was cancelled, is late or could not start; go on with what has come."""
        for live in list(self._live.values()):
            if live.late:
                self._end_by(live, DeadlineExceeded(f"not complete in {live.ask.deadline_s} s"))
            if live.ended_by is not None:
                self._fail(live, live.ended_by)
            elif live.coming is not None and live.coming.done():
                self._guarded(live, self._arrived)

    def _arrived(self, live: Live) -> None:
        self._carrier.arrived(live)
        with self._door:
            if live.job.state is State.COMING:
                self._scheduler.arrived(live.job)
            else:
                self._scheduler.ready(live.job)

    def _start(self, job: Job) -> Started:
        """A waiting request gets its place. The door is held."""
        live, others = self._live[job.id], len(self._scheduler.started) > 1
        try:
            found = self._carrier.start(live, alone=not (others or self._scheduler.waiting))
            self._started.append(live)
            return found
        except Exception as error:  # it ends before the next step
            self._end_by(live, error)
            return Started(0, ready=False)

    def _chose(self, live: Live, chosen: Chosen) -> None:
        """A token was chosen: the request decodes on, or ends."""
        with self._door:
            if len(live.run.tokens) == 1:
                self._scheduler.settled(live.job)
            self._stats.new_tokens += 1
        if chosen.ending is not None:
            self._end(live)
            self._stats.completed += 1
        live.mark("sample")  # until it was its turn among those of the step
        self._outbox.put(live, chosen)

    def _failed(self, live: Live, error: Exception) -> None:
        """Something failed in one request. Blocks that were lost are computed, all else ends it."""
        if not isinstance(error, BlocksLost) or live.run.segments is not None:
            self._fail(live, error)
            return
        log.warning("computing the prompt again: %s", error)
        self._carrier.forget(live)
        with self._door:
            self._scheduler.again(live.job)

    def _guarded(self, live: Live, act: Callable[[Live], None]) -> None:
        try:
            act(live)
        except Exception as error:
            self._failed(live, error)

    def _fail(self, live: Live, error: Exception) -> None:
        """End a request without a completion."""
        self._end(live)
        if live.quiet and live.run.finish_reason is not None:  # its text came to a stop
            self._stats.completed += 1
        elif isinstance(error, Cancelled):
            self._stats.cancelled += 1
        else:
            self._stats.failed += 1
        self._outbox.put(live, Failure(error))

    def _end(self, live: Live) -> None:
        """Free all that a request has, in whatever state it is. It does not raise."""
        try:
            self._carrier.end(live)
        except Exception:  # who asked must hear of the end all the same
            log.exception("cannot free all of %s", live.ticket)
        with self._door:
            self._scheduler.finish(live.job)
            self._live.pop(live.job.id, None)
            self._stir()  # whoever waited for its place

    def _fail_all(self, error: Exception) -> None:
        with self._door:
            everyone = list(self._live.values())
        for live in everyone:
            self._fail(live, error)

    # who stirs it; the door is held

    def _wake(self) -> None:
        with self._door:
            self._stir()

    def _end_by(self, live: Live, error: Exception) -> None:
        """Have a request ended before the next step."""
        live.ended_by = live.ended_by or error
        self._wake()

    def _stir(self) -> None:
        self._stirred = True
        self._door.notify_all()

    def _rest(self) -> bool:
        """Wait until there is something to do; False if a time passed in which there was not."""
        with self._door:
            return self._door.wait_for(lambda: self._stirred or self._closed, self._rest_s())

    def _rest_s(self) -> float | None:
        """Until the next deadline, or until memory is given back."""
        if not self._live:
            return None if self._unused else QUIET_S
        deadlines = [live.deadline for live in self._live.values() if live.deadline is not None]
        if not deadlines:
            return None
        return min(max(0.0, min(deadlines) - time.monotonic()), threading.TIMEOUT_MAX)

    def _refuse_stopping(self) -> None:
        if self._draining:
            raise ServerStopping("the service is stopping: it takes no more")
