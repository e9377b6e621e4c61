"""What compute-sanitizer finds on a GPU, of kernels in Triton's interpreter.

The interpreter runs the programs of a launch one by one, and each instruction of a program for all
its lanes at once. A GPU does neither: programs run at the same time, and so do the warps of one
between two barriers. What rests on an order that is only the interpreter's gives right results
there, and wrong ones on a GPU, now and then. From `install` on a launch raises `Hazard` where

  - a lane that is not masked reads or writes outside of the launch's tensors;
  - programs touch the same element, and one of them stores to it (all may update it by atomics);
  - instructions of a program touch the same element with no barrier between, and one stores to it;
  - an instruction stores different values to the same element.

Lanes whose load is masked, with no value to take instead, have any on a GPU: here NaN, or the
largest number.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from triton.runtime.interpreter import (
    GridExecutor,
    InterpreterBuilder,
    TensorHandle,
    _get_np_dtype,
    interpreter_builder,
)

LOADS, STORES, UPDATES = range(3)
WORDS = ("loads", "stores", "updates")
LOOKED_AT = 200  # elements with a hazard of a kind
SHOWN = 5


class Hazard(AssertionError):
    """A kernel is right in the interpreter alone."""


class Access(NamedTuple):
    """What an instruction of a program touches."""

    how: int
    program: int
    phase: int  # barriers passed before
    place: str  # "put.py:12"
    at: NDArray[np.int64]  # addresses, of the lanes that are not masked
    size: int  # bytes of an element
    bits: NDArray[np.uint64]  # of what is stored; zeros elsewhere


class Launch:
    """All that the programs of a launch touch."""

    def __init__(self) -> None:
        self.phase = 0
        self.accesses: list[Access] = []

    def note(self, how: int, pointers: TensorHandle, mask: Any, values: Any = None) -> None:
        lanes = np.broadcast_to(mask.data != 0, pointers.data.shape)
        at = pointers.data[lanes].astype(np.int64)
        bits = np.zeros(len(at), np.uint64) if values is None else _bits(values.data, lanes)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        program = np.ravel_multi_index(interpreter_builder.grid_idx, interpreter_builder.grid_dim)
        if len(at):
            self.accesses.append(Access(how, int(program), self.phase, _place(), at, size, bits))

    def hazards(self, tensors: Iterable[Any]) -> Iterator[str]:
        """What was done wrong, and where; the same may come again."""
        yield from self._outside(tensors)
        if any(access.how != LOADS for access in self.accesses):
            yield from self._unordered()

    def _outside(self, tensors: Iterable[Any]) -> Iterator[str]:
        first, last = np.array([(-1, 0), *sorted(map(span, tensors))]).T
        last = np.maximum.accumulate(last)  # of views that overlap
        for access in self.accesses:
            tensor = first.searchsorted(access.at, "right") - 1
            if (access.at + access.size > last[tensor]).any():
                yield f"{access.place} {WORDS[access.how]} outside of all tensors"

    def _unordered(self) -> Iterator[str]:
        every = self.accesses
        at, bits = (np.concatenate(x) for x in ([a.at for a in every], [a.bits for a in every]))
        of = np.repeat(np.arange(len(every)), [len(access.at) for access in every])
        shared = np.isin(at, np.concatenate([a.at for a in every if a.how != LOADS]))
        at, bits, of = at[shared], bits[shared], of[shared]
        how, program, phase = np.array([(a.how, a.program, a.phase) for a in every])[of].T
        order = np.lexsort((of, phase, program, at))
        at, bits, of, how, program, phase = (x[order] for x in (at, bits, of, how, program, phase))

        def hazards(what: str, starts: Any, bad: Any) -> Iterator[str]:
            ends = [*starts[1:], len(at)]
            for i in islice(np.flatnonzero(bad), LOOKED_AT):
                places = {
                    every[j].place + " " + WORDS[every[j].how] for j in of[starts[i] : ends[i]]
                }
                yield f"{' and '.join(sorted(places))}: {what}"

        starts = _starts(at)
        both = _differ(program, starts) & ~_all(how == UPDATES, starts)
        yield from hazards("of two programs", starts, both)
        starts = _starts(at, program, phase)
        more, loads = _differ(of, starts), _all(how == LOADS, starts)
        both = more & ~loads & ~_all(how == UPDATES, starts)
        yield from hazards("with no barrier between", starts, both)
        yield from hazards("two values at once", starts, ~more & _differ(bits, starts))


def _starts(*keys: NDArray[Any]) -> NDArray[np.int64]:
    """Where runs of equal keys begin."""
    new = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return np.flatnonzero(np.concatenate([[True], new]))


def _differ(x: NDArray[Any], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of each run, whether it has two values."""
    return np.minimum.reduceat(x, starts) != np.maximum.reduceat(x, starts)


def _all(x: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.logical_and.reduceat(x, starts)


def span(tensor: Any) -> tuple[int, int]:
    """The first byte, and that behind the last."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1 + sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + count * tensor.element_size()


def _bits(values: NDArray[Any], lanes: NDArray[np.bool_]) -> NDArray[np.uint64]:
    stored = np.broadcast_to(values, lanes.shape)[lanes]
    return stored.view(f"u{stored.itemsize}").astype(np.uint64)


def _place() -> str:
    """The line of the kernel, without those of Triton above it."""
    frame = sys._getframe()
    while frame.f_globals["__name__"].startswith(("triton.", __name__)):
        assert frame.f_back, "the kernel's own frame is above"
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


def _any(pointers: TensorHandle) -> TensorHandle:
    """What masked lanes have on a GPU."""
    kind = pointers.get_element_ty()
    of = _get_np_dtype(kind)
    if np.issubdtype(of, np.floating):
        worst: Any = np.nan
    elif kind.is_floating():  # bits of a bfloat16, or of 8: all ones are NaN
        worst = -1 if np.issubdtype(of, np.signedinteger) else np.iinfo(of).max
    else:
        worst = True if of == np.bool_ else np.iinfo(of).max
    return TensorHandle(np.full(pointers.data.shape, worst, of), kind)


def install() -> None:
    """Have every launch checked from now on."""
    launches: list[Launch] = []  # those that run: one
    call, load = GridExecutor.__call__, InterpreterBuilder.create_masked_load
    store, barrier = InterpreterBuilder.create_masked_store, InterpreterBuilder.create_barrier
    update = InterpreterBuilder.create_atomic_rmw

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(Launch())
        try:
            call(self, *args, **kwargs)
        finally:
            launch = launches.pop()
        tensors = [x for x in (*args, *kwargs.values()) if hasattr(x, "data_ptr")]
        found = list(dict.fromkeys(launch.hazards(tensors)))
        if found:
            raise Hazard("\n".join([self.fn.__name__, *found[:SHOWN]]))

    def loads(self: Any, pointers: Any, mask: Any, other: Any, *hints: Any) -> Any:
        launches[-1].note(LOADS, pointers, mask)
        if other is None and pointers.data.size > 1:  # of one lane, a zero to take comes as None
            other = _any(pointers)
        return load(self, pointers, mask, other, *hints)

    def stores(self: Any, pointers: Any, values: Any, mask: Any, *hints: Any) -> Any:
        launches[-1].note(STORES, pointers, mask, values)
        return store(self, pointers, values, mask, *hints)

    def updates(self: Any, how: Any, pointers: Any, values: Any, mask: Any, *order: Any) -> Any:
        launches[-1].note(UPDATES, pointers, mask)
        return update(self, how, pointers, values, mask, *order)

    def barriers(self: Any) -> Any:
        launches[-1].phase += 1
        return barrier(self)

    changed: Sequence[tuple[type, str, Any]] = (
        (GridExecutor, "__call__", launched),
        (InterpreterBuilder, "create_masked_load", loads),
        (InterpreterBuilder, "create_masked_store", stores),
        (InterpreterBuilder, "create_atomic_rmw", updates),
        (InterpreterBuilder, "create_barrier", barriers),
    )
    for of, name, method in changed:
        setattr(of, name, method)
