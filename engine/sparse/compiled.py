"""What sparse steps run in C, compiled before an answer waits for it."""

from engine.kernels import attend_tail
from native.library import library
from retrieval.kernels import scan


def compile_ahead() -> None:
    """Once on a machine, which takes seconds: they would count as the first answer's."""
    for kernel in (attend_tail, scan):
        library(kernel.SOURCE)
