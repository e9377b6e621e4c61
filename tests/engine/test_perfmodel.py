"""The controller: what it learns, what it chooses, and its reasons; on a simulated clock."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.perfmodel import Decision, PerfModel, Work

LAYERS = 12
BYTES = 12 * 2 * 4 * 64 * 2  # per token
A, B = 2.0e-5, 1.0e-9  # seconds per token and per square of tokens of a prefill
ASKED = 0.2


def work(reusable: int = 4096, fresh: int = 64, **changes) -> Work:
    loads = {"disk": reusable * BYTES}
    return replace(Work(reusable, fresh, loads, ASKED), **changes)


def seconds(decision: Decision, words: str) -> float:
    """That its reason has behind these words."""
    found = re.search(rf"{words} (\S+) s\b", decision.reason)
    assert found is not None
    return float(found[1])


class Machine:
    """Loads at a bandwidth, computes like a processor with attention, layer after layer."""

    def __init__(self, bandwidth: float, blend: float = 1.0) -> None:
        self.bandwidth, self.blend = bandwidth, blend

    def load_s(self, given: Work) -> float:
        return 0.0005 + sum(given.loads.values()) / self.bandwidth

    def compute_s(self, given: Work, share: float) -> float:
        n, s = given.reusable, given.fresh
        return self.blend * (A * (share * n + s) + B * (share * n * n + 2 * s * n + s * s))

    def full_s(self, given: Work) -> float:
        n = given.reusable + given.fresh
        return A * n + B * n * n

    def run(self, given: Work, decision: Decision) -> float:
        """Time to the first token, layer by layer."""
        if not decision.load:
            return self.full_s(given)
        load = self.load_s(given) / LAYERS
        compute = self.compute_s(given, decision.share) / LAYERS
        loaded = done = 0.0
        for _ in range(LAYERS):
            loaded += load
            done = max(done, loaded) + compute
        return done


def teach(model: PerfModel, machine: Machine, given: Work, decision: Decision) -> None:
    if not decision.load:
        model.prefilled(given.reusable + given.fresh, machine.full_s(given))
        return
    model.loaded("disk", sum(given.loads.values()), machine.load_s(given))
    model.blended(given, decision.share, machine.compute_s(given, decision.share))


def taught(bandwidth: float, *sizes: int) -> PerfModel:
    model, machine = PerfModel(LAYERS), Machine(bandwidth)
    for size in sizes or (512, 2048, 4096):
        model.prefilled(size, machine.full_s(work(size, 0)))
        model.loaded("disk", size * BYTES, size * BYTES / bandwidth)
    return model


FIXED = [Decision(False, 1.0, "")] + [
    Decision(True, share, "") for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
]


@pytest.mark.parametrize("blend", [0.8, 1.0, 1.5])
@pytest.mark.parametrize("bandwidth", [5e7, 4e8, 2e10])
def test_the_controller_is_within_a_tenth_of_the_best_fixed_choice(bandwidth, blend):
    machine, model = Machine(bandwidth, blend), PerfModel(LAYERS)
    sizes = [1024, 4096, 2048, 5120, 512, 8192, 3072] * 12
    for size in (512, 512, 2048):  # chunks are computed before they can be reused
        model.prefilled(size, machine.full_s(work(size, 0)))
    spent = 0.0
    for size in sizes:
        decision = model.decide(work(size))
        spent += machine.run(work(size), decision)
        teach(model, machine, work(size), decision)
    fixed = [sum(machine.run(work(size), choice) for size in sizes) for choice in FIXED]
    assert spent <= 1.1 * min(fixed)


def test_a_tier_slower_than_prefill_is_not_loaded_from_and_the_reason_says_so():
    decision = taught(5e7).decide(work())
    assert (decision.load, decision.share) == (False, 1.0)
    assert decision.reason == (
        "compute: loading 1.01 s from disk at 0.05 GB/s is no faster than prefill in 0.101 s"
    )
    assert seconds(decision, "prefill in") == pytest.approx(Machine(1).full_s(work()), 0.01)


def test_a_fast_tier_is_loaded_from_with_the_share_asked_for():
    decision = taught(2e10).decide(work())
    assert (decision.load, decision.share) == (True, ASKED)
    assert decision.reason.startswith("load: 0.00252 s from disk at 20 GB/s, ")
    assert decision.reason.endswith("; share 0.20 as asked")
    assert seconds(decision, "GB/s,") < seconds(decision, "prefill") / 3


def test_what_loading_hides_is_computed_anew_for_nothing():
    machine, decision = Machine(8e8), taught(8e8).decide(work())
    assert decision.load
    assert 0.4 < decision.share < 0.9
    asked = machine.run(work(), Decision(True, ASKED, ""))
    assert machine.run(work(), decision) <= 1.1 * asked
    assert f"share {decision.share:.2f} instead of 0.20" in decision.reason
    assert "hides behind loading" in decision.reason


def test_several_tiers_are_loaded_one_after_the_other():
    model = taught(1e10)
    model.loaded("host", 10**8, 0.001)
    mixed = work(loads={"host": 10**8, "disk": 10**8})
    decision = model.decide(mixed)
    assert "0.011 s from disk and host at 18 GB/s" in decision.reason


def test_without_measurements_it_loads_what_was_asked_for_and_says_what_is_missing():
    model = PerfModel(LAYERS)
    first = model.decide(work())
    assert (first.load, first.share) == (True, ASKED)
    assert "prefill was not measured yet" in first.reason
    model.prefilled(512, 0.01)
    second = model.decide(work())
    assert (second.load, second.share) == (True, ASKED)
    assert "disk was not measured yet" in second.reason


def test_without_a_prefill_it_learns_from_blends():
    model, machine = PerfModel(LAYERS), Machine(5e7)
    teach(model, machine, work(), model.decide(work()))
    decision = model.decide(work())
    assert not decision.load
    assert seconds(decision, "prefill in") == pytest.approx(machine.full_s(work()), rel=0.2)


def test_nothing_reusable_is_computed():
    decision = taught(1e9).decide(Work(0, 100, {}, ASKED))
    assert decision == Decision(False, 1.0, "compute: nothing to reuse")


def test_a_tier_of_no_bytes_does_not_matter():
    decision = taught(2e10).decide(work(loads={"disk": 4096 * BYTES, "host": 0}))
    assert "from disk at" in decision.reason


@pytest.mark.parametrize("loads", [{}, {"disk": 0}])
def test_what_was_computed_just_now_is_used_at_once(loads):
    decision = taught(5e7).decide(work(loads=loads))
    assert (decision.load, decision.share) == (True, ASKED)
    assert decision.reason.startswith("load: in 0 s what was computed just now, ")


def breaking_even() -> float:
    """The bandwidth at which loading and computing take as long."""
    low, high = 1e7, 1e10
    for _ in range(60):
        middle = math.sqrt(low * high)
        d = taught(middle).decide(work())
        low, high = (low, middle) if d.load else (middle, high)
    return high


def test_a_little_faster_does_not_change_the_way_a_lot_faster_does():
    even, model = breaking_even(), PerfModel(LAYERS)
    model.prefilled(4096, Machine(1).full_s(work(4096, 0)))

    def at(bandwidth: float) -> bool:
        for _ in range(60):
            model.loaded("disk", 4096 * BYTES, 4096 * BYTES / bandwidth)
        return model.decide(work()).load

    assert at(1.2 * even)
    assert at(0.97 * even)  # computing would be a little faster
    assert not at(0.8 * even)
    assert not at(1.03 * even)
    assert at(1.5 * even)


def test_a_tier_that_became_faster_is_found_out():
    model, fast = taught(5e7), Machine(5e9)
    loading = []
    for _ in range(1500):
        decision = model.decide(work())
        teach(model, fast, work(), decision)
        loading.append(decision.load)
    assert not any(loading[:100])
    assert all(loading[1000:])


def test_a_trial_is_called_one():
    model = taught(5e7)
    decisions = [model.decide(work()) for _ in range(1000)]
    assert {d.reason.split()[0] for d in decisions} == {"load:", "compute:"}
    assert all(("tried again" in d.reason) == d.load for d in decisions)


def test_trying_a_slow_tier_costs_a_few_hundredths_of_the_time():
    machine, model = Machine(1e7), taught(1e7)
    decisions = [model.decide(work()) for _ in range(3000)]
    spent = sum(machine.run(work(), decision) for decision in decisions)
    assert any(decision.load for decision in decisions)
    assert spent < 1.04 * 3000 * machine.full_s(work())


def test_prefill_is_learned_with_its_attention():
    model = taught(1e9, 256, 1024, 4096)
    assert model._prefill.full(work(16384, 64)) == pytest.approx(
        Machine(1).full_s(work(16384, 64)), rel=1e-6
    )


def test_a_prefill_behind_a_prefix_teaches_the_same():
    model = PerfModel(LAYERS)
    for start in (0, 1024, 4096):
        model.prefilled(512, A * 512 + B * ((start + 512) ** 2 - start**2), start=start)
    assert model._prefill.full(work()) == pytest.approx(Machine(1).full_s(work()), rel=1e-6)


def test_tokens_behind_an_exact_prefix_cost_more_attention():
    model = taught(1e10)
    assert model._prefill.full(work(start=8192)) > model._prefill.full(work())
    assert model._prefill.full(work(start=8192)) == pytest.approx(
        A * 4160 + B * ((8192 + 4160) ** 2 - 8192**2), rel=1e-6
    )


def test_an_old_speed_is_forgotten():
    model = taught(1e10)
    for _ in range(100):
        model.prefilled(4096, 10 * Machine(1).full_s(work(4096, 0)))
    assert model._prefill.full(work(4096, 0)) == pytest.approx(
        10 * Machine(1).full_s(work(4096, 0)), rel=0.02
    )


def test_small_loads_are_judged_by_small_loads():
    model = taught(1e10, 4096)
    model.loaded("disk", 64 * BYTES, 0.01)
    small, large = model.decide(work(64, 1)), model.decide(work(4096, 1))
    assert not small.load
    assert large.load


def test_slow_blending_is_learned():
    model = taught(1e10)
    before = model.decide(work())
    for _ in range(60):
        model.blended(work(), ASKED, 8 * Machine(1).compute_s(work(), ASKED))
    after = model.decide(work())
    assert before.load
    assert not after.load


@given(
    st.integers(1, 10**6), st.integers(0, 10**5), st.floats(0, 1), st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-6, 1e3)), max_size=5),
    st.lists(st.tuples(st.integers(1, 10**12), st.floats(1e-6, 1e3)), max_size=5),
)  # fmt: skip
def test_whatever_was_measured_the_share_is_never_below_the_one_asked_for(
    reusable, fresh, share, start, prefills, loads
):
    model = PerfModel(LAYERS)
    for tokens, seconds in prefills:
        model.prefilled(tokens, seconds)
    for nbytes, seconds in loads:
        model.loaded("disk", nbytes, seconds)
    given_work = Work(reusable, fresh, {"disk": reusable * BYTES}, share, start)
    decision = model.decide(given_work)
    assert share <= decision.share <= 1
    assert decision.load or decision.share == 1
    assert not re.search(r"nan|inf| -", decision.reason)


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_clock_that_stood_still_teaches_nothing(seconds):
    model = PerfModel(LAYERS)
    model.prefilled(512, seconds)
    model.loaded("disk", 10**6, seconds)
    assert "not measured yet" in model.decide(work()).reason
