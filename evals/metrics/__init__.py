"""What an answer is worth beside its references: the benchmarks' own rules, odd ones included."""

from evals.metrics.longbench import longbench_score
from evals.metrics.longbench_v2 import longbench_v2_score
from evals.metrics.ruler import ruler_score

__all__ = ["longbench_score", "longbench_v2_score", "ruler_score"]
