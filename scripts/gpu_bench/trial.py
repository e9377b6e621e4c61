"""One kernel on one set of inputs: what runs, what it must equal, and the bytes it has to move."""

import dataclasses
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gpu_bench.timing import Ceilings, poisoned, sets_for, time_calls

LEAST_TOLERANCE = 2e-5  # of sums of some hundred products in fp32, relative to their norm

ROUNDED = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # results in them


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a kernel is measured at; the letters are those of DESIGN."""

    batch: int
    tokens: int
    heads: int  # of keys and values
    group: int
    dim: int
    budget: int
    dtype: torch.dtype
    device: torch.device
    checks: int = 1  # sets of inputs that are compared with the definition

    @property
    def query_heads(self) -> int:
        return self.heads * self.group

    def full(self) -> Tensor:
        """Lengths of slots that are all full: [B] int32."""
        return torch.full((self.batch,), self.tokens, dtype=torch.int32, device=self.device)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)


def real(batch: int, device: torch.device) -> Sizes:
    """128k tokens in the shape of Llama-3.1-8B."""
    return Sizes(batch, 1 << 17, 8, 4, 128, 2048, torch.bfloat16, device)


def toy(batch: int, device: torch.device) -> Sizes:
    """So small that a CPU runs the definitions in no time."""
    return Sizes(batch, 512, 2, 4, 64, 32, torch.float32, device)


@dataclass(frozen=True, slots=True)
class Trial:
    """A kernel on one set of inputs.

    Args:
        run: returns what the kernel writes; what it changes in place, too.
        define: what that must equal; must not change what `run` reads.
        moved: bytes, each input read once and each output written once.
        link: what bounds it.
        flops: of what is bound by arithmetic; 0 where memory is what counts.
        tolerance: of floating-point outputs, relative to their norm.
        shown: results as they are compared, where that is not as they are written.
        beside: other ways to the same end, by name; "~" before it: cannot be captured in a graph.
    """

    run: Callable[[], Sequence[Tensor]]
    define: Callable[[], Sequence[Tensor]]
    moved: int
    link: Literal["device", "pcie"] = "device"
    flops: int = 0
    tolerance: float = LEAST_TOLERANCE
    shown: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple
    beside: Mapping[str, Callable[[], object]] = field(default_factory=dict)


Case = Callable[[Sizes], Trial]  # draws new random inputs at every call


def size(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of all."""
    return sum(x.nbytes for x in tensors if x is not None)


def difference(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> str | None:
    """In what the results differ; None if they agree: integers exactly, others to the tolerance."""
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"output {i}: {ours.dtype} {tuple(ours.shape)}, not {theirs.dtype}"
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                return f"output {i}: {int((ours != theirs).sum())} of {ours.numel()} differ"
            continue
        a, b = ours.double(), theirs.double()
        odd = ~b.isfinite()
        if not torch.equal(a[odd], b[odd]) or not a[~odd].isfinite().all():
            return f"output {i}: not finite where it must be, or the other way round"
        a, b = a[~odd], b[~odd]
        if (off := float((a - b).norm() / b.norm().clamp_min(1e-30))) > tolerance:
            return f"output {i}: off by {off:.2e} of its norm, {tolerance:.0e} is allowed"
    return None


def measure(case: Case, sizes: Sizes, limits: Ceilings, rounds: int) -> dict[str, Any]:
    """Check a kernel on fresh inputs, then time it: one line of the table."""
    first = case(sizes)
    for trial in [first, *(case(sizes) for _ in range(sizes.checks - 1))]:
        if (wrong := checked(trial)) is not None:
            return {"error": f"differs from its definition: {wrong}"}
    trials = [first, *(case(sizes) for _ in range(sets_for(_read(first)) - 1))]
    found: dict[str, Any] = {"moved_bytes": first.moved, "link": first.link, "agrees": True}
    times = time_calls([trial.run for trial in trials], sizes.device, rounds=rounds)
    found |= _named(times) | rate(first, times.median_s if times else None, limits)
    for name in first.beside:
        calls = [trial.beside[name] for trial in trials]
        found[name.lstrip("~")] = beside(calls, name, sizes.device, rounds)
    return found


def _read(trial: Trial) -> int:
    """Bytes of `moved` that are inputs: what a cache must not hold from one call to the next."""
    written = size(trial.run())
    return trial.moved - written if written < trial.moved else trial.moved  # else in place


def checked(trial: Trial) -> str | None:
    """How a trial differs from its definition; outputs are poisoned first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that have no deterministic form
        want = [x.clone() for x in trial.shown(trial.define())]
        with poisoned():
            got = trial.shown(trial.run())
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what it wrote to host memory is there
        return difference(got, want, trial.tolerance)


def beside(
    calls: Sequence[Callable[[], object]], name: str, device: torch.device, rounds: int
) -> dict[str, Any]:
    """The time of another way; what it lacks is its result."""
    try:
        return _named(time_calls(calls, device, graph=not name.startswith("~"), rounds=rounds))
    except Exception as error:
        return {"error": "".join(traceback.format_exception_only(error)).strip()}


def _named(times: Any) -> dict[str, Any]:
    return {} if times is None else dataclasses.asdict(times)


def rate(trial: Trial, seconds: float | None, limits: Ceilings) -> dict[str, Any]:
    """Bytes a second, and the share of what a large copy reaches."""
    limit = limits.of(trial.link)
    if seconds is None or limit is None:
        return {}
    if trial.flops:
        return {"tflops": trial.flops / seconds / 1e12}
    return {
        "gbps": trial.moved / seconds / 1e9,
        "share_of_copy": trial.moved / seconds / limit,
    }
