"""A report in a folder."""

from pathlib import Path

from evals.report.files import as_json, measures_csv, scores_csv
from evals.report.heat import heat_maps
from evals.report.markdown import markdown
from evals.report.page import page
from evals.report.pictures import draw
from evals.report.plots import plots
from evals.report.summary import Summary

PLOTS = "plots"
OWN = (  # what not every report has, and an earlier one may have left
    "measures.csv", "report.html",
    *(f"{PLOTS}/{name}.png" for name in ("differences", "budget", "length", "fidelity-*")),
    f"{PLOTS}/needles-*.png", f"{PLOTS}/needles-*.csv",
)  # fmt: skip


def write_report(summary: Summary, folder: Path) -> Path:
    """Write summary.csv, measures.csv, summary.json, summary.md, plots/*.png and report.html.

    Args:
        folder: created where it is missing; files of an earlier report are replaced.
    Returns: the page.
    Raises:
        EngineError: matplotlib is missing; all but plots and page are written then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in [path for pattern in OWN for path in folder.glob(pattern)]:
        path.unlink()
    (folder / "summary.csv").write_text(scores_csv(summary), encoding="utf-8")
    if summary.measured:
        (folder / "measures.csv").write_text(measures_csv(summary), encoding="utf-8")
    (folder / "summary.json").write_text(as_json(summary), encoding="utf-8")
    (folder / "summary.md").write_text(markdown(summary), encoding="utf-8")
    figures = draw(list(plots(summary)), folder / PLOTS)
    figures += heat_maps(summary.depths, folder / PLOTS)
    path = folder / "report.html"
    path.write_text(page(summary, figures), encoding="utf-8")
    return path
