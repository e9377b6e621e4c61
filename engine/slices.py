"""Work that may be interrupted: done a slice at a time, or at once."""

import time
from collections.abc import Generator
from contextlib import closing
from typing import TypeAlias, TypeVar

import torch

T = TypeVar("T")

# Yields what a slice took, in prompt tokens computed through all layers; returns what it was for.
# Whoever takes a slice is in torch's inference mode: a generator cannot be, without leaving its
# caller there.
Slices: TypeAlias = Generator[int, None, T]


@torch.inference_mode()
def drained(slices: Slices[T]) -> T:
    """All slices at once; what they return."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value


def finished(slices: Slices[T], device: torch.device) -> Slices[T]:
    """The same slices; they end when the device has done what they launched."""
    made = yield from slices
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return made


class Watch:
    """Seconds that slices took, without those between them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, slices: Slices[T]) -> Slices[T]:
        """The same slices, each measured."""
        with closing(slices):
            while True:
                began = time.perf_counter()
                try:
                    cost = next(slices)
                except StopIteration as end:
                    return end.value
                finally:
                    self.seconds += time.perf_counter() - began
                yield cost
