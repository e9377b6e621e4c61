"""Who runs in the next step: one budget of tokens, and bytes reserved before they are used.

    forced, or for a higher priority      ── out
    decodes: all of them, in rank         ── grow, or whoever comes last goes out
    the line, in rank:  unfinished prompts ── as many tokens as are left, and have room
                        jobs that are out  ── back, if nobody went out
                        waiting jobs       ── start, and read
                        └─ who lacks a place holds up all behind it that lack one, too;
                           who may not start until others end, those that wait to start

Decodes first and prompts cut to fill the step are Sarathi-Serve's (Agrawal et al. 2024) and
DeepSpeed-FastGen's (2023). `engine.service.room` says who may be started, and why the rest then
goes on.
"""

from collections.abc import Callable, Iterable

from engine.errors import Busy
from engine.service.job import Job, State
from engine.service.order import Note, Policy
from engine.service.plan import Draft, Plan, Started
from engine.service.room import Limits, Room

Start = Callable[[Job], Started]


class Scheduler:
    """Decides, and keeps the books; the caller computes. For one thread.

    A round is `next`, the step, `done`, and `settled` or `finish` for whom it concerns. What a
    plan moves out and back counts as moved at once; a plan whose tokens were not computed is not
    reported, and comes again.
    """

    def __init__(self, limits: Limits, policy: Policy) -> None:
        self.limits, self.policy = limits, policy
        self.waiting: dict[Job, None] = {}
        self.started: dict[Job, None] = {}
        self.preemptions = 0
        self._room = Room(limits)
        self._forced: set[Job] = set()
        self._starved: list[Job] = []  # could have read in the last step
        self._arrivals = 0

    # what the caller says

    def add(self, job: Job) -> None:
        """Put a new job in line.

        Raises:
            PromptError: it needs more than a budget, and could never run.
            Busy: `max_waiting` jobs wait.
        """
        self._room.refuse(job)
        if len(self.waiting) >= self.limits.max_waiting:
            raise Busy(
                f"{len(self.waiting)} requests wait already, as many as schedule.max_waiting lets: "
                "try again later, or raise it"
            )
        job.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        self.waiting[job] = None
        self.policy.heard(Note.ADDED, job)

    def next(self, start: Start, beside: int | None = None) -> Plan:
        """The next step.

        Args:
            start: called when a waiting job gets its place, with room for its whole prompt. It
                must not raise; it may `finish` the job.
            beside: prompt tokens that there may be beside decodes; None fills the step.
        """
        starved = [job for job in self._starved if job.unread]
        self.policy.tick([*self.waiting, *self._in(State.OUT), *starved])
        draft = Draft(self.limits.step_tokens)
        self._give_way(draft)
        self._decodes(draft)
        if draft.decode and beside is not None:
            draft.left = min(draft.left, beside)
        self._line(draft, start)
        self._starved = [job for job in self.started if job.unread and job not in draft.prompt]
        return draft.plan()

    def ready(self, job: Job) -> None:
        """What was loaded of its prompt is there."""
        job.ready = True

    def again(self, job: Job) -> None:
        """What was to be loaded of its prompt is lost: it is back in line, where it stood.

        It is started anew; nothing it held is its own until then.
        """
        if job.state is State.PROMPT:
            self._room.leave(job)
            del self.started[job]
            self._forced.discard(job)
            job.state, job.ready, job.done = State.WAITING, False, 0
            self.waiting[job] = None
            self.policy.heard(Note.ADDED, job)

    def arrived(self, job: Job) -> None:
        """A job on its way back is there: it runs from the next step on."""
        if job.state is State.COMING:
            self._room.raised(job)
            job.state = State.DECODE if job.made else State.PROMPT

    def done(self, plan: Plan) -> None:
        """All that the plan said was computed."""
        for job, count in plan.prompt:
            job.done = min(job.prompt, job.done + count)
        for job in plan.decode:
            if job.state is State.DECODE:
                job.made += 1
                self.policy.heard(Note.TOKEN, job)

    def settled(self, job: Job) -> None:
        """Its prompt is complete and its first token chosen: it decodes from the next step on."""
        if job.state is State.PROMPT:
            job.state, job.done, job.made = State.DECODE, job.prompt, 1
            self._room.hold(job, job.prompt)
            self.policy.heard(Note.TOKEN, job)

    def finish(self, job: Job) -> None:
        """It is over, in whatever state; its memory is free, and must be. Twice is once."""
        if job in self.started or job in self.waiting:
            self.policy.heard(Note.ENDED, job)
            self._room.leave(job)
            self.waiting.pop(job, None)
            self.started.pop(job, None)
            self._forced.discard(job)
            job.state = State.ENDED

    def force_out(self, job: Job) -> None:
        """Move it down in the next step in which it can be. For tests."""
        if job in self.started:
            self._forced.add(job)

    # what the caller may ask

    @property
    def running(self) -> int:
        """Jobs that hold memory of the device."""
        return sum(job.running for job in self.started)

    @property
    def out(self) -> int:
        """Jobs whose KV is in a lower tier."""
        return len(self.started) - self.running

    @property
    def device_used(self) -> int:
        """Bytes."""
        return self._room.device_used

    @property
    def lower_used(self) -> int:
        """Bytes that jobs which are out, or on their way back, take at most."""
        return self._room.lower_used

    @property
    def pool_used(self) -> int:
        """Bytes that started jobs may come to need."""
        return self._room.pool_used

    def check(self) -> None:
        """AssertionError if the books disagree with the jobs."""
        self._room.check(self.started)
        assert self.running <= self.limits.max_running, "too many run"
        assert self._forced <= self.started.keys(), "who is over is still to be moved"
        for job in self.waiting:
            assert job.state is State.WAITING, "who waits"
            job.check()
        for job in self.started:
            assert job.state not in (State.WAITING, State.ENDED), "who was started"
            job.check()

    # the parts of a step

    def _give_way(self, draft: Draft) -> None:
        """Those that are told to go do so; and some for the first in line, if that is enough."""
        for job in [job for job in self._movable() if job in self._forced]:
            if self._room.houses([job]):
                self._move_out(job, draft)
        line = [*self.waiting, *self._in(State.OUT)]
        head = min(line, key=self.policy.rank, default=None)
        if head is None or head.state is not State.WAITING or not self._admitted(head):
            return
        candidates = [job for job in self._movable() if self.policy.preempts(head, job)]
        running, victims = self._running(), list[Job]()
        while not self._room.place(head, running, victims):
            if not candidates or not self._room.houses([*victims, candidates[-1]]):
                return
            victims.append(candidates.pop())
        for job in victims:
            self._move_out(job, draft)

    def _decodes(self, draft: Draft) -> None:
        """Every running decode gets its token, or leaves the device."""
        ranked = sorted(self._in(State.DECODE), key=self.policy.rank)
        for job in ranked:
            while job.decodes and not self._room.fits(job, job.next_length):
                self._move_out(self._movable()[-1], draft)  # the job itself, if nobody is behind
            if job.decodes:
                self._room.hold(job, job.next_length)
        draft.decode = [job for job in ranked if job.decodes]
        draft.left -= len(draft.decode)

    def _line(self, draft: Draft, start: Start) -> None:
        """Fill the step, in rank; who lacks a place holds up those behind it."""
        prompts = [job for job in self.started if job.unread]
        line = [*prompts, *self._in(State.OUT), *self.waiting]
        line.sort(key=self.policy.rank, reverse=True)
        while line:
            job = line.pop()
            if job.state is State.PROMPT:
                self._read(job, draft)
            elif draft.held_up or job.state is State.ENDED:
                continue
            elif job.state is State.OUT:
                self._come_back(job, draft)
            elif not self._admitted(job):  # until jobs end: those that are out must not wait for it
                line = [other for other in line if other.state is not State.WAITING]
            elif self._begin(job, draft, start):
                line.sort(key=self.policy.rank, reverse=True)  # a start may change the order
            else:
                draft.held_up = True

    def _read(self, job: Job, draft: Draft) -> None:
        """Tokens for a prompt, as many as have room: it sends nobody down for more."""
        if count := self._room.most(job, min(job.unread, draft.left)):
            self._room.hold(job, job.done + count)
            draft.prompt[job] = count
            draft.left -= count

    def _come_back(self, job: Job, draft: Draft) -> None:
        draft.held_up = bool(draft.out) or not self._room.place(job, self._running())
        if not draft.held_up:
            job.state = State.COMING
            self._room.hold(job, job.next_length)
            draft.back.append(job)

    def _begin(self, job: Job, draft: Draft, start: Start) -> bool:
        """Start a job and let it read, if it has a place and there are tokens left."""
        if not draft.left or not self._room.place(job, self._running()):
            return False
        del self.waiting[job]
        self.started[job], job.state = None, State.PROMPT
        self._room.enter(job)
        self._room.hold(job, job.prompt)
        found = start(job)
        if job.state is State.PROMPT:
            job.done, job.ready = found
            self._room.hold(job, job.done)
            self.policy.heard(Note.STARTED, job)
            self._read(job, draft)
        return True

    def _move_out(self, job: Job, draft: Draft) -> None:
        self._room.lower(job)
        self._forced.discard(job)
        job.state = State.OUT
        draft.out.append(job)
        self.preemptions += 1

    # who is where

    def _in(self, state: State) -> Iterable[Job]:
        return (job for job in self.started if job.state is state)

    def _running(self) -> list[Job]:
        return [job for job in self.started if job.running]

    def _admitted(self, job: Job) -> bool:
        return self._room.admits([*self.started, job])

    def _movable(self) -> list[Job]:
        """Jobs that could go out now, in rank."""
        here = (
            job
            for job in self.started
            if not job.pinned and (job.decodes or (job.unread and job.state is State.PROMPT))
        )
        return sorted(here, key=self.policy.rank)
