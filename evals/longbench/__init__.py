"""LongBench: prompts of real texts with real questions, of both its versions."""

from evals.longbench.suite import LongBenchSuite
from evals.longbench.v2 import LongBenchV2Suite

__all__ = ["LongBenchSuite", "LongBenchV2Suite"]
