"""Requests drawn at random: bursts, lengths, conversations, failures; and all that from a trace."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from engine.errors import ConfigError
from evals.traffic.arrival import Arrival
from evals.traffic.spread import Spread, measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What requests are like.

    Args:
        gap_s: between one request and the next, of whatever conversation.
        message: tokens that a turn adds to the prompt of its conversation, the answer before it
            aside; a conversation's first prompt is one message.
        answer: tokens, of requests that do not fail.
        turns: of a conversation, on average; their number is geometric. 1: no conversations.
        think_s: a conversation's time from one turn to the next, needed where there are turns. The
            turn comes with the first request after that, so that `gap_s` stays what it is.
        failures: share of requests without an answer.
    """

    gap_s: Spread
    message: Spread
    answer: Spread
    turns: float = 1.0
    think_s: Spread | None = None
    failures: float = 0.0

    def __post_init__(self) -> None:
        if self.turns < 1 or not 0 <= self.failures < 1:
            raise ConfigError(
                "needs 1 turn or more on average, and a share of failures from 0 to below 1; "
                f"got turns={self.turns}, failures={self.failures}"
            )
        if self.turns > 1 and self.think_s is None:
            raise ConfigError("conversations need think_s, the time between their turns")


@dataclass(slots=True, order=True)
class _Talk:
    """A conversation, by when it goes on."""

    next_s: float
    name: str = field(compare=False)
    history: int = field(default=0, compare=False)  # tokens of its prompts and answers so far


def generate(traffic: Traffic, count: int, seed: int = 0) -> list[Arrival]:
    """So many requests, by time, the first at 0. The same seed draws the same ones."""
    if count < 1:
        raise ConfigError(f"needs 1 request or more, got {count}")
    dice = np.random.default_rng(seed)
    gaps = traffic.gap_s.draw(dice, count)
    times = (np.cumsum(gaps) - gaps[0]).tolist()
    messages = traffic.message.lengths(dice, count)
    answers = traffic.answer.lengths(dice, count)
    failed = (dice.random(count) < traffic.failures).tolist()
    ends = (dice.random(count) * traffic.turns < 1).tolist()  # so turns are geometric
    thinks = traffic.think_s.draw(dice, count).tolist() if traffic.think_s else [0.0] * count
    return list(_talked(zip(times, messages, answers, failed, ends, thinks, strict=True)))


def _talked(
    drawn: Iterable[tuple[float, int, int, bool, bool, float]],
) -> Iterator[Arrival]:
    """Give each request to the conversation that waited longest, or begin one."""
    waiting: list[_Talk] = []
    begun = 0
    for at_s, message, answer, fails, ends, think_s in drawn:
        if waiting and waiting[0].next_s <= at_s:
            talk = heapq.heappop(waiting)
        else:
            talk, begun = _Talk(at_s, f"s{begun}"), begun + 1
        new = 0 if fails else answer
        yield Arrival(at_s, talk.history + message, new, talk.name, fails)
        talk.history += message + new
        if not ends:
            talk.next_s = at_s + think_s
            heapq.heappush(waiting, talk)


def fit(arrivals: Sequence[Arrival]) -> Traffic:
    """The traffic that has the means and variations of these requests.

    Raises:
        ConfigError: fewer than two requests, or none with an answer.
    """
    if len(arrivals) < 2:
        raise ConfigError(f"needs 2 requests or more to fit, got {len(arrivals)}")
    turns = [turn for talk in conversations(arrivals) for turn in pairwise(talk)]
    answers = [x.new_tokens for x in arrivals if not x.failed]
    thinks = [after.at_s - before.at_s for before, after in turns]
    return Traffic(
        gap_s=measured([b.at_s - a.at_s for a, b in pairwise(arrivals)], "gamma"),
        message=measured(messages(arrivals)),
        answer=measured(answers),
        turns=len(arrivals) / (len(arrivals) - len(turns)),
        think_s=measured(thinks, "gamma") if thinks else None,
        failures=1 - len(answers) / len(arrivals),
    )


def messages(arrivals: Sequence[Arrival]) -> list[int]:
    """What each request's prompt has beyond its conversation's last turn; 1 at least.

    Of a prompt that is shorter than that turn's, all: the conversation was cut, and begins anew.
    """
    found = []
    for talk in conversations(arrivals):
        found.append(talk[0].prompt_tokens)
        for before, after in pairwise(talk):
            history = before.prompt_tokens + before.new_tokens
            known = after.prompt_tokens - (history if after.prompt_tokens > history else 0)
            found.append(known)
    return [max(1, x) for x in found]


def conversations(arrivals: Sequence[Arrival]) -> list[list[Arrival]]:
    """Requests of each conversation, in order; one without a session is one by itself."""
    talks: dict[str | int, list[Arrival]] = {}
    for number, x in enumerate(arrivals):
        talks.setdefault(number if x.session is None else x.session, []).append(x)
    return list(talks.values())
