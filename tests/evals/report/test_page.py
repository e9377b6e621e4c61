"""The page: one file, sound HTML, nothing from elsewhere, everything in it."""

import re
from html.parser import HTMLParser

import pytest

from evals.record import NO_CONTEXT
from evals.report.drawing import styled
from evals.report.load import load_runs
from evals.report.origin import origin
from evals.report.plots import plots
from evals.report.style import COLOURS, LOOKS, PAPER
from evals.report.summary import summarize
from evals.report.write import write_report
from tests.evals.report.make import FACTS, floor, folder, record, records

VOID = {"meta", "link", "img"}


class Checker(HTMLParser):
    """Elements that are open, ids, and what was found of each tag."""

    def __init__(self):
        super().__init__()
        self.open, self.found, self.ids, self.words = [], {}, [], []

    def handle_starttag(self, tag, attrs):
        self.found.setdefault(tag, []).append(dict(attrs))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.setdefault(tag, []).append(dict(attrs))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def every_kind():
    made = []
    for length in (4096, 8192):
        made += records("dense", [100.0] * 4, length=length) + floor(4, length=length)
        for budget in (0.016, 0.05):
            made += records("headrace", [100.0] * 4, budget, length=length)
            made += records("quest", [100.0, 0.0] * 2, budget, length=length)
            made += [
                record(
                    n, "quest", budget, None, suite="fidelity", measures={"kl": 0.1, "top1": 0.9}
                )
                for n in range(3)
            ]
    for depth in (0.0, 0.5, 1.0):
        for method, budget in (("dense", None), ("quest", 0.05)):
            made.append(
                record(
                    depth, method, budget, suite="needle", task="wording", extra={"depth": depth}
                )
            )
    return [*made, record(9, "quest", 0.05, None, error="<b>no</b> memory")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    facts = FACTS | {"model": "models/<odd>&name"}
    summary = summarize(load_runs([folder(path / "run", every_kind(), facts)]))
    write_report(summary, path / "out")
    return path / "out"


def test_a_report_in_which_only_the_floor_has_a_depth_has_no_heat_map(tmp_path):
    made = [record(0, NO_CONTEXT, None, 0.0, suite="needle", extra={"depth": 0.5})]
    made += [record(0, "dense", None, None, suite="needle", error="cache_bytes is too little")]
    summary = summarize(load_runs([folder(tmp_path / "run", made)]))
    write_report(summary, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("needles*.png"))
    assert "cache_bytes is too little" in (tmp_path / "out" / "report.html").read_text()


def test_a_name_with_dollars_in_it_is_no_formula(tmp_path):
    made = [*records("dense", [100.0] * 2, family=r"$\frac{1}$"), *floor(2, family=r"$\frac{1}$")]
    made += records("quest", [0.0, 100.0], 0.05, family=r"$\frac{1}$")
    write_report(summarize(load_runs([folder(tmp_path / "run", made)])), tmp_path / "out")
    assert r"$\frac{1}$" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(written):
    checker = Checker()
    checker.feed((written / "report.html").read_text(encoding="utf-8"))
    checker.close()
    return checker


def test_elements_are_closed_and_ids_are_unique(page):
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))


def test_nothing_is_requested(written, page):
    text = (written / "report.html").read_text(encoding="utf-8")
    assert "script" not in page.found
    for tag, name in (("img", "src"), ("link", "href"), ("source", "srcset")):
        assert all(each[name].startswith("data:") for each in page.found.get(tag, ()))
    assert all(each["href"].startswith("#") for each in page.found["a"])
    assert set(re.findall(r'"(https?:[^"]+)"', text)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
    }  # fmt: skip
    assert not re.search(r"@import|url\((?!#)", text)


def test_links_within_the_page_lead_somewhere(page):
    assert {each["href"][1:] for each in page.found["a"]} <= set(page.ids)
    used = {each["xlink:href"][1:] for each in page.found["use"]}
    assert used <= set(page.ids)


def test_figures_and_tables_have_names(page):
    drawings = [each for each in page.found["svg"] if each.get("role") == "img"]
    assert len(drawings) == 4  # differences, budget, length, fidelity
    assert all(each["aria-label"] for each in drawings)
    assert [each["alt"] for each in page.found["img"]] == ["Needles: wording, budget 5 %"]
    assert len(page.found["caption"]) == len(page.found["table"])
    assert all(each.get("scope") in ("col", "row") for each in page.found["th"])


def test_what_records_say_is_text_and_never_markup(written, page):
    text = (written / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;no&lt;/b&gt; memory" in text
    assert "b" not in page.found
    assert "<odd>&name" in "".join(page.found and page.words)


def test_a_run_that_went_on_at_another_commit_says_so(tmp_path):
    facts = FACTS | {"starts": [{"commit": "abc1234"}, {"commit": "def5678+"}]}
    found = origin(summarize(load_runs([folder(tmp_path, records("dense", [100.0]), facts)])))
    (said,) = (fact.value for fact in found if fact.name == "commit")
    assert "abc1234" in said
    assert "def5678+" in said


def test_the_page_says_how_it_was_made(page):
    words = " ".join(page.words)
    for fact in ("headrace-eval run --suite x", "abc1234", "torch 2.11.0", "a CPU, 2 cores"):
        assert fact in words


def test_no_colour_of_a_plot_stays_when_it_gets_dark(written):
    text = (written / "report.html").read_text(encoding="utf-8")
    drawn = "".join(re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", drawn)


def test_files_are_there(written):
    found = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}
    assert found >= {
        "report.html", "summary.csv", "summary.json", "summary.md", "measures.csv",
        "plots/differences.png", "plots/budget.png", "plots/length.png",
        "plots/fidelity-fidelity-niah.png", "plots/needles-wording-0-05.png",
        "plots/needles-wording-0-05.csv",
    }  # fmt: skip
    for path in (written / "plots").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_of_an_earlier_report_stays_beside_a_later_one(written, tmp_path):
    for path in written.rglob("*.*"):
        copy = tmp_path / path.relative_to(written)
        copy.parent.mkdir(exist_ok=True)
        copy.touch()
    made = folder(tmp_path, records("dense", [100.0, 0.0]))
    write_report(summarize(load_runs([made])), tmp_path)
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    own = {"summary.csv", "summary.json", "summary.md", "report.html"}
    assert files == {"records.jsonl", "run.json", *own}


def measured(method, budget, length, kl):
    return [
        record(
            n, method, budget, None, suite="fidelity", length=length,
            measures={"kl": kl, "kept_tokens": 64.0},
        )
        for n in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("budgets", "title", "label", "marks"),
    [
        ([0.05], "fidelity · niah, 5 %", "tokens", ["4k", "8k"]),
        ([0.016, 0.05], "fidelity · niah, 8k tokens", "budget", ["1.6 %", "5 %"]),
    ],
)
def test_fidelity_is_drawn_over_what_there_is_more_of(tmp_path, budgets, title, label, marks):
    """And only measures that tell methods apart."""
    made = [
        each
        for length in (4096, 8192)
        for budget in budgets
        for method, kl in (("quest", 0.3), ("headrace", 0.1))
        for each in measured(method, budget, length, kl * length)
    ]
    (plot,) = plots(summarize(load_runs([folder(tmp_path / "run", made)])))
    assert plot.title == f"Fidelity: {title}"
    with styled(plot.name):
        (panel,) = [x for x in plot.draw().axes if x.get_title(loc="left")]
    assert (panel.get_title(loc="left"), panel.get_xlabel()) == ("kl", label)
    assert [tick.get_text() for tick in panel.get_xticklabels()] == marks
    assert {line.get_label() for line in panel.lines} >= {"quest", "headrace"}


def test_the_same_records_make_the_same_page(tmp_path):
    made = records("dense", [100.0] * 3) + records("quest", [100.0, 0.0, 0.0], 0.05)
    pages = []
    for name in ("one", "two"):
        summary = summarize(load_runs([folder(tmp_path / name, made)]))
        page = write_report(summary, tmp_path / name).read_text(encoding="utf-8")
        pages.append(page.replace(str(tmp_path / name), "RUN"))
    assert pages[0] == pages[1]
    assert "<svg" in pages[0]


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_methods_hold_their_contrast_on_light_and_on_dark_paper():
    for look in LOOKS.values():
        for ink, paper in zip(look.colour, PAPER, strict=True):
            light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3


def test_a_light_colour_has_one_dark_one():
    assert len({each.light for each in COLOURS}) == len(COLOURS)


def test_a_report_of_errors_alone_is_a_report(tmp_path):
    made = [record(0, score=None, error="too long")]
    text = write_report(summarize(load_runs([folder(tmp_path, made)])), tmp_path).read_text()
    assert "too long" in text
    assert "<svg" not in text
