"""How to read a report, in its own words."""

from evals.report.bootstrap import RESAMPLES
from evals.report.lines import CEILING

HOW_TO_READ = (
    "A score is 0 to 100. Under it: the difference to dense in points, paired over the samples "
    "that both answered, and its 95 % interval (bootstrap over samples, "
    f"{RESAMPLES:,} seeded resamples). ▼ marks an interval wholly below zero, ▲ one wholly above.",
    "An interval of no width says that all samples differ by the same, mostly by nothing. It does "
    "not say that there is no difference: with n samples, one that shows in fewer than 3/n of all "
    "cases is easily missed.",
    "tok: tokens that a KV head attends to in a step, mean over steps and layers that select; "
    "B: bytes of the index for each token and KV head.",
    f"A cell (a task at a length) is not discriminative where dense scores below {CEILING:.0f}, or "
    "within noise of the same questions without their context, or was not run. It is shown, and "
    "no average counts it.",
    "A family's score is the mean of its discriminative cells, each with the same weight. There is "
    "no mean over families: methods differ in what they lose, and a mean would hide it.",
    "Where samples are missing, because a run has not ended or a question failed, a method is "
    "compared with dense on those that both have; how many is said.",
)
