"""What `/stats` and `/traces` answer: numbers and names, never prompts, keys or secrets.

Times are seconds, sizes bytes; a ratio is between 0 and 1, and None where there was nothing to
divide by. Counts are since the start.
"""

import msgspec

Ratio = float | None


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Requests: now, and since the start."""

    waiting: int
    running: int
    swapped: int
    finished: int  # of HTTP, whatever came of them
    failed: int  # in the engine
    cancelled: int
    dropped_clients: int
    preemptions: int
    steps: int
    background: int  # pieces of work beside requests that are not done


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of finished requests, and how many the engine generates in a second now."""

    prompt: int
    cached: int
    generated: int
    cached_ratio: Ratio
    generated_per_s: Ratio


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of the requests that ended in the last minutes."""

    count: int
    p50: float | None
    p90: float | None
    p99: float | None


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """How long clients waited: for the first token, for each of the others, and in the queue."""

    window_s: float
    ttft_s: Quantiles
    tpot_s: Quantiles
    queue_s: Quantiles


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks of one owner, codec and exactness class."""

    tenant: str
    codec: str
    kind: str  # what they are good for: exact, chunk, repaired
    bytes: int
    blocks: int


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """One tier of the store."""

    name: str
    used_bytes: int
    capacity_bytes: int
    blocks: int
    hits: int
    misses: int
    hit_ratio: Ratio
    read_bytes: int
    written_bytes: int
    evictions: int
    skipped: int
    refused: int
    corrupt: int
    quarantined: int
    groups: list[Group]


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """KV of running requests: on the device, and reserved below for what may be moved there."""

    device_bytes: int
    device_capacity_bytes: int
    lower_bytes: int
    lower_capacity_bytes: int


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of running requests of a sparse method, and its spill to disk."""

    used_bytes: int
    capacity_bytes: int
    open_leases: int
    hits: int
    promotions: int
    evictions: int
    spilled_bytes: int
    spill_read_bytes: int


class Swap(msgspec.Struct, frozen=True, kw_only=True):
    """KV of requests that were moved down for others, and back."""

    outs: int
    backs: int
    copies_out: int
    copies_back: int
    bytes_out: int
    bytes_back: int
    disk_bytes_written: int
    disk_bytes_read: int


class Blend(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of prompts of parts, by what was done for them."""

    requests: int
    exact_tokens: int
    reused_tokens: int
    fresh_tokens: int
    charged_ratio: Ratio


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """The server's process; None where the system does not tell."""

    rss_bytes: int | None
    open_files: int | None


class Past(msgspec.Struct, frozen=True, kw_only=True):
    """The last minutes, oldest first: what happened in each stretch that ended so long ago."""

    seconds_ago: list[float]
    generated_per_s: list[Ratio]
    cached_ratio: list[Ratio]
    hit_ratio: dict[str, list[Ratio]]


class SpanReport(msgspec.Struct, frozen=True, kw_only=True):
    """A span on the clock of its trace; `busy_s` of it was work, in `count` pieces."""

    name: str
    start_s: float
    end_s: float
    busy_s: float
    count: int


class TraceReport(msgspec.Struct, frozen=True, kw_only=True):
    """A request that ended. Shares are of its wall time; overlapping spans count in each."""

    id: str
    name: str
    started_at: float  # since 1970
    wall_s: float
    coverage: float
    shares: dict[str, float]
    attributes: dict[str, str | int | float | bool]
    spans: list[SpanReport]


class TracesReport(msgspec.Struct, frozen=True, kw_only=True):
    """Newest first."""

    traces: list[TraceReport]


class StatusReport(msgspec.Struct, frozen=True, kw_only=True):
    """How the server is doing."""

    model: str
    started_at: float  # since 1970
    uptime_s: float
    requests: Counts
    tenants: dict[str, int]  # requests that ended
    tokens: Tokens
    latency: Latency
    tiers: list[Tier]
    queued_bytes: int  # on their way to the slowest tier
    pinned_blocks: int
    oldest_pin_s: float
    expired_pins: int  # not released in time
    running: Running
    pool: Pool | None
    swap: Swap
    blend: Blend
    process: Process
    past: Past
    coverage: Ratio  # of the wall time of all traces by spans
    shares: dict[str, float]  # of the same
    traces: list[TraceReport]  # the last ones, without spans
