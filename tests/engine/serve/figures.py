"""A server of figures that a test sets, and the traces of requests that never were."""

import asyncio
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request

from engine.blend.repair import BlendReport
from engine.request import RequestStats
from engine.serve.counters import Readings
from engine.serve.observed import Observed
from engine.serve.pages import routes
from engine.serve.report import Pool
from engine.service.below import SwapStats
from engine.service.spans import NAMES, Trace
from engine.service.stats import ServiceStats
from kvstore.block import Kind
from kvstore.codecs.known import RAW
from kvstore.stats import StoreStats, TierStats
from kvstore.tally import Group, Usage

KEYS = {"Bearer sk-a": "team-a", "Bearer sk-b": "team-b", "Bearer sk-all": None}


def readings(**changes: object) -> Readings:
    """Of a server in the middle of its work; every number is another one."""
    host = TierStats(
        used_bytes=3_000_000_001, capacity_bytes=8_000_000_000, blocks=1_201, hits=901, misses=99,
        reads=902, bytes_read=7_000_000_003, bytes_written=3_100_000_000, evictions=17, skipped=2,
        refused=7,
        groups={
            Group(b"tag of a", Kind.EXACT, RAW.code): Usage(5, 3),
            Group(b"stranger", Kind.CHUNK, RAW.code): Usage(7, 1),
            Group(b"unknown!", Kind.CHUNK, RAW.code): Usage(11, 2),
        },
        hits_of=Counter({(b"tag of a", Kind.EXACT): 13, (b"stranger", Kind.CHUNK): 1}),
        misses_of=Counter({(b"unknown!", Kind.EXACT): 17}),
    )  # fmt: skip
    disk = TierStats(
        used_bytes=40_000_000_000, capacity_bytes=64_000_000_000, blocks=15_002, hits=66, misses=33,
        reads=67, bytes_read=600_000_000, bytes_written=41_000_000_000, evictions=5, corrupt=3,
        quarantined=1,
    )  # fmt: skip
    numbers: dict[str, object] = {
        "tenants": {b"tag of a": "team-a"},
        "service": ServiceStats(
            waiting=4, running=12, swapped=2, steps=7_001, preemptions=6, failed=1, completed=301,
            cancelled=9, chores=8, prompt_tokens=500_001, new_tokens=80_002,
            device_bytes=5_000_000_000, device_capacity_bytes=8_000_000_000,
            lower_bytes=1_000_000_000, lower_capacity_bytes=2_000_000_000,
            swap=SwapStats(
                outs=18, backs=16, copies_out=12, copies_back=13, bytes_out=14_000, bytes_back=15,
                disk_bytes_written=19, disk_bytes_read=20,
            ),
        ),
        "pool": Pool(
            used_bytes=2_000_000_000, capacity_bytes=4_000_000_000, open_leases=12, hits=900,
            promotions=100, evictions=101, spilled_bytes=102, spill_read_bytes=103,
        ),
        "store": StoreStats(
            {"host": host, "disk": disk}, queued_bytes=21, pinned=22, oldest_pin_s=1.5,
        ),
    }  # fmt: skip
    return Readings(**(numbers | changes))  # type: ignore[arg-type]


def stats(**changes: object) -> RequestStats:
    """Of a request that was answered."""
    numbers: dict[str, object] = {
        "prompt_tokens": 4_096, "cached_tokens": 3_072, "ttft_s": 0.25, "total_s": 1.25,
        "new_tokens": 51,
    }  # fmt: skip
    return RequestStats(**(numbers | changes))  # type: ignore[arg-type]


def blend() -> BlendReport:
    return BlendReport(
        policy="union", prompt_tokens=1000, exact_tokens=300, repaired_tokens=7, reused_tokens=600,
        fresh_tokens=100, chunks=5, missed=1, corrupt=1, loaded=True, charged=0.25,
    )  # fmt: skip


def traced(observed: Observed, name: str = "POST /v1/chat/completions") -> Trace:
    """A request with a span of every name: the first takes 1 ms, the second 2, and so on."""
    trace = observed.begin(name)
    trace.start_ns -= 100_000_000
    at = trace.start_ns
    for number, span in enumerate(NAMES, 1):
        trace.add(span, at, at + number * 1_000_000)
        at += number * 1_000_000
    return trace


def keyed(request: Request) -> str | None:
    """The tenant of a key; of one that sees all, None."""
    key = request.headers.get("authorization", "")
    if key not in KEYS:
        raise HTTPException(401)
    return KEYS[key]


def app(observed: Observed, *, keys: bool = False) -> Starlette:
    """The pages alone."""
    return Starlette(routes=routes(observed, keyed if keys else lambda request: None))


@contextmanager
def serving(app: Starlette) -> Generator[str]:
    """Its address, on a free port of this machine."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    ready = threading.Event()

    async def serve() -> None:
        await server.startup()
        ready.set()
        await server.main_loop()
        await server.shutdown()

    config.load()
    server.lifespan = config.lifespan_class(config)
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(20)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
