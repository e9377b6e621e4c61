"""RULER's thirteen tasks: their prompts, made from their definitions."""

from evals.ruler.suite import TASKS, RulerSuite

__all__ = ["TASKS", "RulerSuite"]
