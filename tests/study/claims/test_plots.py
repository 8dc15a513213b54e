"""Tests the plots of claims: they show the findings' numbers, are readable, and name omitted values."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from syncbn.study.claims.report import plots
from syncbn.study.claims.result import PlotData
from syncbn.study.report.plots import plot_style
from syncbn.study.report.plots.plot_style import PAPER, Plot
from tests.study.support import claim_results


def drawn(data: PlotData) -> Plot:
    with plot_style.style():
        return plots.draw(data, data.name)


def figure(data: PlotData) -> Figure:
    made = drawn(data).figure
    assert made is not None
    made.draw_without_rendering()
    return made


def test_each_line_goes_through_the_means_of_its_side() -> None:
    data = claim_results.ladder()
    (axes,) = figure(data).axes
    for side, line in zip(claim_results.NORMS, axes.lines, strict=True):
        mine = data.frame[data.frame.side == side]
        assert line.get_color() == plots.look(side).colour
        assert list(line.get_ydata()) == list(mine["mean"])
        assert list(line.get_xdata()) == list(mine.x)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("learning rate", "steps to 95 %")


def moved(made: Figure) -> tuple[np.ndarray, np.ndarray]:
    """The horizontal offsets of each line and of its error bars, in points, panel by panel."""
    found = [
        [artist.get_transform().transform((1, 1)) - axes.transData.transform((1, 1)) for artist in pair]
        for axes in made.axes
        for pair in zip(axes.lines, axes.collections, strict=True)
    ]
    off = np.array(found)[:, :, 0] * 72 / made.dpi
    return off[:, 0], off[:, 1]


def test_sides_are_beside_each_other_by_a_few_points_at_most() -> None:
    ladder, severities = claim_results.ladder(), claim_results.severities()
    single = replace(ladder, frame=ladder.frame[ladder.frame.x == 0.1])
    of_two = replace(ladder, frame=ladder.frame[ladder.frame.side.isin(["local", "sync"])])
    for data, expected in (
        (ladder, [-3, -1, 1, 3]),
        (single, [-3, -1, 1, 3]),
        (replace(single, x_log=False), [-3, -1, 1, 3]),
        (of_two, [-3, 3]),
        (replace(ladder, frame=ladder.frame[ladder.frame.side == "sync"]), [0]),
        (severities, [-3, -1, -1, 1, 1, 3]),  # two series of a side have one place
        (claim_results.depths(), [0] * 32),
    ):
        lines, bars = moved(figure(data))
        assert np.allclose(lines, expected)
        assert np.allclose(bars, expected)


def test_sides_stay_nearer_to_their_place_than_to_the_next() -> None:
    """Batches of 1, 2, ..., 512 on an axis that is not logarithmic: 1 and 2 lie half a point apart."""
    data = replace(claim_results.curve(), x_log=False)
    made = figure(data)
    lines, _ = moved(made)
    (axes,) = made.axes
    (one, _), (two, _) = axes.transData.transform([(1, 1), (2, 1)]) * 72 / made.dpi
    assert 0 < lines.max() < 0.25 * (two - one)
    places = product("ab", claim_results.NORMS, range(12))
    rows = [(panel, side, "", 2**at, 8, 5.0, 4.0, 6.0) for panel, side, at in places]
    made = figure(claim_results.plot("panels", "Twelve places in half the width", "n", "error, %", rows, x_log=True))
    (one, _), (two, _) = made.axes[0].transData.transform([(1, 1), (2, 1)]) * 72 / made.dpi
    assert 0.1 < moved(made)[0].max() / (two - one) < 0.21


@pytest.mark.parametrize("x_log", [True, False])
@pytest.mark.parametrize("place", [0.1, 1.0, 4096.0])
def test_a_single_place_is_in_the_middle_of_its_axis(place: float, x_log: bool) -> None:
    frame = claim_results.ladder().frame.query("x == 0.1").assign(x=place)
    (axes,) = figure(replace(claim_results.ladder(), frame=frame, x_log=x_log)).axes
    across = axes.transAxes.inverted().transform(axes.transData.transform([(place, 50.0)]))[0, 0]
    assert across == pytest.approx(0.5)
    assert list(axes.get_xticks()) == [place]


def test_intervals_are_bars() -> None:
    data = claim_results.ladder()
    (axes,) = figure(data).axes
    ends = {round(float(y), 6) for bars in axes.collections for path in bars.get_paths() for _, y in path.vertices}
    assert ends == {round(float(value), 6) for value in [*data.frame.low, *data.frame.high]}


def test_many_places_have_bands() -> None:
    data = claim_results.depths()
    sigmoid = figure(data).axes[3]
    assert sigmoid.get_title(loc="left").replace("\n", " ") == "sigmoid, gain 1.0, 50 layers"
    mine = data.frame[(data.frame.panel == "sigmoid, gain 1.0, 50 layers") & (data.frame.side == "none")]
    assert list(sigmoid.lines[0].get_ydata()) == list(mine["mean"])
    (path,) = sigmoid.collections[0].get_paths()
    assert {float(y) for _, y in path.vertices} == {*mine.low, *mine.high}


def test_a_norm_looks_the_same_in_all_plots_and_unlike_the_others() -> None:
    looks = [(plots.look(side).colour, plots.look(side).marker) for side in plots.SIDES]
    assert len({a for a, _ in looks}) == len({b for _, b in looks}) == len(plots.SIDES)
    for make in (claim_results.ladder, claim_results.severities, claim_results.curve):
        data = make()
        made = figure(data)
        handles = made.legends[0].get_lines()
        assert [str(line.get_color()) for line in handles] == [
            plots.look(s).colour for s in dict.fromkeys(data.frame.side)
        ]
    assert plots.look("none").colour == plot_style.INK
    assert plots.look("one of mine") == plots.look("one of mine")


def test_series_have_dashes_and_fills_and_a_key() -> None:
    made = figure(claim_results.severities())
    (axes,) = made.axes
    assert len(axes.lines) == 6
    styles = {(line.get_linestyle(), to_hex(line.get_markerfacecolor()) == PAPER) for line in axes.lines}
    assert styles == {("-", False), ("--", True)}
    assert [text.get_text() for text in made.legends[1].texts] == list(claim_results.SERIES)
    assert "Solid: running statistics; dashed: adapted to the test batch." in drawn(claim_results.severities()).caption
    lines = figure(claim_results.curve()).axes[0].lines
    looks = [(to_hex(line.get_markerfacecolor()) == PAPER, line.get_fillstyle()) for line in lines]
    assert len(lines) == 6
    assert looks[:3] == [(False, "full"), (True, "full"), (False, "left")]
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == 3


def test_panels_beside_each_other_share_an_axis_and_forty_decades_can_be_read() -> None:
    data = claim_results.depths()
    axes = figure(data).axes
    assert len(axes) == 8
    for left, right in zip(axes[::2], axes[1::2], strict=True):
        assert left.get_ylim() == right.get_ylim()
    assert axes[0].get_ylim() != axes[2].get_ylim()
    for axis in axes:
        low, high = axis.get_ylim()
        ticks = axis.get_yticks()
        assert 2 <= len(ticks) <= 5
        assert all(low <= tick <= high for tick in ticks)
    assert axes[6].get_ylim()[0] < 1e-40
    assert "10⁻⁴⁰" in [text.get_text() for text in axes[6].get_yticklabels()]


def test_words_are_rows() -> None:
    data = claim_results.kinds()
    (axes,) = figure(data).axes
    assert [text.get_text() for text in axes.texts] == list(claim_results.KINDS)
    *points, level = axes.lines
    assert [float(line.get_xdata()[0]) for line in points] == list(data.frame["mean"])
    for line, kind in zip(points, data.frame.x, strict=True):
        assert abs(float(line.get_ydata()[0]) - claim_results.KINDS.index(kind)) < 0.5
    assert list(level.get_xdata()) == [90.0, 90.0]
    assert "a row for each kind of corruption" in drawn(data).caption
    assert "Grey line: chance." in drawn(data).caption


def test_zero_has_a_place_on_a_logarithmic_axis() -> None:
    (axes,) = figure(claim_results.labels()).axes
    assert list(axes.get_xticks()) == [0, 0.1, 0.2, 0.4]
    assert axes.get_xscale() == "symlog"
    assert "The horizontal axis is logarithmic, except at 0." in drawn(claim_results.labels()).caption


@pytest.mark.parametrize("make", claim_results.PLOTS, ids=lambda make: make.__name__)
def test_all_means_are_within_the_axes_and_captions_say_what_is_seen(make: "type[PlotData]") -> None:
    data = make()  # type: ignore[call-arg]
    made = drawn(data)
    assert made.title == data.title
    assert made.caption.endswith(".")
    assert (made.figure is None) == data.frame.empty
    for axes in made.figure.axes if made.figure else ():
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        for line in axes.lines:
            x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
            if len(x) != 2 or x[0] != x[1]:
                assert left <= min(x) <= max(x) <= right
                assert min(bottom, top) <= min(y) <= max(y) <= max(bottom, top)


def test_what_is_not_drawn_is_said() -> None:
    two = drawn(claim_results.two_seeds())
    assert "Not drawn: 1 value, missing or not finite." in two.caption
    assert "Intervals that go beyond an axis are cut off." in two.caption
    assert "mean of 1 to 2 runs" in two.caption
    assert "cut off" not in drawn(claim_results.severities()).caption
    data = claim_results.depths()
    zero = replace(data, frame=data.frame.assign(mean=data.frame["mean"].where(data.frame.x != 3, 0.0)))
    assert "Not drawn: 32 values, missing, not finite, or not above zero." in drawn(zero).caption
    # A level of 0 has no place on a logarithmic axis, and is no reason to fail.
    assert drawn(replace(zero, level=0.0, level_label="none")).figure is not None
    assert drawn(claim_results.nothing()).caption == "No plot of seconds: no run has a value that can be drawn."


def test_an_interval_far_wider_than_the_others_leaves_the_others_to_be_seen() -> None:
    data = claim_results.severities()
    wide = data.frame.copy()
    wide.loc[3, ["low", "high"]] = [-4000.0, 4000.0]
    (axes,) = figure(replace(data, frame=wide)).axes
    assert axes.get_ylim()[1] < 100
    assert "cut off" in drawn(replace(data, frame=wide)).caption


def test_intervals_end_at_the_limits_of_the_metric() -> None:
    data = claim_results.severities()
    assert "limits of the metric" not in drawn(replace(data, least=0.0, most=100.0)).caption
    low, high = float(data.frame["mean"].min()), float(data.frame["mean"].max())
    bounded = replace(data, least=low, most=high)
    (axes,) = figure(bounded).axes
    ends = [float(y) for bars in axes.collections for path in bars.get_paths() for _, y in path.vertices]
    assert (min(ends), max(ends)) == pytest.approx((low, high))
    assert "Intervals end at the limits of the metric." in drawn(bounded).caption


def test_conditions_without_a_name_for_their_axis() -> None:
    data = replace(claim_results.kinds(), x="")
    assert drawn(data).caption.startswith("Test error, %. Markers: mean of 8 runs;")
