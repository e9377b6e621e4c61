"""How fast each method reads a sample and goes on: prompt tokens/s, time to the first token, steps.

Caches of all methods are there at once, and each token is decoded by all of them before the next:
in every round another one begins, so that what slows the machine slows them alike. The question's
tokens, which count for the first token, come first and warm all of them up.

    prefill_tok_s   tokens of the context read a second, densely; the same for all methods
    index_s         moving the context's KV to where the method keeps it, and its indexes
    question_s      the question's tokens, through the method's decode path
    step_ms         of an answer token: the median, and step_ms_p90
    speedup         median over steps of dense's time in units of the method's
"""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from engine.cache import Cache
from engine.decode import decode
from engine.engine import Engine
from engine.errors import ConfigError
from engine.model.pieces import Model
from evals.context import index_name, now
from evals.cost import cost
from evals.facts import peak_bytes, reset_peak
from evals.record import Record
from evals.task import Sample
from evals.trial import FAILURES, QUESTION_TOKENS, Trial, failed, one_line, prompts, trials
from evals.ways import DENSE, Way

SUITE = "speed"
ALONE = 3  # tokens decoded while peak memory is measured


@dataclass(slots=True)
class Runner:
    """A method on its way through question and answer."""

    way: Way
    cache: Cache
    peak_mem: int | None
    token: int = 0  # the newest, of the answer
    seconds: list[float] = field(default_factory=list)  # of every step


def measure(
    engine: Engine,
    sample: Sample,
    ways: Sequence[Way],
    *,
    steps: int = 32,
    question_tokens: int = QUESTION_TOKENS,
) -> Iterator[Record]:
    """A record for every turn, method and budget; dense runs beside them in any case.

    Memory is that of the context's KV once more for every method and budget. Peak memory of each
    is taken while no other is there; the context's own KV, which all start from, is in it.

    Args:
        ways: dense and methods at budgets; see `evals.ways`.
        steps: tokens of the answer that are timed, whether or not it ends before.
        question_tokens: that go through the decode path; of a longer question its last ones, and
            what is before them is read with the context.
    Raises:
        ConfigError: a setting out of range.
    """
    if min(steps, question_tokens) < 1:
        raise ConfigError("steps and question_tokens must be at least 1")
    try:
        asked = prompts(engine, sample, steps)
    except FAILURES as error:
        yield from failed(sample, SUITE, ways, error)
        return
    context, start = None, None
    for trial in trials(engine, sample, asked, steps, question_tokens):
        if trial.context is not context:  # has no indexes yet
            context, start = trial.context, _in_use(trial.model.shape.device)
        yield from _records(trial, ways, steps, start)


def _records(trial: Trial, ways: Sequence[Way], steps: int, start: int | None) -> Iterator[Record]:
    baseline = [] if any(not way.method.sparse for way in ways) else [DENSE]
    able: list[tuple[Way, int | None]] = []
    for way in (*baseline, *ways):
        try:
            able.append((way, _alone(trial, way, start)))
        except FAILURES as error:
            line = one_line(error)
            if way in ways:
                yield trial.record(SUITE, way, error=line)
    with ExitStack() as stack:
        runners = [Runner(way, stack.enter_context(trial.cache(way)), peak) for way, peak in able]
        take_turns(trial.model, runners, trial.question, steps)
        dense = next((x for x in runners if not x.way.method.sparse), None)
        for runner in runners:
            if runner.way in ways:
                yield _record(trial, runner, dense)


def _record(trial: Trial, runner: Runner, dense: Runner | None) -> Record:
    context, asked = trial.context, len(trial.question)
    question_s, seconds = sum(runner.seconds[:asked]), runner.seconds[asked:]
    index_s = context.build_s.get(index_name(runner.way.method), 0.0)
    median = statistics.median(seconds)
    measures = {
        "prefill_tok_s": context.length / context.prefill_s,
        "index_s": index_s,
        "question_s": question_s,
        "step_ms": 1e3 * median,
        "step_ms_p90": 1e3 * float(torch.tensor(seconds).quantile(0.9)),
    }
    if dense is not None:  # else there was no memory for it
        pairs = zip(dense.seconds[asked:], seconds, strict=True)
        measures["speedup"] = statistics.median(theirs / ours for theirs, ours in pairs)
    return trial.record(
        SUITE,
        runner.way,
        ttft_s=context.prefill_s + index_s + question_s,
        decode_tok_s=1 / median,
        peak_mem=runner.peak_mem,
        measures=measures,
        **cost(trial.model, runner.cache, context.length),
    )


def take_turns(
    model: Model, runners: Sequence[Runner], question: Sequence[int], steps: int
) -> None:
    """Decode a question and `steps` tokens of each runner's own greedy answer, round by round."""
    device = model.shape.device
    for i in range(len(question) + steps):
        begin = i % max(1, len(runners))
        for runner in (*runners[begin:], *runners[:begin]):
            token = question[i] if i < len(question) else runner.token
            start = now(device)
            logits = decode(model, [runner.cache], torch.tensor([token], device=device))
            runner.token = int(logits[0].argmax())
            runner.seconds.append(now(device) - start)


def _alone(trial: Trial, way: Way, start: int | None) -> int | None:
    """The most memory in use, of which `start` was before any cache, if there were only this one.

    Indexes of other methods, which the context keeps, are taken off; its own is there already, and
    what a cache adds to an index is a copy of it, as the first token is appended.
    """
    device = trial.model.shape.device
    with trial.cache(way):
        pass
    before = _in_use(device)
    with trial.cache(way) as cache:
        reset_peak(device)
        for token in trial.question[:ALONE]:
            decode(trial.model, [cache], torch.tensor([token], device=device))
        most = peak_bytes(device)
    return None if most is None or before is None or start is None else start + most - before


def _in_use(device: torch.device) -> int | None:
    reset_peak(device)
    return peak_bytes(device)
