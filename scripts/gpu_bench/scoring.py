"""Trials of the kernels that score: codes, rows, codebook tables, and what is made for them."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gpu_bench.trial import Case, Sizes, Trial, size
from retrieval.codebook import faiss_module
from retrieval.kernels import encode, score_codes, score_lookup, score_rows, tables

BITS = 2  # of a coordinate, as the default index has them on average
CHUNK = 8  # tokens of a landmark
BYTES_CLOSE = 1e-3  # products summed in another order move a byte or a code in thousands by one


def codes(sizes: Sizes) -> Trial:
    """The default index: 4-bit codes, two coordinates of 2 bits each."""
    count = sizes.dim * BITS // 4
    blocks = sizes.tokens // 32
    packed = sizes.bytes(sizes.batch, sizes.heads, blocks, count, 16)
    scales = sizes.randn(sizes.batch, sizes.heads, sizes.tokens, dtype=torch.float16).abs()
    table = sizes.randn(sizes.batch, sizes.query_heads, count, 16, dtype=torch.float32)
    offset = sizes.randn(sizes.batch, sizes.query_heads, dtype=torch.float32)
    made = tables.rounded(table, sizes.heads, offset)
    asked = packed, scales, made, sizes.full(), sizes.dim**-0.5
    return Trial(
        run=lambda: score_codes.score_codes(*asked),
        define=lambda: score_codes.score_codes_torch(*asked),
        moved=size((packed, scales, *made)) + raw_bytes(sizes, sizes.tokens),
        beside={"~FAISS-GPU IVFPQ, each head": lambda: faiss_search(sizes)()},
    )


def raw_bytes(sizes: Sizes, units: int) -> int:
    """Of scores that are written, fp32; the statistics are nothing beside them."""
    return sizes.batch * sizes.query_heads * units * 4


@lru_cache(maxsize=1)
def faiss_search(sizes: Sizes) -> Callable[[], object]:
    """Searches every KV head for its group, in codes of as many bytes as ours."""
    faiss = faiss_module()
    if not faiss.get_num_gpus():
        raise RuntimeError("faiss finds no GPU")
    resources, indexes = faiss.StandardGpuResources(), []
    keys = sizes.randn(sizes.heads, sizes.tokens, sizes.dim, dtype=torch.float32).cpu().numpy()
    for own in keys:
        made = faiss.GpuIndexIVFPQ(
            resources, sizes.dim, 1, sizes.dim * BITS // 8, 8, faiss.METRIC_INNER_PRODUCT
        )
        made.train(own[: 1 << 14])
        made.add(own)
        indexes.append(made)
    query = keys[0, : sizes.batch * sizes.group]
    return lambda: [index.search(query, min(2048, sizes.budget)) for index in indexes]


def coordinates(sizes: Sizes) -> tables.Coordinates:
    """Axes of requests, all coordinates with the same number of bits."""
    rows, where = (sizes.batch, sizes.heads), sizes.device
    count = sizes.dim * BITS // 4
    levels, edges = torch.zeros(5, 16), torch.full((5, 16), torch.inf)
    for bits in range(1, 5):
        levels[bits, : 1 << bits] = torch.linspace(-2, 2, 1 << bits)
        edges[bits, : (1 << bits) - 1] = (levels[bits][:-1] + levels[bits][1:])[
            : (1 << bits) - 1
        ] / 2
    per_code = 4 // BITS
    return tables.Coordinates(
        basis=torch.linalg.qr(
            sizes.randn(*rows, sizes.dim, sizes.dim, dtype=torch.float32)
        ).Q.contiguous(),  # it comes column by column
        spread=1 + sizes.randn(*rows, sizes.dim, dtype=torch.float32).abs(),
        mean=sizes.randn(*rows, sizes.dim, dtype=torch.float32),
        first=per_code * torch.arange(count, dtype=torch.int32, device=where).repeat(rows[0], 1),
        bits=torch.full((sizes.batch, count), BITS, dtype=torch.int32, device=where),
        levels=levels.to(where),
        edges=edges.to(where),
    )


def byte_tables(sizes: Sizes) -> Trial:
    """From queries to the tables that codes are looked up in."""
    axes = coordinates(sizes)
    query = sizes.randn(sizes.batch, sizes.query_heads, sizes.dim)
    return Trial(
        run=lambda: _there(tables.tables(query, axes)),
        define=lambda: _there(tables.tables_torch(query, axes)),
        moved=size((query, *axes)) + size(tables.tables(query, axes)),
        tolerance=BYTES_CLOSE,
        shown=lambda made: [x.float() for x in made],  # bytes may be near
    )


def _there(made: tables.Tables) -> list[Tensor]:
    return [x for x in made if x is not None]


def new_codes(sizes: Sizes) -> Trial:
    """The codes of one more key of each request, in a block that is half full."""
    axes, count = coordinates(sizes), sizes.dim * BITS // 4
    keys = sizes.randn(sizes.batch, sizes.heads, sizes.dim)
    packed = sizes.bytes(sizes.batch, sizes.heads, 4, count, 16)
    scales = sizes.randn(sizes.batch, sizes.heads, 128, dtype=torch.float16)
    at = torch.full((sizes.batch,), 75, dtype=torch.int32, device=sizes.device)

    def run() -> tuple[Tensor, ...]:
        encode.encode(keys, at, axes, packed, scales)
        return packed, scales

    def define() -> tuple[Tensor, ...]:
        own, others = packed.clone(), scales.clone()
        encode.encode_torch(keys, at, axes, own, others)
        return own, others

    return Trial(run, define, size((keys, *axes)), tolerance=BYTES_CLOSE, shown=_digits)


def _digits(written: Sequence[Tensor]) -> list[Tensor]:
    """Codes as numbers, which may be near."""
    packed, scales = written
    return [torch.stack([packed & 15, packed >> 4]).float(), scales]


def rows(width: int, unit: int) -> Case:
    """Rows of `width` times the head's dimension for every `unit` tokens."""

    def case(sizes: Sizes) -> Trial:
        units = sizes.tokens // unit
        held = sizes.randn(sizes.batch, sizes.heads, units, width * sizes.dim)
        query = sizes.randn(sizes.batch, sizes.query_heads, width * sizes.dim, dtype=torch.float32)
        count = torch.full((sizes.batch,), units, dtype=torch.int32, device=sizes.device)
        asked = held, query, count, sizes.dim**-0.5
        return Trial(
            run=lambda: score_rows.score_rows(*asked),
            define=lambda: score_rows.score_rows_torch(*asked),
            moved=size((held, query)) + raw_bytes(sizes, units),
        )

    return case


def lookup(subspaces: int, entries: int) -> Case:
    """Codebooks: one code of many bits for each token, or many of 8."""

    def case(sizes: Sizes) -> Trial:
        shape = sizes.batch, sizes.heads, sizes.tokens, subspaces
        kind = torch.uint8 if entries <= 256 else torch.int16
        held = torch.randint(0, entries, shape, device=sizes.device).to(kind)
        table = sizes.randn(sizes.batch, sizes.query_heads, subspaces, entries, dtype=torch.float32)
        asked = held, table, sizes.full(), sizes.dim**-0.5
        return Trial(
            run=lambda: score_lookup.score_lookup(*asked),
            define=lambda: score_lookup.score_lookup_torch(*asked),
            moved=size((held, table)) + raw_bytes(sizes, sizes.tokens),
        )

    return case
