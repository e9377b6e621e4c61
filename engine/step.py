"""One step of any number of requests: chunks of prompts and newest tokens, packed side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from traceback import clear_frames
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.attention import attend_chunk
from engine.cache import Cache, Query
from engine.loading import Loader
from engine.model.pieces import QKV, Layer, Model, kv_depth
from engine.model.rope import RopeTable, Tables
from kvstore.block import LayerKV


@dataclass(slots=True, eq=False)
class Piece:
    """What one request has in a step.

    Args:
        tokens: at least one; they follow those in the cache.
        prompt: a chunk of a prompt; otherwise the newest token of a running request, alone.
        logits: whether those after the last token are wanted.
        loader: puts the KV of the tokens before `cache.length` there, a layer at a time.
        error: set by the step: what went wrong in this piece alone.
    """

    cache: Cache
    tokens: Int[Tensor, " n"]
    prompt: bool
    logits: bool = True
    loader: Loader | None = None
    error: Exception | None = None


class Fresh(NamedTuple):
    """What a layer makes of the tokens of all pieces."""

    plain: QKV
    q: Float[Tensor, "Hq N D"]  # rotated
    k: Float[Tensor, "Hk N D"]  # rotated


@torch.inference_mode()
def step(model: Model, pieces: Sequence[Piece]) -> list[Float[Tensor, " vocab"] | None]:
    """Append every piece's tokens to its cache; returns the logits that are wanted, by piece.

    No token is computed for padding (Prepacking, Zhao et al. 2024), and prompts are read beside
    running requests (Sarathi-Serve, Agrawal et al. 2024): projections, rotation and MLP run over
    all tokens, attention over each piece's own cache.

    A piece whose cache or loader raises has the `error`, no logits, and a cache as long as before;
    nothing changes for the others. What the model raises, this raises: then no cache has grown.
    """
    x = hidden(model, pieces, ends=True)
    sound = [piece.error is None for piece in pieces]
    wanted = [fine and piece.logits for fine, piece in zip(sound, pieces, strict=True)]
    rows = [row for row, is_it in enumerate(wanted) if is_it]
    found = iter(model.logits(x if len(rows) == len(x) else x[rows]) if rows else ())
    for fine, piece in zip(sound, pieces, strict=True):
        if fine:
            piece.cache.advance(len(piece.tokens))
    return [next(found) if is_it else None for is_it in wanted]


@torch.inference_mode()
def hidden(model: Model, pieces: Sequence[Piece], *, ends: bool = False) -> Float[Tensor, "N E"]:
    """The last layer's output for the tokens of all pieces; the caller advances their caches.

    Rows of pieces with an error mean nothing.

    Args:
        ends: only of each piece's last token; the others go no further than their KV does.
    """
    x, spans = model.embed(torch.cat([piece.tokens for piece in pieces])), _spans(pieces)
    tables = Tables(torch.tensor(_positions(pieces), device=x.device))
    depth = kv_depth(model) if ends else None
    running = _running(pieces, spans)
    for i, layer in enumerate(model.layers):
        if i == depth and len(x) > len(pieces):
            x, positions = _last_rows(x, spans), [_positions([piece])[-1] for piece in pieces]
            spans = [slice(row, row + 1) for row in range(len(pieces))]
            tables = Tables(torch.tensor(positions, device=x.device))
            running = _running(pieces, spans)
        _look_ahead(model, i + 1, x, tables, running)
        fresh, heads = _fresh(layer, x, tables), []
        for piece, rows in zip(pieces, spans, strict=True):
            attend = _nothing if piece.error else _read if piece.prompt else _decode
            try:
                heads.append(attend(piece, layer, rows, fresh))
            except Exception as error:  # whatever it is, it is this request's alone
                piece.error = _without_tensors(error)
                heads.append(_nothing(piece, layer, rows, fresh))
        if all(piece.error for piece in pieces):
            break
        x = layer.finish(x, _side_by_side(heads, stacked=len(running) == len(pieces)))
    return _last_rows(x, spans) if ends else x


def _running(pieces: Sequence[Piece], spans: Sequence[slice]) -> list[tuple[Piece, int]]:
    """Those that decode, and the row of each."""
    return [(x, rows.start) for x, rows in zip(pieces, spans, strict=True) if not x.prompt]


def _last_rows(x: Float[Tensor, "N E"], spans: Sequence[slice]) -> Float[Tensor, "P E"]:
    """The row of each piece's last token."""
    return x if len(spans) == len(x) else x[[span.stop - 1 for span in spans]]


def raise_error(pieces: Sequence[Piece]) -> None:
    """Raise the first piece's error, if there is one, for callers whose pieces are one matter."""
    for piece in pieces:
        if piece.error is not None:
            error, piece.error = piece.error, None
            try:
                raise error
            finally:
                del error  # or it and its own traceback would keep each other


def _spans(pieces: Sequence[Piece]) -> list[slice]:
    """The rows of each piece."""
    spans, end = [], 0
    for piece in pieces:
        start, end = end, end + len(piece.tokens)
        spans.append(slice(start, end))
    return spans


def _positions(pieces: Sequence[Piece]) -> list[int]:
    starts = [(piece.cache.length, len(piece.tokens)) for piece in pieces]
    return [position for start, n in starts for position in range(start, start + n)]


def _fresh(layer: Layer, x: Tensor, tables: Tables) -> Fresh:
    plain = layer.qkv(x)
    turned = layer.rope.rotate(torch.cat([plain.q, plain.k]), tables[layer.rope])
    return Fresh(plain, *turned.split([len(plain.q), len(plain.k)]))


def _read(piece: Piece, layer: Layer, rows: slice, fresh: Fresh) -> Float[Tensor, "Hq n D"]:
    """Attention of a chunk of a prompt."""
    cache, number = piece.cache, layer.owner
    if layer.owns:
        if piece.loader is not None:
            piece.loader.wait(number)
        cache.observe(number, fresh.plain.q[:, rows])
        seen = _append(piece, layer, rows, fresh)
    else:
        seen = cache.view(number, cache.length + len(piece.tokens))
    return attend_chunk(fresh.q[:, rows], seen.k, seen.v, layer.attention)


def _decode(piece: Piece, layer: Layer, rows: slice, fresh: Fresh) -> Float[Tensor, "Hq D"]:
    """Attention of a running request's newest token."""
    if layer.owns:
        _append(piece, layer, rows, fresh)
    query = Query(fresh.q[:, rows.start], fresh.plain.q[:, rows.start])
    return piece.cache.attend(layer.owner, query, layer.attention)


def _append(piece: Piece, layer: Layer, rows: slice, fresh: Fresh) -> LayerKV:
    k, v = fresh.plain.k[:, rows], fresh.plain.v[:, rows]
    return piece.cache.append(layer.owner, k, fresh.k[:, rows], v)


def _nothing(piece: Piece, layer: Layer, rows: slice, fresh: Fresh) -> Float[Tensor, "Hq *n D"]:
    """What goes on in place of a piece that has an error."""
    return torch.zeros_like(fresh.q[:, rows if piece.prompt else rows.start])


def _side_by_side(heads: list[Tensor], *, stacked: bool) -> Float[Tensor, "Hq N D"]:
    """What pieces attend to, in one tensor; `stacked` if each is of one token."""
    if stacked:
        return torch.stack(heads, 1)
    wide = [part if part.ndim == 3 else part[:, None] for part in heads]
    return wide[0] if len(wide) == 1 else torch.cat(wide, 1)


def _look_ahead(
    model: Model, layer: int, x: Tensor, tables: Tables, running: Sequence[tuple[Piece, int]]
) -> None:
    """While a layer computes, running requests' caches may fetch what the next one needs."""
    if not running or layer == len(model.layers):
        return
    guesses = _guesses(model, layer, x, tables, running)
    for (piece, _), guess in zip(running, guesses, strict=True):
        if piece.error is None:
            try:
                piece.cache.look_ahead(model.layers[layer].owner, guess)
            except Exception as error:  # as in `_attend`
                piece.error = _without_tensors(error)


def _guesses(
    model: Model, layer: int, x: Tensor, tables: Tables, running: Sequence[tuple[Piece, int]]
) -> list[Query | None]:
    """What a layer's queries may be, a layer before: its projections of what is there now.

    The residual stream changes little from one layer to the next (InfiniGen, Lee et al. 2024).
    """
    if not any(piece.cache.wants_guess for piece, _ in running):
        return [None] * len(running)
    ahead, rows = model.layers[layer], [row for _, row in running]
    cos, sin = tables[ahead.rope]
    if len(rows) < len(x):
        x, cos, sin = x[rows], cos[rows], sin[rows]
    q = ahead.qkv(x).q
    rotated = ahead.rope.rotate(q, RopeTable(cos, sin))
    return [Query(rotated[:, b], q[:, b]) for b in range(len(rows))]


def _without_tensors(error: Exception) -> Exception:
    """The error and where it came from, without what those functions held: it may be kept long."""
    trace = error.__traceback__
    assert trace is not None, "it was raised"
    clear_frames(trace)
    return error.with_traceback(trace.tb_next)
