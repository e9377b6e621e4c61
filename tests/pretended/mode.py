"""What torch is asked for, done by tensors of the CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode

from tests.pretended.memory import (
    GPU,
    CpuGenerator,
    bring,
    capture,
    current,
    lock,
    not_captured,
    on_gpu,
    page_locked,
    tensors_in,
    touched,
    type_of,
)
from tests.pretended.order import HOST, Accesses, happens

WAITS = {"item", "tolist", "nonzero", "equal", "masked_select", "unique", "is_nonzero", "allclose"}
WAITS |= {"__bool__", "__int__", "__float__", "__index__", "__contains__", "numpy", "__array__"}
AS_THEY_ARE = {"_has_compatible_shallow_copy_type", "untyped_storage", "__set__", "__deepcopy__"}
MOVES = {"to", "cpu", "cuda"}


class Pretended(TorchFunctionMode):
    """Notes which tensors are on the GPU, and refuses what a GPU would."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        given = tensors_in(args, kwargs)
        if name in AS_THEY_ARE or any(x.device.type != "cpu" for x in given):
            return func(*args, **kwargs)
        if name == "__get__":
            return self._property(func, args[0])
        if name == "is_pinned":
            return page_locked(args[0]) and not on_gpu(args[0])
        if name in MOVES:
            return self._move(name, *args, **kwargs)
        return self._launch(func, name, args, kwargs, given)

    def _property(self, func: Any, tensor: Tensor) -> Any:
        name = func.__self__.__name__
        if name == "device":
            return GPU if on_gpu(tensor) else tensor.device
        if name in ("is_cuda", "is_cpu"):
            return on_gpu(tensor) == (name == "is_cuda")
        return func(tensor)

    def _move(self, name: str, tensor: Tensor, *to: Any, **kwargs: Any) -> Tensor:
        if name in ("cpu", "cuda"):
            to = (name,)
        device, dtype = kwargs.get("device"), kwargs.get("dtype", tensor.dtype)
        for what in to:
            if isinstance(what, Tensor):
                device, dtype = (GPU if on_gpu(what) else "cpu"), what.dtype
            elif isinstance(what, torch.dtype):
                dtype = what
            elif isinstance(what, str | torch.device | int) and not isinstance(what, bool):
                device = what
        there = on_gpu(tensor) if device is None else type_of(device) == "cuda"
        if there == on_gpu(tensor):
            if dtype == tensor.dtype and not kwargs.get("copy"):
                return tensor
        elif on_gpu(tensor) or not page_locked(tensor):
            not_captured("a copy from or to pageable memory")
        leaves = there != on_gpu(tensor)
        at_once = kwargs.get("non_blocking") or any(x is True for x in to)
        if leaves and at_once and not there:
            raise NotImplementedError("pretend that too: a copy to the CPU that comes later")
        return self._done(
            *(name, lambda: tensor.to(dtype, copy=True), [tensor], there),
            waits=leaves and not at_once,
        )

    def _launch(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], given: list[Tensor]
    ) -> Any:
        rule = kwargs.get("attn_mask")
        if isinstance(rule, CausalBias):  # which asks for a device of its own
            kwargs["attn_mask"] = rule._materialize(torch.device("cpu"))
            given = [x for x in given if x is not rule]
        device, locked = kwargs.pop("device", None), kwargs.pop("pin_memory", False)
        if device is not None and type_of(device) == "meta":
            return func(*args, device=device, **kwargs)
        if name in ("as_tensor", "asarray") and given and device is None:
            device = GPU if on_gpu(given[0]) else "cpu"
        there = any(map(on_gpu, given)) if device is None else type_of(device) == "cuda"
        self._check(name, args, given, kwargs, there, device is not None)
        if name == "histc":  # the CPU has none of integers
            args = (args[0].float(), *args[1:])
        copies = device is not None and given and not all(on_gpu(x) == there for x in given)

        def call() -> Any:
            made = func(*args, **kwargs)
            return made.clone() if copies and isinstance(made, Tensor) else made

        into = name in ("copy_", "__setitem__")
        crosses = copies or (into and len({on_gpu(x) for x in given if x.dim()}) > 1)
        at_once = kwargs.get("non_blocking") or (
            name == "copy_" and any(x is True for x in args[2:])
        )
        masks = name == "__getitem__" and any(x.dtype == torch.bool for x in tensors_in(args[1]))
        waits = (crosses and not at_once) or name in WAITS or masks
        made = self._done(name, call, given, there and not into, waits=waits)
        if locked:
            lock(made)
        return made

    def _check(
        self,
        name: str,
        args: Any,
        given: list[Tensor],
        kwargs: dict[str, Any],
        there: bool,
        crosses: bool,
    ) -> None:
        """What a GPU would not do."""
        for generator in (x for x in (*args, *kwargs.values()) if isinstance(x, CpuGenerator)):
            if (getattr(generator, "where", "cpu") == "cuda") != there:
                raise RuntimeError(f"{name}: a generator of another device")
        if not any(map(on_gpu, given)):
            return
        if name in WAITS:
            not_captured(name)
            if name in ("numpy", "__array__"):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
        here = [x for x in given if not on_gpu(x) and x.dim()]
        if name in ("copy_", "__setitem__", "__getitem__"):
            if any(x.dtype == torch.bool for x in tensors_in(args[1:2])) and name != "copy_":
                not_captured("a mask as an index")
            if any(not page_locked(x) for x in here):
                not_captured("a copy from or to pageable memory")
            if name == "__getitem__" and not on_gpu(args[0]):
                raise RuntimeError("a tensor of the CPU at indices on a GPU")
        elif here and not crosses:
            shapes = ", ".join(f"{tuple(x.shape)} {'cuda' if on_gpu(x) else 'cpu'}" for x in given)
            raise RuntimeError(f"{name}: tensors of two devices: {shapes}")

    def _done(
        self, name: str, call: Callable[[], Any], given: list[Tensor], there: bool, *, waits: bool
    ) -> Any:
        graph = capture()
        if graph is not None:
            graph.keep(given)
        launched = there or any(map(on_gpu, given))
        if not launched and not any(map(page_locked, given)):
            return call()
        with Accesses() as seen:
            made = call()
        results = tensors_in(made)
        for tensor in results if there else []:
            bring(tensor)
        reads, writes = touched(seen.reads), touched(seen.writes)
        happens(name, reads, writes, current() if launched else HOST)
        for x in seen.reads + seen.writes if launched else []:
            if memory := getattr(x.untyped_storage(), "page_locked", None):
                memory.named.add(current().number)  # torch's copies are done when it is given back
        if waits and launched and graph is None:
            HOST.learn(current().known)
        if graph is not None:
            graph.note(call, results)
        return made
