"""What the scheduler knows of a request: how long it is, what it needs, how far it has come."""

from dataclasses import dataclass, field
from enum import Enum


class State(Enum):
    """Where a job is."""

    WAITING = "waiting"  # has no place yet
    PROMPT = "prompt"  # on the device, reads its prompt, or waits for KV that is loaded
    DECODE = "decode"  # on the device, one token a step
    OUT = "out"  # its KV was moved to a lower tier
    COMING = "coming"  # its KV is on the way back
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of one token's KV.

    Args:
        prompt: on the device, until the first token is chosen.
        answer: on the device, afterwards.
        pool: in the pool where the KV of sparse requests lies.
        fixed: on the device, whatever the length.
        built: of the whole job, at most on the device until the first token is chosen, if that is
            more than what `prompt` comes to.
        slack: of the whole job, that rounding may add where its KV lies below the device.
        movable: may be moved to a lower tier; False for sparse jobs, whose KV is there already.
    """

    prompt: int
    answer: int
    pool: int = 0
    fixed: int = 0
    built: int = 0
    slack: int = 0
    movable: bool = True

    def most(self, tokens: int) -> int:
        """Bytes on the device, at most, of so many tokens that are not moved meanwhile."""
        # a cache is made as large at once
        return max(self.prompt * tokens, self.built, self.answer * tokens) + self.fixed


@dataclass(slots=True, eq=False)
class Job:
    """One request. The scheduler writes what follows `whole`; everybody may read it.

        prompt 5, limit 3:   p p p p p | a b c     capacity 7: the last token's KV is never needed
        after `settled`:     done 5, made 1        the next step appends a, and makes b

    Args:
        limit: most tokens it may generate.
        whole: its prompt is read in slices of unknown size, and cannot be moved meanwhile.
    """

    id: int
    tenant: str
    prompt: int
    limit: int
    need: Need
    priority: int = 0
    whole: bool = False

    state: State = field(default=State.WAITING, init=False)
    arrival: int = field(default=0, init=False)  # how many came before
    ready: bool = field(default=False, init=False)  # what the store has of its prompt is loaded
    done: int = field(default=0, init=False)  # prompt tokens in the cache
    made: int = field(default=0, init=False)  # tokens generated; 0 until settled
    length: int = field(default=0, init=False)  # tokens that have room on the device
    held: int = field(default=0, init=False)  # bytes of that

    @property
    def capacity(self) -> int:
        """Tokens whose KV it may need."""
        return self.prompt + self.limit - 1

    @property
    def pinned(self) -> bool:
        """Cannot be moved down, in the phase it is in."""
        return not self.need.movable or (self.whole and not self.made)

    @property
    def unread(self) -> int:
        """Prompt tokens it could be given now.

        A `whole` job may take more than its prompt has, as it computes some of it twice: until it
        is settled it can be given as many as the step has room for.
        """
        if self.state is not State.PROMPT or not self.ready:
            return 0
        return self.prompt if self.whole else self.prompt - self.done

    @property
    def decodes(self) -> bool:
        """Is in the next step. One that made all its tokens only waits to be ended."""
        return self.state is State.DECODE and self.made < self.limit

    @property
    def running(self) -> bool:
        """Holds memory of the device."""
        return self.state in (State.PROMPT, State.DECODE, State.COMING)

    @property
    def next_length(self) -> int:
        """Tokens in the cache when the next token's KV is there, or that are there of a prompt."""
        return self.prompt + min(self.made, self.limit - 1) if self.made else self.done

    def check(self) -> None:
        """AssertionError if it has what it cannot have."""
        if self.state is State.WAITING:
            assert self.held == self.done == self.made == 0, "who waits has nothing"
        assert self.done <= self.prompt, "more than the prompt"
        assert not self.made or self.done == self.prompt, "an answer without a prompt"
        assert self.made <= self.limit, "more than was asked for"
