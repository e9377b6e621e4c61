"""Requests that run together get what each would get alone, and nobody's end is another's."""

import math
import queue
import random
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing

import pytest
import torch

from engine import Engine, EngineConfig, PromptError
from engine.blend.repair import BlendConfig
from engine.blend.segments import Segments
from engine.errors import Busy, Cancelled, DeadlineExceeded, EngineError, ServerStopping
from engine.method import preset
from engine.request import Event
from engine.sampling import Sampling
from engine.service import service as service_module
from engine.service.ask import Ask, Failure
from engine.service.schedule import ScheduleConfig
from engine.service.service import Service
from engine.service.slab import SlabCache
from kvstore.config import StoreConfig
from tests.engine.families import build, prompt

WAIT_S = 60.0
BIG = StoreConfig(host_bytes=1 << 26)
TOKEN_BYTES = 3 * 2 * 2 * 64 * 4  # of the little Llama, in fp32


@pytest.fixture(scope="module")
def module():
    return build("llama")


class Client:
    """Listens to one request."""

    def __init__(self) -> None:
        self.events: queue.Queue = queue.Queue()
        self.told: list[Event] = []

    def __call__(self, event) -> None:
        self.events.put(event)

    def next(self):
        event = self.events.get(timeout=WAIT_S)
        if isinstance(event, Failure):
            raise event.error
        self.told.append(event)
        return event

    def completion(self):
        while (done := self.next().completion) is None:
            pass
        assert self.events.empty()
        return done


def ask(service, tokens, count=12, **settings):
    client = Client()
    client.ticket = service.submit(Ask(prompt=tokens, max_new_tokens=count, **settings), client)
    return client


def config(**settings):
    schedule = settings.pop("schedule", {})
    given = dict(block_tokens=16, store=BIG, prefill_chunk=32) | settings
    return EngineConfig(**given, schedule=ScheduleConfig(**({"max_running": 8} | schedule)))


def served(module, asked, settings, *, counts=None, disturb=lambda service: None, **options):
    """Tokens of prompts that were asked for together."""
    counts = counts or [12] * len(asked)
    with Engine(module, config=settings) as engine:
        service = Service(engine)
        try:
            clients = [ask(service, p, n, **options) for p, n in zip(asked, counts)]
            disturb(service)
            got = [client.completion() for client in clients]
            empty(service)
            return got, service.stats()
        finally:
            service.close()


def empty(service):
    """Nothing is left of any request."""
    assert service.drain(WAIT_S)
    stats = service.stats()
    assert (stats.waiting, stats.running, stats.swapped) == (0, 0, 0)
    assert stats.device_bytes == stats.lower_bytes == 0
    pool = service.engine.memory.pool
    assert pool is None or pool.free_blocks == pool.num_blocks
    assert not service.engine.store._pins
    service._scheduler.check()


def alone(module, asked, counts=None, **settings):
    """Tokens of each prompt by itself, in an engine that knows nothing."""
    counts = counts or [12] * len(asked)
    out = []
    for one, count in zip(asked, counts):
        with Engine(module, config=EngineConfig(block_tokens=16, **settings)) as engine:
            out.append(engine.generate([one], max_new_tokens=count)[0].tokens)
    return out


ASKED = [prompt(n, seed=n).tolist() for n in (3, 90, 40, 1, 130, 64)]
COUNTS = [30, 5, 18, 25, 1, 40]


@pytest.mark.parametrize(
    ("step_tokens", "policy"), [(8, "fair"), (33, "fcfs"), (33, "fair"), (4096, "fcfs")]
)
def test_requests_together_are_answered_as_each_alone(module, policy, step_tokens):
    settings = config(schedule=dict(policy=policy, step_tokens=step_tokens))
    got, stats = served(module, ASKED, settings, counts=COUNTS)
    assert [done.tokens for done in got] == alone(module, ASKED, COUNTS)
    assert stats.new_tokens == sum(COUNTS)
    assert (stats.completed, stats.failed, stats.cancelled) == (6, 0, 0)


@pytest.mark.parametrize(
    ("below", "policy"), [("host", "fcfs"), ("disk", "fair"), ("both", "fcfs"), ("both", "fair")]
)
def test_moving_requests_down_and_back_changes_no_token(module, policy, below, tmp_path):
    need = [(len(p) + c) * TOKEN_BYTES for p, c in zip(ASKED, COUNTS)]
    room = {"host": sum(need) * 2, "disk": 0, "both": max(need) // 2}[below]
    settings = config(
        cache_bytes=170 * TOKEN_BYTES,
        spill_path=None if below == "host" else str(tmp_path / "spill"),
        spill_bytes=1 << 26,
        schedule=dict(policy=policy, swap_bytes=room),
    )

    def disturb(service):
        """Move somebody down before every fifth step or so."""
        dice, start = random.Random(5), service._scheduler.next

        def forced(begin, beside):
            movable = [live.job for live in service._live.values() if live.run.tokens]
            if movable and dice.random() < 0.2:
                service._scheduler.force_out(dice.choice(movable))
            return start(begin, beside)

        service._scheduler.next = forced

    got, stats = served(module, ASKED, settings, counts=COUNTS, disturb=disturb)
    assert [done.tokens for done in got] == alone(module, ASKED, COUNTS)
    assert stats.swap.outs > 5
    assert (stats.swap.disk_bytes_read > 0) == (below != "host")


@pytest.mark.parametrize("name", ["headrace", "shadowkv", "quest", "a2ats"])
def test_sparse_methods_answer_as_alone(module, name):
    method = preset(name, budget=48, **({"rank": 32} if name == "shadowkv" else {}))
    counts = [20, 5, 12, 8, 1, 8]
    got, _ = served(module, ASKED, config(method=method), counts=counts)
    assert [done.tokens for done in got] == alone(module, ASKED, counts, method=method)


def test_a_batch_in_static_shapes_takes_requests_as_they_come_and_go(module):
    """As on a GPU, where there is one batch for all of them; here with the kernels' definitions."""
    method = preset("headrace", budget=200, attend_on="device")
    with Engine(module, config=config(method=method, schedule=dict(max_tokens=200))) as engine:
        engine.memory.batched = True
        service = Service(engine)
        clients = [ask(service, p, n) for p, n in zip([*ASKED, *ASKED], [*COUNTS, *COUNTS])]
        got = [client.completion().tokens for client in clients]
        with pytest.raises(PromptError, match=r"schedule\.max_tokens"):
            ask(service, ASKED[4], 72)
        empty(service)
        service.close()
    want = alone(module, ASKED, COUNTS, method=method)
    assert got == [*want, *want]


def test_who_waits_for_a_shared_tier_holds_up_nobody_else(module, monkeypatch):
    with Engine(module, config=config()) as engine, ThreadPoolExecutor() as threads:
        service, answers = Service(engine), threading.Event()
        try:
            with monkeypatch.context() as slow:
                slow.setattr(engine.store, "shared", lambda keys: answers.wait(WAIT_S) and {})
                late = threads.submit(ask, service, ASKED[4])
                wait({late}, 0.05)
                slow.setattr(engine.store, "shared", lambda keys: {})
                assert len(ask(service, ASKED[1]).completion().tokens) == 12
                assert not late.done()
                answers.set()
            asked = late.result(WAIT_S)
            assert asked.completion().tokens == alone(module, [ASKED[4]])[0]
            lookup, told = engine.store.lookup, []
            monkeypatch.setattr(engine.store, "shared", lambda keys: {b"told": True})
            monkeypatch.setattr(
                engine.store, "lookup", lambda keys, known: told.append(known) or lookup(keys)
            )
            ask(service, ASKED[5]).completion()
            assert told == [{b"told": True}]
        finally:
            service.close()


def test_what_one_request_stored_the_next_one_loads(module):
    long = prompt(150, seed=9).tolist()
    with Engine(module, config=config()) as engine:
        service = Service(engine)
        first = ask(service, long).completion()
        busy = ask(service, prompt(20).tolist(), 60)
        busy.next()  # so that the next one's load is waited for beside it
        again = ask(service, [*long, 7, 8])
        assert again.completion().stats.cached_tokens == 144
        assert first.stats.cached_tokens == 0
        busy.completion()
        empty(service)
        service.close()
        fresh = alone(module, [[*long, 7, 8]])
    assert [event.token for event in again.told] == fresh[0]


@pytest.mark.parametrize("beside", [False, True])
def test_a_lost_block_is_computed_again(module, beside, monkeypatch):
    long = prompt(100).tolist()
    with Engine(module, config=config()) as engine:
        service = Service(engine)
        ask(service, long).completion()
        monkeypatch.setattr(engine.store, "read_many", lambda keys, *_: [None] * len(keys))
        lookup, believed = engine.store.lookup, []
        monkeypatch.setattr(engine.store, "shared", lambda keys: {})
        monkeypatch.setattr(
            engine.store, "lookup", lambda keys, said: believed.append(said) or lookup(keys)
        )
        other = ask(service, prompt(7).tolist(), 80) if beside else None
        if other:
            other.next()
        done = ask(service, long).completion()
        if other:
            other.completion()
        empty(service)
        service.close()
    assert done.tokens == alone(module, [long])[0]
    assert done.stats.cached_tokens == 0
    first = 1 + beside
    assert believed[:first] == [{}] * first
    assert set(believed[first:]) == {None}  # a shared tier is asked again


def test_prompts_of_parts_are_blended_beside_others(module):
    chunks = [prompt(40, seed=s).tolist() for s in range(3)]
    parts = Segments(prompt(5).tolist(), chunks, prompt(9, seed=8).tolist())
    blend = BlendConfig(share=0.3, controller=False)
    with Engine(module, config=config()) as engine:
        (want,) = engine.generate([parts], max_new_tokens=9, blend=blend)
    with Engine(module, config=config(schedule=dict(step_tokens=16))) as engine:
        service = Service(engine)
        clients = [ask(service, p, n) for p, n in zip(ASKED, COUNTS)]
        mine = ask(service, parts, 9, blend=blend)
        assert mine.completion().tokens == want.tokens
        got = [client.completion().tokens for client in clients]
        empty(service)
        service.close()
    assert got == alone(module, ASKED, COUNTS)


def test_every_event_has_its_logprob_where_they_are_asked_for(module):
    with Engine(module, config=config()) as engine:
        service = Service(engine)
        client = ask(service, prompt(30).tolist(), 5, logprobs=3)
        done = client.completion()
        logs = engine.logits([*prompt(30).tolist(), *done.tokens[:-1]])[29:].log_softmax(-1)
        for event, row in zip(client.told, logs):
            assert event.logprob.token == event.token
            assert event.logprob.logprob == pytest.approx(float(row[event.token]), abs=1e-4)
            assert [one.token for one in event.logprob.top] == row.topk(3).indices.tolist()
        service.close()


def test_a_request_is_cancelled_whatever_it_is_at(module):
    settings = config(schedule=dict(max_running=1, step_tokens=8))
    with Engine(module, config=settings) as engine:
        service = Service(engine)
        running = ask(service, prompt(9).tolist(), 400)
        waiting = ask(service, prompt(9).tolist(), 400)
        running.next()
        for client in (waiting, running):
            service.cancel(client.ticket)
            service.cancel(client.ticket)
            with pytest.raises(Cancelled):
                client.completion()
        reading = ask(service, prompt(400).tolist(), 9)
        service.cancel(reading.ticket)
        with pytest.raises(Cancelled):
            reading.completion()
        empty(service)
        assert service.stats().cancelled == 3
        service.close()


@pytest.mark.parametrize("at", ["out", "coming", "loading"])
def test_a_request_is_cancelled_while_its_kv_is_elsewhere(module, at, monkeypatch):
    settings = config(schedule=dict(swap_bytes=1 << 24))
    with Engine(module, config=settings) as engine:
        service = Service(engine)
        reached, go_on = threading.Event(), threading.Event()
        swap = service._carrier.swap

        def held(act):
            def slow(*arguments):
                reached.set()
                assert go_on.wait(WAIT_S)
                return act(*arguments)

            return slow

        other = ask(service, prompt(5).tolist(), 300)
        other.next()
        if at == "loading":
            ask(service, prompt(99).tolist(), 1).completion()
            monkeypatch.setattr(engine.store, "read_many", held(engine.store.read_many))
            mine = ask(service, prompt(99).tolist(), 50)
        else:
            mine = ask(service, prompt(99).tolist(), 400)
            mine.next()
            target = "out" if at == "out" else "_fill"
            monkeypatch.setattr(swap, target, held(getattr(swap, target)))
            with service._door:
                service._scheduler.force_out(service._live[mine.ticket.id].job)
        assert reached.wait(WAIT_S)
        service.cancel(mine.ticket)
        go_on.set()
        with pytest.raises(Cancelled):
            mine.completion()
        service.cancel(other.ticket)
        empty(service)
        assert swap.used_bytes == 0
        service.close()


def test_a_deadline_ends_a_request_that_runs_and_one_that_waits(module):
    with Engine(module, config=config(schedule=dict(max_running=1))) as engine:
        service = Service(engine)
        clients = [ask(service, prompt(9).tolist(), 100_000, deadline_s=0.05) for _ in range(2)]
        for client in clients:
            with pytest.raises(DeadlineExceeded):
                client.completion()
        empty(service)
        service.close()


@pytest.mark.parametrize("where", ["append", "attend", "save", "choose", "tell", "listener"])
def test_what_breaks_in_one_request_ends_that_one_alone(module, where, monkeypatch):
    with Engine(module, config=config()) as engine:
        service = Service(engine)
        victim, others = Client(), [ask(service, p, n) for p, n in zip(ASKED, COUNTS)]
        victim.ticket = service.submit(
            Ask(prompt=prompt(50).tolist(), max_new_tokens=60), broken(victim, where)
        )
        first = victim.next()
        assert first.completion is None
        breaks(service, victim.ticket, where, monkeypatch)
        if where != "listener":
            with pytest.raises(RuntimeError, match="on purpose"):
                victim.completion()
        got = [client.completion().tokens for client in others]
        empty(service)
        service.close()
    assert got == alone(module, ASKED, COUNTS)


def broken(client, where):
    def listen(event):
        client(event)
        if where == "listener" and client.events.qsize() > 1:
            raise RuntimeError("on purpose")

    return listen


def breaks(service, ticket, where, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("on purpose")

    with service._door:
        live = service._live[ticket.id]
        target = {
            "append": (live.run.cache, "append"),
            "attend": (live.run.cache, "attend"),
            "save": (live.engine.plain, "save"),
            "choose": (live.run, "choose"),
            "tell": (live.run, "tell"),
        }.get(where)
        if target and where != "save":
            monkeypatch.setattr(*target, fail)
        elif where == "save":
            save = live.engine.plain.save
            hit = live.run
            monkeypatch.setattr(
                live.engine.plain, "save", lambda run: fail() if run is hit else save(run)
            )


def test_who_waits_gets_the_place_of_one_that_could_not_begin(module, monkeypatch):
    long = prompt(100).tolist()
    with Engine(module, config=config(schedule=dict(max_running=1))) as engine:
        service = Service(engine)
        ask(service, long).completion()
        place = service._carrier.place

        def full(live, stir):
            if live.found:  # it would wait for these, and compute nothing
                raise MemoryError("no room on the device")
            place(live, stir)

        monkeypatch.setattr(service._carrier, "place", full)
        first = ask(service, prompt(7).tolist(), 30)
        first.next()
        second, third = ask(service, long), ask(service, prompt(9).tolist(), 3)
        first.completion()
        with pytest.raises(MemoryError):
            second.completion()
        third.completion()
        empty(service)
        service.close()


def test_a_step_that_breaks_ends_those_in_it_and_the_next_ones_are_served(module, monkeypatch):
    with Engine(module, config=config()) as engine:
        service = Service(engine)
        client = ask(service, prompt(9).tolist(), 500)
        client.next()
        embed = engine.model.embed

        def once(tokens):
            monkeypatch.setattr(engine.model, "embed", embed)
            raise RuntimeError("out of memory, say")

        monkeypatch.setattr(engine.model, "embed", once)
        with pytest.raises(EngineError, match="RuntimeError"):
            client.completion()
        assert ask(service, ASKED[1], 5).completion().tokens == alone(module, ASKED[1:2], [5])[0]
        empty(service)
        service.close()


def test_what_can_never_run_and_what_is_too_much_is_refused_at_once(module):
    settings = config(cache_bytes=100 * TOKEN_BYTES, schedule=dict(max_waiting=1, max_running=1))
    with Engine(module, config=settings) as engine:
        service = Service(engine)
        with pytest.raises(PromptError, match="cache_bytes"):
            ask(service, prompt(90).tolist(), 50)
        with pytest.raises(PromptError, match="empty"):
            ask(service, [])
        running = ask(service, prompt(9).tolist(), 90)
        running.next()
        ask(service, prompt(9).tolist(), 3)
        with pytest.raises(Busy, match="max_waiting"):
            ask(service, prompt(9).tolist(), 3)
        running.completion()
        empty(service)
        with pytest.raises(ServerStopping):
            ask(service, prompt(9).tolist(), 3)
        service.close()


def test_closing_ends_what_runs(module):
    with Engine(module, config=config()) as engine:
        service = Service(engine)
        clients = [ask(service, prompt(9).tolist(), 5000) for _ in range(3)]
        clients[0].next()
        service.close()
        for client in clients:
            with pytest.raises(ServerStopping):
                client.completion()


def test_background_work_is_done_beside_requests_and_when_there_are_none(module):
    chunks = [prompt(40, seed=s).tolist() for s in range(4)]
    with Engine(module, config=config(schedule=dict(step_tokens=16))) as engine:
        service = Service(engine)
        clients = [ask(service, p, n) for p, n in zip(ASKED, COUNTS)]
        service.background(lambda: engine.precompute_slices(chunks[:2])).result(WAIT_S)
        assert [c.completion().tokens for c in clients] == alone(module, ASKED, COUNTS)
        service.background(lambda: engine.precompute_slices(chunks)).result(WAIT_S)
        for chunk in chunks:
            keys = engine.blending.chunks.keys((), tuple(chunk))
            assert engine.store.lookup(keys) == len(keys)

        def broken():
            yield 1
            raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            service.background(broken).result(WAIT_S)
        empty(service)
        service.close()


def test_tenants_share_no_kv(module):
    long = prompt(100).tolist()
    with Engine(module, config=config()) as engine:
        service = Service(engine)
        views = [engine.of_tenant(name) for name in ("one", "two")]
        got = [ask(service, long, engine=v, tenant=n) for v, n in zip([*views, *views], "aabb")]
        first = [client.completion() for client in got]
        assert len({tuple(done.tokens) for done in first}) == 1
        again = [ask(service, long, engine=view).completion() for view in views]
        assert [done.stats.cached_tokens for done in again] == [96, 96]
        assert ask(service, long).completion().stats.cached_tokens == 0
        service.close()


def test_two_threads_that_ask_and_cancel_at_random_leave_nothing(module):
    with Engine(module, config=config(schedule=dict(swap_bytes=1 << 24))) as engine:
        service = Service(engine)

        def work(seed):
            dice = random.Random(seed)
            for _ in range(12):
                client = ask(service, prompt(dice.randrange(1, 120), seed=seed).tolist(), 20)
                for _ in range(dice.randrange(4)):
                    client.next()
                if dice.random() < 0.5:
                    service.cancel(client.ticket)
                try:
                    client.completion()
                except Cancelled:
                    assert len(client.told) < 20

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        empty(service)
        service.close()


def test_a_seed_draws_the_same_tokens_alone_and_among_others(module):
    sampling = Sampling(temperature=1.0, seed=11)
    with Engine(module, config=config()) as engine:
        service = Service(engine)
        others = [ask(service, p, n) for p, n in zip(ASKED, COUNTS)]
        mine = ask(service, ASKED[2], 20, sampling=sampling).completion()
        for client in others:
            client.completion()
        service.close()
        (want,) = engine.generate([ASKED[2]], max_new_tokens=20, temperature=1.0, seed=11)
    assert mine.tokens == want.tokens


def test_dense_requests_of_a_service_lie_in_slabs(module):
    with Engine(module, config=config()) as engine:
        service = Service(engine)
        client = ask(service, prompt(9).tolist(), 200)
        client.next()
        with service._door:
            (live,) = service._live.values()
            assert isinstance(live.run.cache, SlabCache)
        service.close()
    assert torch.is_inference_mode_enabled() is False


@pytest.mark.parametrize("count", [1, 9])
def test_a_sparse_request_that_is_alone_comes_to_its_end(module, count):
    method = preset("headrace", budget=48)
    with Engine(module, config=config(method=method)) as engine:
        service = Service(engine)
        for _ in range(2):
            assert len(ask(service, ASKED[1], count).completion().tokens) == count
        empty(service)
        service.close()


def test_what_cannot_be_freed_keeps_nobody_from_hearing_of_the_end(module, monkeypatch):
    with Engine(module, config=config()) as engine:
        service = Service(engine)
        mine, other = (ask(service, prompt(9).tolist(), 300) for _ in range(2))
        mine.next(), other.next()
        with service._door:
            run = service._live[mine.ticket.id].run
        release = run.release

        def broken():
            release()
            raise RuntimeError("on purpose")

        monkeypatch.setattr(run, "release", broken)
        service.cancel(mine.ticket)
        with pytest.raises(Cancelled):
            mine.completion()
        other.completion()
        empty(service)
        service.close()


def test_a_failed_step_ends_nobody_who_was_not_in_it(module, monkeypatch):
    with Engine(module, config=config()) as engine:
        service = Service(engine)
        ask(service, prompt(99).tolist(), 1).completion()
        running = ask(service, prompt(5).tolist(), 500)
        running.next()
        read_many, go_on = engine.store.read_many, threading.Event()
        reached = threading.Event()

        def held(*arguments):
            reached.set()
            assert go_on.wait(WAIT_S)
            return read_many(*arguments)

        monkeypatch.setattr(engine.store, "read_many", held)
        loading = ask(service, prompt(99).tolist(), 3)
        assert reached.wait(WAIT_S)
        embed = engine.model.embed

        def once(tokens):
            monkeypatch.setattr(engine.model, "embed", embed)
            raise RuntimeError("out of memory, say")

        monkeypatch.setattr(engine.model, "embed", once)
        with pytest.raises(EngineError, match="RuntimeError"):
            running.completion()
        go_on.set()
        assert loading.completion().stats.cached_tokens == 96
        empty(service)
        service.close()


def test_a_fault_of_the_engine_thread_ends_all_and_serves_the_next(module, monkeypatch):
    with Engine(module, config=config()) as engine:
        service = Service(engine)
        client = ask(service, prompt(9).tolist(), 300)
        client.next()
        done = service._scheduler.done

        def once(plan):
            service._scheduler.done = done
            raise KeyError("on purpose")

        service._scheduler.done = once
        with pytest.raises(EngineError, match="engine failed"):
            client.completion()
        ask(service, ASKED[0], 3).completion()
        empty(service)
        service.close()


def test_nobody_who_was_ended_by_a_fault_gets_a_place(module, monkeypatch):
    settings = config(method=preset("headrace", budget=48), pinned_bytes=300 * TOKEN_BYTES)
    with Engine(module, config=settings) as engine:
        service = Service(engine)
        plan = service._scheduler.next

        def broken(start, beside):
            if plan(start, beside).prompt:
                monkeypatch.undo()
                raise ZeroDivisionError
            return plan(start, beside)

        monkeypatch.setattr(service._scheduler, "next", broken)
        first = ask(service, prompt(40).tolist())
        with pytest.raises(EngineError, match="the engine failed"):
            first.completion()
        ask(service, prompt(40).tolist()).completion()
        empty(service)
        service.close()


def test_a_drain_sees_the_end_of_background_work(module):
    with Engine(module, config=config()) as engine:
        service = Service(engine)
        go_on = threading.Event()

        def slow():
            yield 1
            assert go_on.wait(WAIT_S)
            yield 1

        future = service.background(slow)
        threading.Timer(0.2, go_on.set).start()
        assert service.drain(math.inf)
        assert future.done()
        service.close()


def test_work_that_cannot_begin_says_so_and_owners_take_turns(module):
    with Engine(module, config=config()) as engine:
        service = Service(engine)

        def bad():
            raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            service.background(bad).result(WAIT_S)
        order, go_on = [], threading.Event()

        def work(name):
            def slices():
                assert go_on.wait(WAIT_S)
                yield 1
                order.append(name)

            return slices

        futures = [service.background(work(name), name[0]) for name in ("a1", "a2", "a3", "b1")]
        go_on.set()
        for future in futures:
            future.result(WAIT_S)
        assert order.index("b1") < order.index("a2")
        service.close()


def test_a_batch_forgets_requests_that_ended(module):
    method = preset("headrace", budget=200, attend_on="device")
    with Engine(module, config=config(method=method, schedule=dict(max_tokens=60))) as engine:
        engine.memory.batched = True
        service = Service(engine)
        for _ in range(2):
            ask(service, ASKED[2], 4).completion()
        empty(service)
        assert not service._carrier._batch._slots
        service.close()


def test_kv_leaves_the_device_before_a_place_is_made_for_who_is_first(module):
    need = 170 * TOKEN_BYTES
    schedule = dict(policy="fair", swap_bytes=1 << 24)
    with Engine(module, config=config(cache_bytes=need, schedule=schedule)) as engine:
        service = Service(engine)
        slabs = []
        low = ask(service, prompt(60).tolist(), 100)
        low.next()
        cache = engine.memory.cache

        def made(run, recorder):
            slabs.append(
                [live.run.cache.nbytes for live in service._live.values() if live.run.cache]
            )
            return cache(run, recorder)

        engine.memory.cache = made
        ask(service, prompt(90).tolist(), 60, priority=5).completion()
        low.completion()
        assert slabs == [[0]]
        assert service.stats().preemptions == 1
        empty(service)
        service.close()


def test_a_request_that_takes_the_whole_pool_is_served(module):
    method = preset("headrace", budget=48)
    block = 3 * 2 * 64 * 2 * 64 * 4 // 2  # three layers, two heads, 64 tokens, K and V
    with Engine(module, config=config(method=method, pinned_bytes=4 * block)) as engine:
        service = Service(engine)
        tokens = engine.memory.pool.num_blocks * 64
        assert service.longest == tokens
        ask(service, prompt(tokens - 20).tolist(), 20).completion()
        empty(service)
        service.close()


def test_repaired_kv_is_kept_where_it_is_asked_for(module):
    chunks = [prompt(40, seed=s).tolist() for s in range(3)]
    parts = Segments(prompt(5).tolist(), chunks, prompt(9, seed=8).tolist())
    blend = BlendConfig(share=0.3, controller=False, keep_repaired=True)
    with Engine(module, config=config()) as engine:
        service = Service(engine)
        ask(service, parts, 1, blend=blend).completion()
        again = ask(service, parts, 1, blend=blend).completion()
        assert again.stats.blend.repaired_tokens > 0
        service.close()


def test_closing_an_idle_service_ends_its_thread(module):
    with Engine(module, config=config()) as engine:
        for _ in range(20):
            service = Service(engine)
            closing = threading.Thread(target=service.close)
            closing.start()
            closing.join(WAIT_S)
            assert not closing.is_alive()


def test_memory_is_given_back_once_after_work_and_again_after_more(module, monkeypatch):
    given = queue.Queue()
    monkeypatch.setattr(service_module, "give_back", lambda: given.put(threading.get_ident()))
    monkeypatch.setattr(service_module, "QUIET_S", 0.01)
    with Engine(module, config=config()) as engine, closing(Service(engine)) as service:
        for _ in range(2):
            ask(service, prompt(40).tolist(), 3).completion()
            assert given.get(timeout=WAIT_S) != threading.get_ident()
        service.background(lambda: engine.precompute_slices([])).result(WAIT_S)
        given.get(timeout=WAIT_S)
        with pytest.raises(queue.Empty):  # and rests
            given.get(timeout=0.2)
