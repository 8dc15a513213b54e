"""Tests the plots of a comparison: they show its figures, are colour-blind safe, and have explanatory captions."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from syncbn.study.compare.comparison import Comparison
from syncbn.study.report.plots import comparison_plots, plot_style
from syncbn.study.report.plots.plot_style import Plot
from tests.study.support import comparisons
from tests.study.support.comparisons import frame, measured
from tests.test_import import modules_after


def drawn(comparison: Comparison) -> dict[str, Plot]:
    with plot_style.style():
        return {plot.name: plot for plot in comparison_plots.draw(comparison)}


@pytest.fixture(scope="module")
def rich() -> Comparison:
    return comparisons.rich()


@pytest.fixture(scope="module")
def of_rich(rich: Comparison) -> dict[str, Plot]:
    return drawn(rich)


def figure_of(made: dict[str, Plot], name: str) -> Figure:
    figure = made[name].figure
    assert figure is not None
    return figure


def lines(figure: Figure) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The plotted data: x and y of each line, each group of dots and each error bar."""
    for axes in figure.axes:
        for line in axes.lines:
            yield np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
        for bars in axes.collections:
            if isinstance(bars, LineCollection):
                yield from (np.asarray(ends, float).T for ends in bars.get_segments())


def plotted(figure: Figure, *, x: bool = False) -> set[float]:
    return {round(float(value), 6) for line in lines(figure) for value in line[0 if x else 1]}


def rounded(values: "np.ndarray | list[float]") -> set[float]:
    return {round(float(value), 6) for value in values if np.isfinite(value)}


def test_each_seed_is_in_the_plot_of_seeds_and_each_mean_in_that_of_the_metric(
    rich: Comparison, of_rich: dict[str, Plot]
) -> None:
    assert plotted(figure_of(of_rich, "seeds")) >= rounded(rich.runs.value[rich.runs.used])
    assert plotted(figure_of(of_rich, "metric")) >= rounded(rich.means["mean"])


def test_intervals_in_the_plot_of_the_metric_are_cut_to_its_range(rich: Comparison) -> None:
    means = rich.means.assign(low=rich.means.low - 3)
    collections = figure_of(drawn(replace(rich, means=means)), "metric").axes[0].collections
    ends = {round(float(y), 6) for each in collections for path in each.get_paths() for _, y in path.vertices}
    assert ends >= rounded(means.high.to_numpy())
    assert ends >= rounded(means.low.clip(0).to_numpy())
    assert (means.low < 0).any()
    assert min(ends) == 0


def test_differences_their_intervals_and_the_margin_are_in_the_plot_of_effects(
    rich: Comparison, of_rich: dict[str, Plot]
) -> None:
    figure = figure_of(of_rich, "effects")
    shown = plotted(figure, x=True)
    assert shown >= rounded(list(rich.effects.difference))
    base = rich.means[rich.means.side == "local"].set_index(["condition", "how"])["mean"]
    for row in rich.effects.itertuples():
        assert shown >= rounded([max(row.low, -base[row.condition, row.how]), row.high])  # an error is at least 0
    (axes,) = figure.axes
    assert band_is(axes, [0.75] * len(rich.effects))
    low, high = axes.get_xlim()
    assert low < rich.effects.low.min()
    assert high > rich.effects.high.max()
    words = {text.get_text() for text in axes.texts}
    assert words >= {"lower (better)", "higher (worse)", "no difference", "undecided", "batch_size=2 · sync"}


def test_the_band_is_as_wide_as_the_margin_of_its_row(rich: Comparison) -> None:
    effects = rich.effects.assign(margin=[0.1 * (1 + row) for row in range(len(rich.effects))])
    made = drawn(replace(rich, effects=effects, margin=float("nan")))
    assert band_is(figure_of(made, "effects").axes[0], list(effects.margin))
    assert "the range that counts as no difference, ±5 % of local's mean in the condition." in made["effects"].caption


def band_is(axes: Axes, margins: list[float]) -> bool:
    """Whether the grey band has its edges there, from the first row to the last."""
    (collection,) = (each for each in axes.collections if not isinstance(each, LineCollection))
    (path,) = collection.get_paths()
    rows = [(row + off, margin) for row, margin in enumerate(margins) for off in (-0.4, 0.4)]
    inside = [path.contains_point((sign * 0.99 * margin, at)) for at, margin in rows for sign in (-1, 1)]
    outside = [path.contains_point((sign * 1.01 * margin, at)) for at, margin in rows for sign in (-1, 1)]
    return all(inside) and not any(outside)


def test_a_verdict_has_a_shape_of_its_own(of_rich: dict[str, Plot]) -> None:
    looks = list(comparison_plots._SHAPES.values())
    assert len(set(looks)) == len(looks) - 1  # lower and higher differ by their position
    assert {str(line.get_marker()) for line in figure_of(of_rich, "effects").axes[0].lines} >= {"o", "s"}


def test_each_seed_has_a_line_through_its_sides(rich: Comparison, of_rich: dict[str, Plot]) -> None:
    used = rich.runs[rich.runs.used]
    for condition, how, seed in [("data.batch_size=2", comparisons.ONE, 3), ("data.batch_size=4", comparisons.ONE, 3)]:
        of_one = used[(used.condition == condition) & (used.how == how) & (used.seed == seed)]
        values = [round(float(value), 6) for value in of_one.set_index("side").value.reindex(rich.sides).dropna()]
        assert values in [list(np.round(y, 6)) for _, y in lines(figure_of(of_rich, "seeds"))]


def test_curves_are_means_over_seeds_by_epoch(rich: Comparison, of_rich: dict[str, Plot]) -> None:
    for metric, name in (("val/error", "curves-val-error"), ("train/loss", "curves-train-loss")):
        curves = rich.curves[rich.curves.metric == metric]
        for _, of_one in curves.groupby(["condition", "side", "how"]):
            means = of_one.groupby("epoch").value.mean().to_numpy()
            assert any(y.shape == means.shape and np.allclose(y, means) for _, y in lines(figure_of(of_rich, name)))


def test_cost_shows_ratios_and_shares(rich: Comparison, of_rich: dict[str, Plot]) -> None:
    figure = figure_of(of_rich, "cost")
    assert plotted(figure, x=True) >= rounded([*rich.cost.ratio, *rich.cost.ratio_low, *rich.cost.ratio_high])
    assert [bar.get_width() for bar in figure.axes[1].patches] == pytest.approx(list(rich.cost.collectives * 100))


def test_layers_show_what_a_device_has_and_what_it_is_worth(rich: Comparison, of_rich: dict[str, Plot]) -> None:
    (axes,) = figure_of(of_rich, "layers").axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(list(rich.layers.effective_batch))
    assert [bool(bar.get_hatch()) for bar in axes.patches] == list(rich.layers.needs)
    assert plotted(figure_of(of_rich, "layers"), x=True) == rounded(rich.layers.device_batch)
    assert {text.get_text() for text in axes.texts} >= {f"spread {value:.2f}×" for value in rich.layers.spread}


def test_batch_sizes_have_ticks_where_they_are_on_a_logarithmic_axis(of_rich: dict[str, Plot]) -> None:
    (axes,) = figure_of(of_rich, "metric").axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert list(axes.get_xticks()) == [2, 4, 8, 16]
    assert [axes.xaxis.get_major_formatter()(tick) for tick in axes.get_xticks()] == ["2", "4", "8", "16"]
    assert axes.get_xlabel() == "batch size per device (samples)"
    assert axes.get_ylabel() == "test error (%)"


def test_values_that_are_close_have_a_linear_axis() -> None:
    assert figure_of(drawn(comparisons.nothing_differs()), "metric").axes[0].get_xscale() == "linear"


@pytest.mark.parametrize("name", comparisons.ALL)
def test_each_plot_has_a_caption_and_axes_have_labels(name: str) -> None:
    for plot in drawn(comparisons.ALL[name]()).values():
        assert plot.caption.endswith(".")
        assert plot.title
        if plot.figure is not None:
            assert len(plot.caption) > 100
            named = [axes.get_xlabel() for axes in plot.figure.axes]
            named += [text.get_text() for text in (plot.figure._supxlabel, plot.figure._supylabel) if text is not None]
            assert any(named), plot.name


def test_what_there_is_not_is_left_out_with_a_reason() -> None:
    assert {plot.name: plot.figure is None for plot in drawn(comparisons.comparison()).values()} == dict.fromkeys(
        ("metric", "effects", "seeds", "curves", "cost", "layers"), True
    )
    assert all("o plot" in p.caption or "No learning" in p.caption for p in drawn(comparisons.comparison()).values())
    plots_of_one_condition = drawn(comparisons.without_axis())
    assert [name for name, plot in plots_of_one_condition.items() if plot.figure] == ["metric", "effects", "seeds"]


def test_what_does_not_fit_is_said() -> None:
    rows = [(f"layer{at}", "local", "", 2, 1.0 + at, 1.0, 0.5, True) for at in range(50)]
    plot = drawn(comparisons.comparison(layers=frame("layers", rows)))["layers"]
    assert "Not shown: 30 layers more." in plot.caption
    values = {(f"seedless={at}", side, ""): [1.0, 2.0, 1.5] for at in range(50) for side in ("a", "b")}
    many = drawn(measured(values))
    assert "Not shown: 10 rows more." in many["effects"].caption
    assert "Not shown: 38 panels more." in many["seeds"].caption


def test_sides_have_colours_and_shapes_of_their_own(rich: Comparison) -> None:
    looks = comparison_plots.looks(rich)
    assert len({(look.colour, look.marker, look.filled) for look in looks.values()}) == len(looks)
    by_side = {side: (look.colour, look.marker) for (side, _), look in looks.items()}
    assert len({colour for colour, _ in by_side.values()}) == len({marker for _, marker in by_side.values()}) == 3


# Machado, Oliveira & Fernandes 2009, severity 1.0: perception without one kind of cones, for linear RGB.
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_colour_blind_tell_the_first_sides_apart(kind: str) -> None:
    def seen(colour: str) -> np.ndarray:
        linear = np.array(to_rgb(colour)) ** 2.2
        return np.clip(np.array(BLINDNESS[kind]) @ linear, 0, 1) ** (1 / 2.2)

    for one, other in combinations(plot_style.COLOURS[:5], 2):
        assert np.linalg.norm(seen(one) - seen(other)) > 0.25, (one, other)
    assert np.linalg.norm(seen(plot_style.BETTER) - seen(plot_style.WORSE)) > 0.4


def test_the_users_settings_of_matplotlib_neither_matter_nor_change() -> None:
    before = figure_of(drawn(comparisons.without_axis()), "metric")
    with mpl.rc_context({"font.size": 30, "axes.grid": False}):
        figure = figure_of(drawn(comparisons.without_axis()), "metric")
        assert mpl.rcParams["font.size"] == 30
    sizes = [[text.get_size() for text in f.axes[0].get_xticklabels()] for f in (before, figure)]
    assert sizes[0] == sizes[1]


def test_pyplot_is_not_used_and_wandb_not_imported_for_a_report() -> None:
    modules = modules_after(
        "import tempfile, pathlib; from syncbn.study.report import write; from tests.study.support import comparisons\n"
        "write.write(comparisons.without_axis(), pathlib.Path(tempfile.mkdtemp()))"
    )
    assert not modules & {"matplotlib.pyplot", "wandb", "lightning", "torch"}


def test_labels_say_what_tells_rows_apart() -> None:
    conditions = [f"data.batch_size={batch} trainer.max_epochs=4 norm.group={'x' * 30}" for batch in (2, 4)]
    values = {
        (condition, side, how): [2.0, 1.5, 3.0]
        for condition in conditions
        for side in ("local", "sync", "group_norm with a long name")
        for how in (comparisons.ONE, comparisons.PROCESSES)
    }
    made = drawn(measured(values))
    texts = {name: [text.get_text() for text in figure_of(made, name).axes[0].texts] for name in ("effects", "metric")}
    assert texts["metric"] == ["batch_size=2", "batch_size=4"]
    labels = [text for text in texts["effects"] if "batch_size" in text]
    assert labels[0] == "batch_size=2 · sync"
    assert labels[1] == "batch_size=2 · sync · 2 processes on the CPU"
    assert len(set(labels)) == len(labels) == 8
    assert max(map(len, labels)) <= 44
    titles = [axes.get_title(loc="left") for axes in figure_of(made, "seeds").axes]
    assert titles[:2] == [f"batch_size=2\n{how}" for how in (comparisons.ONE, comparisons.PROCESSES)]
