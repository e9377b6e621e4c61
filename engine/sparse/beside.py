"""What a layer of sparse decode holds on the device instead of its KV."""

from math import ceil
from typing import NamedTuple

from engine.method import Method
from engine.model.pieces import Shape
from engine.model.rope import FarTable
from engine.sparse.indexes import make_index
from engine.sparse.rows import raw_rows
from retrieval.codes import BLOCK
from retrieval.estimate import CLUSTER_TOKENS
from retrieval.pending import GROWTH, LEAST_ROWS

ROOM = 1 + 1 / GROWTH  # what grows has more of it than it needs


class Beside(NamedTuple):
    """Bytes of one layer of one request, at most."""

    token: int
    fixed: int  # whatever the length


def beside(shape: Shape, method: Method, prompt_tokens: int) -> Beside:
    """Of index, estimate, hot buffer and low-rank factors, beside a pool in host memory.

    Raises:
        ConfigError: the index has no such option, or cannot be of these heads.
    """
    heads, dim = shape.num_kv_heads, shape.head_dim
    budget = method.tokens(prompt_tokens)
    spec = make_index(method, shape, budget).spec
    token = heads * spec.bytes_per_token
    spare = max(LEAST_ROWS * spec.unit_tokens, BLOCK)  # tokens: codes of 4 bits come in blocks
    fixed = heads * spec.shared_bytes + spare * token
    fetches = method.fetches(shape.device.type != "cpu")
    if method.index == "vq" or (method.index == "pq" and fetches):
        # two matrices a head: VQ learns from the prompt's queries, slots of a batch have room
        fixed += heads * 2 * dim * dim * 4
    if method.tail:
        summary = heads * (2 * dim + 1) * 4
        token, fixed = token + summary / CLUSTER_TOKENS, fixed + (LEAST_ROWS + 1) * summary
    if fetches:
        slots = method.hot_slots(budget, shape.max_positions)
        token, fixed = token + heads * 4, fixed + heads * slots * (raw_rows(shape).row_bytes + 16)
    if method.keys == "lowrank":
        rank = min(method.rank, heads * dim)
        angles = 2 * dim * 4 * (FarTable.STEP + shape.max_positions // FarTable.STEP + 1)
        token += rank * shape.dtype.itemsize
        fixed += (rank + 1) * heads * dim * 4 + angles
    return Beside(ceil(token * ROOM), ceil(fixed))
