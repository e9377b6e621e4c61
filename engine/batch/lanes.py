"""Two lanes of work in a decode step: what computes, and what fetches ahead of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Lanes(Protocol):
    """Order between computing and fetching ahead, without the host ever waiting.

    ahead: what is asked for inside runs beside all that follows, and after all that came before.
    join: what follows runs after all that was fetched ahead.
    """

    @contextmanager
    def ahead(self) -> Iterator[None]: ...
    def join(self) -> None: ...


class OneLane:
    """One thing after the other: on a CPU, and where nothing is fetched ahead."""

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Here and now."""
        yield

    def join(self) -> None:
        """Nothing to wait for."""


class TwoStreams:
    """A side stream beside the current one, captured with it in one CUDA graph.

    What is made ahead must not be read, and what is read there not be freed, before `join`. A step
    that is not captured has one lane: PyTorch gives out 32 streams in turn, and this one may be in
    another thread's capture, which would take such a step's kernels for its own. Captures are one
    at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)
        self._forked = False

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """On the side stream, from where the current one is now."""
        if not torch.cuda.is_current_stream_capturing():
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        self._forked = True
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        """The current stream waits for the side stream; of one that did not fork there is nothing.

        A stream that is captured may wait only for streams of the same capture.
        """
        if self._forked:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
            self._forked = False
