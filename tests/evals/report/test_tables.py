"""Numbers as they are shown: the words, the tables, Markdown, the terminal and CSV."""

import csv
import io

import msgspec
import pytest

from evals.report import tables
from evals.report import wording as say
from evals.report.files import measures_csv, scores_csv
from evals.report.load import load_runs
from evals.report.markdown import markdown
from evals.report.summary import summarize
from evals.report.terminal import show
from tests.evals.report.make import floor, folder, record, records

QUEST = [100.0] * 10 + [0.0] * 10


@pytest.fixture
def summary(tmp_path):
    """Two families, one of which tells nothing; a method that is worse, and has gaps."""
    made = records("dense", [100.0] * 20) + floor(20)
    made += [
        record(n, "quest", 0.016, s, kept_tokens=65.0, index_bytes=4.0) for n, s in enumerate(QUEST)
    ]
    made += records("headrace", [100.0] * 18, 0.016)
    made += [record(18, "headrace", 0.016, None, error="no | memory <here>")]
    made += records("dense", [0.0] * 20, family="QA", task="qa_1")
    made += records("quest", [0.0] * 20, 0.016, family="QA", task="qa_1")
    made += [
        record(0, "quest", 0.016, None, suite="fidelity", measures={"kl": 0.0123, "kl/L0/H0": 1.0})
    ]
    return summarize(load_runs([folder(tmp_path / "run", made)]))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (say.points(None), "–"), (say.points(99.96), "100.0"), (say.points(7.0), "7.0"),
        (say.signed(0.04), "0.0"), (say.signed(-0.04), "0.0"), (say.signed(-1.25), "−1.2"),
        (say.signed(3.0), "+3.0"), (say.span(-1.0, 0.0), "[−1.0, 0.0]"), (say.span(None, 1.0), "–"),
        (say.budget(0.016), "1.6 %"), (say.budget(0.005), "0.5 %"), (say.budget(2048.0), "2,048"),
        (say.budget(None), "all"), (say.length(4096), "4k"), (say.length(131072), "128k"),
        (say.length(1000), "1,000"), (say.count(65.26), "65.3"), (say.count(36.0), "36"),
        (say.count(1234.6), "1,235"), (say.number(0.0), "0"), (say.number(0.012345), "0.0123"),
        (say.number(0.00001234), "1.2e−05"), (say.number(12345.6), "12,346"),
        (say.number(123.4), "123"), (say.number(-0.5), "−0.500"), (say.seconds(0.0123), "12 ms"),
        (say.seconds(1.234), "1.23 s"), (say.size(0), "0 B"), (say.size(1536), "1.5 KiB"),
        (say.size(3 * 2**40), "3072.0 GiB"), (say.errors(1), "1 error"),
        (say.errors(2), "2 errors"),
    ],
)  # fmt: skip
def test_numbers_are_said(made, said):
    assert made == said


def test_a_matrix_has_a_row_for_each_budget_with_dense_and_the_floor_in_each(tmp_path):
    made = records("dense", [100.0] * 3) + floor(3)
    for budget in (256.0, 0.05, 0.1):
        made += records("quest", [100.0] * 3, budget)
    table = tables.families(summarize(load_runs([folder(tmp_path, made)])))
    assert table.heads == ("dense", "quest", "no context")
    assert [row.labels[-1] for row in table.rows] == ["5 %", "10 %", "256"]
    assert {row.cells[0].lines[0] for row in table.rows} == {"100.0"}
    assert {row.cells[2].lines for row in table.rows} == {("0.0",)}


def test_a_score_stands_with_its_difference_interval_tokens_and_bytes(summary):
    (row, *_) = [row for row in tables.families(summary).rows if "needle" in row.labels[0]]
    dense, headrace, quest, nothing = row.cells
    assert quest.lines[:2] == ("50.0", "−50.0")
    assert quest.lines[2].startswith("[−7")
    assert quest.lines[3] == "65 tok · 4 B"
    assert quest.mark == "worse"
    assert headrace.lines == ("100.0", "0.0", "[0.0, 0.0]", "18 of 20 samples", "1 error")
    assert headrace.mark == dense.mark == nothing.mark == ""


@pytest.mark.parametrize(
    ("dense", "quest", "mark"),
    [
        ([100.0] * 20, [0.0] + [100.0] * 19, ""),  # the interval ends at zero
        ([100.0] * 20, [0.0] * 10 + [100.0] * 10, "worse"),
        ([0.0] * 10 + [100.0] * 10, [100.0] * 20, "better"),
        ([0.0, 100.0] * 10, [100.0, 0.0] * 10, ""),
    ],
)
def test_a_mark_needs_an_interval_on_one_side_of_zero(tmp_path, dense, quest, mark):
    made = records("dense", dense) + records("quest", quest, 0.05)
    (row,) = tables.families(summarize(load_runs([folder(tmp_path, made)]))).rows
    assert row.cells[1].mark == mark


def test_cells_that_tell_nothing_say_why(summary):
    (table,) = [table for table in tables.tasks(summary) if table.title == "ruler · QA"]
    assert [row.note for row in table.rows] == ["dense 0.0 is below 30"]
    assert table.rows[0].cells[0].lines[0] == "0.0"


def test_gaps_and_errors_are_listed(summary):
    (gap,) = tables.gaps(summary).rows
    assert gap.labels == ("niah", "4k", "headrace", "1.6 %")
    assert gap.cells[0].lines == ("18 of 20",)
    (row,) = tables.failures(summary).rows
    assert row.labels[-1] == "no | memory <here> (e.g. ruler/niah/4096/18)"


def test_measures_of_single_heads_stay_in_the_file(summary):
    (table,) = tables.measures(summary)
    assert table.heads == ("kl",)
    assert table.rows[0].cells[0].lines == ("0.0123",)
    rows = list(csv.DictReader(io.StringIO(measures_csv(summary))))
    assert {row["measure"]: row["mean"] for row in rows} == {"kl": "0.0123", "kl/L0/H0": "1.0"}


def test_csv_has_every_score_of_cells_and_families(summary):
    rows = list(csv.DictReader(io.StringIO(scores_csv(summary))))
    levels = {level: [row for row in rows if row["level"] == level] for level in ("cell", "family")}
    assert len(levels["cell"]) == 6
    quest = [row for row in levels["family"] if row["method"] == "quest"]
    assert [(row["score"], row["difference"], row["kept_tokens"]) for row in quest] == [
        ("50.0", "-50.0", "65.0")
    ]
    bad = [row for row in levels["cell"] if row["family"] == "QA"]
    assert {row["not_discriminative"] for row in bad} == {"dense 0.0 is below 30"}


def test_markdown_is_tables_of_equal_width_that_no_text_breaks(summary):
    text = markdown(summary)
    tables_ = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables_) == 7
    for table in tables_:
        columns = {line.replace("\\|", "").count("|") for line in table}
        assert len(columns) == 1
    assert "no \\| memory &lt;here>" in text
    assert "▼ −50.0" in text
    assert "headrace-eval run --suite x" in text


def test_markdowns_titles_and_heads_are_text_too(tmp_path):
    made = [*records("dense", [100.0], family="<i>f"), *records("a|\nb", [0.0], 0.1, family="<i>f")]
    text = markdown(summarize(load_runs([folder(tmp_path, made)])))
    assert "## ruler · &lt;i>f" in text
    assert "| dense | a\\| b |" in text


def test_the_terminal_shows_every_number(summary, capsys):
    again = [msgspec.structs.replace(line, length=8192) for line in summary.cells]
    show([tables.listed("Tasks", summary.cells + again)])
    show([tables.listed("Families", summary.families)])
    out = capsys.readouterr().out
    assert "−50.0" in out
    assert "18 of 20, 1 error" in out
    assert "not discriminative" in out
    assert out.count("dense 0.0 is below 30") == 3  # for each line once
    assert "…" not in out
