"""Heat maps: which score stands where, in which colour, and the numbers behind them."""

import csv
import io

import numpy as np
import pytest
from matplotlib import image

from engine.errors import EngineError
from evals import heatmap
from evals.heatmap import Grid, draw_heat_map

POINTS = [(2048, 0.0, 100.0), (1024, 0.0, 0.0), (1024, 1.0, 40.0), (1024, 1.0, 60.0)]


def pixels(path):
    """The colours in a picture, as numbers 0..255, rows from the top."""
    return np.rint(image.imread(path)[..., :3] * 255).astype(int)


def places(picture, colour):
    """Rows and columns of the pixels of a colour such as "#F0496E"."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.argwhere((abs(picture - wanted) <= 2).all(-1))


def test_a_grid_has_means_with_depths_down_and_lengths_across():
    grid = Grid.of(POINTS)
    assert (grid.lengths, grid.depths) == ((1024, 2048), (0.0, 1.0))
    np.testing.assert_array_equal(grid.scores, [[0, 100], [50, np.nan]])


def test_colours_have_a_fixed_scale_and_depth_0_is_on_top(tmp_path):
    draw_heat_map(tmp_path / "a.png", {"one": Grid.of(POINTS)})
    picture = pixels(tmp_path / "a.png")
    left = picture[:, : int(0.75 * picture.shape[1])]  # without the scale itself
    red, amber, green = (places(left, x).mean(0) for x in heatmap.COLOURS)
    grey = places(left, heatmap.MISSING).mean(0)
    assert red[0] == pytest.approx(green[0], abs=3)
    assert amber[0] == pytest.approx(grey[0], abs=3)
    assert red[1] == pytest.approx(amber[1], abs=3)
    assert green[1] == pytest.approx(grey[1], abs=3)
    assert red[0] < amber[0] - 10
    assert red[1] < green[1] - 10


def test_scores_that_are_alike_are_not_stretched_over_the_scale(tmp_path):
    draw_heat_map(tmp_path / "a.png", {"one": Grid.of([(1024, 0.0, 50.0), (1024, 1.0, 51.0)])})
    picture = pixels(tmp_path / "a.png")
    left = picture[:, : int(0.7 * picture.shape[1])]
    assert not len(places(left, heatmap.COLOURS[0]))
    assert not len(places(left, heatmap.COLOURS[2]))


def test_the_numbers_stand_beside_the_picture(tmp_path):
    grid = Grid.of(POINTS)
    draw_heat_map(tmp_path / "a.png", {"one": grid, "two, dense": grid})
    rows = list(csv.reader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert rows[0] == ["panel", "length", "depth", "score"]
    assert rows[1:4] == [
        ["one", "1024", "0.0", "0.0"],
        ["one", "2048", "0.0", "100.0"],
        ["one", "1024", "1.0", "50.0"],
    ]
    assert {row[0] for row in rows[4:]} == {"two, dense"}


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_every_method_has_a_panel_and_no_other_is_drawn(tmp_path, monkeypatch, count):
    drawn = []
    make = heatmap._figure

    def noted(panels):
        drawn.append(make(panels))
        return drawn[-1]

    monkeypatch.setattr(heatmap, "_figure", noted)
    panels = {f"method {i}": Grid.of(POINTS) for i in range(count)}
    draw_heat_map(tmp_path / "a.png", panels)
    _, axes = drawn[0]
    assert [ax.get_title(loc="left") for ax in axes if ax.axison] == list(panels)


def test_the_same_scores_make_the_same_file(tmp_path):
    for name in ("a.png", "b.png"):
        draw_heat_map(tmp_path / name, {"one": Grid.of(POINTS)})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_name_with_dollars_in_it_is_no_formula(tmp_path):
    draw_heat_map(tmp_path / "a.png", {r"$\frac{1}$": Grid.of(POINTS)})


@pytest.mark.parametrize("panels", [{}, {"one": Grid.of([])}])
def test_nothing_to_draw_is_an_error(tmp_path, panels):
    with pytest.raises(EngineError, match="needs scores with a depth"):
        draw_heat_map(tmp_path / "a.png", panels)


def test_a_missing_matplotlib_is_one_clear_line(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(heatmap.importlib, "import_module", missing)
    with pytest.raises(EngineError, match=r"pip install 'headrace\[evals\]'"):
        draw_heat_map(tmp_path / "a.png", {"one": Grid.of(POINTS)})
