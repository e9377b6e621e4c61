"""Where the time of a request goes, as its trace tells it."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.service.intervals import Intervals
from engine.service.spans import MAX_SPANS, NAMES, Recent, Trace, parse_traceparent, span

times = st.tuples(st.integers(0, 300), st.integers(0, 40)).map(lambda t: (t[0], t[0] + t[1]))


def union(intervals: list[tuple[int, int]]) -> int:
    return len({tick for start, end in intervals for tick in range(start, end)})


@given(st.lists(times, max_size=60))
def test_covered_time_is_the_union_of_all_intervals(intervals: list[tuple[int, int]]) -> None:
    covered = Intervals()
    for start, end in intervals:
        covered.add(start, end)
    assert covered.covered() == union(intervals)


@given(st.lists(times, max_size=80))
def test_settled_intervals_stay_exact_for_what_comes_in_order(
    intervals: list[tuple[int, int]],
) -> None:
    covered = Intervals(limit=4)
    for start, end in sorted(intervals):
        covered.add(start, end)
        assert len(covered) <= 4
    assert covered.covered() == union(intervals)


@given(st.lists(times, max_size=80))
def test_settled_intervals_never_count_twice(intervals: list[tuple[int, int]]) -> None:
    covered = Intervals(limit=4)
    for start, end in intervals:
        covered.add(start, end)
    assert covered.covered() <= union(intervals)


@given(st.lists(st.tuples(st.sampled_from(NAMES), times), max_size=200))
def test_a_trace_keeps_count_time_and_coverage_of_all_it_was_given(
    given_: list[tuple[str, tuple[int, int]]],
) -> None:
    trace = Trace()
    for name, (start, end) in given_:
        trace.add(name, trace.start_ns + start, trace.start_ns + end)
    assert trace.covered_ns == union([times for _, times in given_])
    assert len(trace.spans) <= MAX_SPANS + len(NAMES)
    for name in NAMES:
        mine = [(start, end) for other, (start, end) in given_ if other == name]
        if not mine:
            assert name not in trace.totals
            continue
        spans = [span for span in trace.spans if span.name == name]
        assert trace.totals[name].count == sum(s.count for s in spans) == len(mine)
        busy = sum(end - start for start, end in mine)
        assert trace.totals[name].busy_ns == sum(s.busy_ns for s in spans) == busy
        assert min(s.start_ns for s in spans) == trace.start_ns + min(mine)[0]
        assert max(s.end_ns for s in spans) == trace.start_ns + max(end for _, end in mine)


def test_thousands_of_decode_steps_are_one_span_with_its_busy_time() -> None:
    trace = Trace()
    for step in range(5000):
        at = trace.start_ns + 100 * step
        trace.add("decode", at, at + 60)
        trace.add("send", at + 50, at + 70)
    decode, send = trace.spans
    assert (decode.name, decode.count, decode.busy_ns) == ("decode", 5000, 5000 * 60)
    assert decode.end_ns - decode.start_ns == 4999 * 100 + 60
    assert (send.name, send.count) == ("send", 5000)
    assert trace.covered_ns == 5000 * 70


def test_another_phase_between_begins_a_new_span() -> None:
    trace = Trace()
    for number, name in enumerate(["queue", "prefill", "prefill", "decode", "swap", "decode"]):
        trace.add(name, trace.start_ns + number, trace.start_ns + number + 1)
    names = [(span.name, span.count) for span in trace.spans]
    assert names == [("queue", 1), ("prefill", 2), ("decode", 1), ("swap", 1), ("decode", 1)]


def test_a_span_around_thousands_of_others_covers_the_gaps_between_them() -> None:
    trace = Trace()
    with trace.span("send"):
        begun = time.perf_counter_ns()
        for _ in range(3000):
            at = time.perf_counter_ns()
            trace.add("decode", at, at + 1)
        ended = time.perf_counter_ns()
    assert trace.covered_ns >= ended - begun


def test_a_span_measures_its_body_even_if_that_fails() -> None:
    trace = Trace()
    with pytest.raises(OSError), trace.span("tokenise"):
        raise OSError
    assert trace.totals["tokenise"].count == 1


def test_an_ended_trace_does_not_change() -> None:
    trace = Trace("GET /")
    with trace.span("http"):
        trace.end()  # closes what is open
        wall, covered = trace.wall_ns, trace.covered_ns
    trace.add("decode", trace.start_ns, trace.start_ns + 5)
    with trace.span("send"):
        pass
    trace.end()
    assert set(trace.totals) == {"http"}
    assert (trace.wall_ns, trace.covered_ns) == (wall, covered)


def test_what_lies_before_the_start_is_cut_off() -> None:
    trace = Trace()
    trace.add("http", trace.start_ns - 100, trace.start_ns + 1)
    trace.add("http", trace.start_ns - 100, trace.start_ns - 50)
    assert trace.covered_ns == trace.totals["http"].busy_ns == 1


def test_an_unknown_name_is_refused_before_the_work() -> None:
    trace = Trace()
    with pytest.raises(ValueError, match="one of http, tokenise"), trace.span("cook"):
        raise AssertionError("not reached")
    with pytest.raises(ValueError, match="cook"):
        trace.add("cook", 0, 1)


def test_requests_without_a_trace_cost_nothing() -> None:
    trace = Trace()
    with span(None, "decode"), span(trace, "decode"):
        pass
    assert trace.totals["decode"].count == 1


def test_threads_may_add_to_one_trace() -> None:
    trace = Trace()

    def work() -> None:
        for _ in range(500):
            with trace.span("send"):
                trace.add("decode", trace.start_ns, trace.start_ns + 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trace.totals["send"].count == trace.totals["decode"].count == 2000
    trace.end()
    assert trace.covered_ns <= trace.wall_ns


def test_recent_keeps_the_last_ones_and_the_sums_of_all() -> None:
    recent = Recent(capacity=3)
    traces = []
    for number in range(5):
        trace = Trace(str(number))
        trace.add("decode", trace.start_ns, trace.start_ns + 10)
        trace.end()
        recent.add(trace)
        traces.append(trace)
    assert [trace.name for trace in recent.traces()] == ["4", "3", "2"]
    shares = recent.shares()
    assert shares.traces == shares.totals["decode"].count == 5
    assert shares.totals["decode"].busy_ns == shares.covered_ns == 50
    assert shares.wall_ns == sum(trace.wall_ns for trace in traces)


def test_no_tenant_pushes_out_the_traces_of_another() -> None:
    recent = Recent(capacity=2)
    for name, tenant in [("1", "a"), ("2", "b"), ("3", "b"), ("4", "b"), ("5", "a")]:
        trace = Trace(name)
        trace.attributes["tenant"] = tenant
        trace.end()
        recent.add(trace)
    assert [trace.name for trace in recent.traces()] == ["5", "4", "3", "1"]


def test_the_id_comes_from_a_valid_traceparent() -> None:
    id_, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    trace = Trace(traceparent=f"00-{id_}-{parent}-01")
    assert (trace.id, trace.parent_id) == (id_, parent)
    assert Trace().id != Trace().id
    assert len(Trace(traceparent="nonsense").id) == 32


@pytest.mark.parametrize(
    ("header", "valid"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00", True),
        ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-comes-later", True),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-extra", False),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", False),
        ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", False),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7", False),
        ("", False),
        (None, False),
    ],
)
def test_traceparent_is_read_as_w3c_says(header: str | None, valid: bool) -> None:
    assert (parse_traceparent(header) is not None) is valid


@given(st.text(max_size=80))
def test_no_header_breaks_a_trace(header: str) -> None:
    assert len(Trace(traceparent=header).id) == 32
