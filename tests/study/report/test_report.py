"""Tests the report: it has every figure of the comparison, escapes foreign text, and is reproducible."""

import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb

from syncbn.study.compare.comparison import Comparison
from syncbn.study.report import answer, read, tables, wandb_run, write
from syncbn.study.report.plots import comparison_plots
from syncbn.study.report.symbol_matrix import legend, symbol_matrix
from syncbn.study.runner.rewrite import rewrite
from syncbn.training.loggers import wandb_internals
from tests.study.support import comparisons
from tests.study.support.comparisons import frame
from tests.study.support.page_reader import Page, cells, files, flat
from tests.study.support.page_reader import html_page as page
from tests.study.support.page_reader import markdown_page as markdown
from tests.support.refuses import refuses
from tests.training.support import wandb_log


@pytest.fixture(params=comparisons.ALL)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


ORDER = ["matrix", "effects", "means", "cost", "layers", "expected", "confirmations", "runs"]


def matrix(c: Comparison) -> list[list[str]]:
    made = symbol_matrix(c)
    return [made.columns, *([label, mean, *(cell.text for cell in cells)] for label, mean, cells in made.rows)]


def test_the_page_and_markdown_have_every_cell_of_every_table(written: dict[str, Path], name: str) -> None:
    made = comparisons.ALL[name]()
    built = tables.build(made)
    expected = [[built[table].columns, *built[table].rows] for table in ORDER if table in built]
    if len(made.effects):
        expected = [matrix(made), *expected]
    assert cells(page(written[name])) == expected
    assert cells(markdown(written[name])) == expected


def plain(value: float, pattern: str) -> str:
    """The expected text, implemented independently here."""
    return pattern.format(value).replace("-", "−")


def decimals(low: float, high: float, sign: str = "") -> str:
    """The pattern with two significant digits of half the interval's width."""
    return f"{{:{sign}.{max(0, 1 - math.floor(math.log10((high - low) / 2)))}f}}"


def test_rows_say_what_the_comparison_says(written: dict[str, Path]) -> None:
    c = comparisons.rich()
    shown = dict(zip(ORDER, cells(page(written["rich"])), strict=True))
    for row, cell in zip(c.effects.itertuples(), shown["effects"][1:], strict=True):
        shown_by = decimals(row.low, row.high, "+")
        assert cell[:4] == [row.condition, row.side, str(row.n), plain(row.difference, shown_by)]
        means = c.means.set_index(["condition", "side", "how"])["mean"]
        base = means[row.condition, "local", row.how]
        low, high = max(row.low, -base), min(row.high, 100 - base)  # an error ends at 0 and at 100 %
        assert cell[4] == f"{plain(low, shown_by)} to {plain(high, shown_by)}"
        assert cell[5].startswith(row.verdict)
        assert cell[-1] == row.how
    for row, cell in zip(c.means.itertuples(), shown["means"][1:], strict=True):
        assert cell[:3] == [row.condition, row.side, str(row.n)]
        shown_by = decimals(row.low, row.high)
        assert cell[3:5] == [plain(row.mean, shown_by), plain(row.sd, shown_by)]
        assert cell[5] == f"{plain(max(row.low, 0), shown_by)} to {plain(row.high, shown_by)}"
    sync = ["data.batch_size=4", "sync", "3", "9.8 ms", "816.3", "3", "2.13×", "1.94× to 2.41×", "52.7 %"]
    assert shown["cost"][2] == [*sync, comparisons.PROCESSES]
    assert shown["layers"][3] == ["stem.bn", "data.batch_size=2", "local", "128", "11.4", "11.20×", "0.87×", "yes"]
    for row, cell in zip(c.runs.itertuples(), shown["runs"][1:], strict=True):
        assert cell[0] == row.path
        assert cell[5] == ("—" if row.status == "failed" else f"{row.value:.2f}")
        assert cell[-1] == ("yes" if row.used else f"no: {row.why}")
    assert [row[4] for row in shown["expected"][1:]] == ["yes", "no", "not comparable"]
    assert len(shown["confirmations"]) == 7


def test_csv_files_have_all_digits(written: dict[str, Path], name: str) -> None:
    made = comparisons.ALL[name]()
    for table in comparisons.COLUMNS:
        there = getattr(made, table)
        back = pd.read_csv(written[name] / "tables" / f"{table}.csv", dtype=str, keep_default_na=False)
        assert list(back.columns) == list(there.columns)
        assert len(back) == len(there)
        for column in there.columns:
            for one, other in zip(there[column], back[column], strict=True):
                if isinstance(one, tuple):
                    assert tuple(float(part) for part in other.split("; ") if part) == one
                elif one is pd.NA:
                    assert other == ""
                elif isinstance(one, float):
                    assert (one == float(other)) if other else one != one
                else:
                    assert str(one) == other


@pytest.mark.parametrize("table", ORDER[1:])
def test_a_changed_value_changes_its_table(table: str) -> None:
    made = comparisons.rich()
    before = tables.build(made)[table]
    unseen = {"at", "differences", "margin"}  # on the axis of a plot, in the CSV file, in a note: one for all rows
    for column in set(comparisons.COLUMNS[table].split()) - unseen - {"why"}:
        changed = getattr(made, table).copy()
        value = changed[column].iloc[1]
        if isinstance(value, str):
            changed.loc[1, column] = f"{value}, another"
        elif changed[column].dtype == bool:
            changed.loc[1, column] = not value
        else:
            changed[column] = changed[column].astype(float)
            changed.loc[1, column] = float(value) * 2 + 1
        after = tables.build(replace(made, **{table: changed}))[table]
        assert [a != b for a, b in zip(before.rows, after.rows, strict=True)].count(True) == 1, column


def test_a_difference_that_is_there_and_small_is_both(tmp_path: Path) -> None:
    pairs = [2.0, 2.1, 2.2, 2.0, 1.9, 2.1, 2.0, 2.2]
    side = [value - 0.1 - 0.01 * (seed % 3) for seed, value in enumerate(pairs)]
    how = comparisons.PROCESSES
    made = comparisons.measured({("", "local", how): pairs, ("", "sync", how): side})
    assert list(made.effects.verdict) == ["lower"]
    write.write(made, tmp_path)
    assert "lower (better), by less than ±0.75 points" in cells(page(tmp_path))[1][1]
    far = made.effects.assign(p_tost=0.02)
    assert tables.build(replace(made, effects=far))["effects"].rows[0][4] == "lower (better)"


def test_what_no_share_of_collectives_has_is_said_under_cost(written: dict[str, Path]) -> None:
    for shown in (page, markdown):
        assert "broadcasts the running statistics from rank 0" in shown(written["rich"]).text
        assert "broadcasts the running statistics" not in shown(written["without axis"]).text


def test_tolerances_are_said_to_be_ours(written: dict[str, Path]) -> None:
    assert cells(page(written["rich"]))[5][0][2] == "published or expected (± is a tolerance of ours)"
    without = comparisons.rich().expected.replace({"published": {"+57 ± 8 points": "+57 points"}})
    table = tables.build(replace(comparisons.rich(), expected=without))["expected"]
    assert table.columns[2] == "published or expected"


def test_margins_of_conditions_are_a_column() -> None:
    made = comparisons.rich()
    loss = replace(comparisons.ERROR, label="test loss", unit="", difference_unit="")
    own = made.effects.assign(margin=[0.01 * (1 + row) for row in range(len(made.effects))])
    table = tables.build(replace(made, margin=float("nan"), metric=loss, effects=own))["effects"]
    at = table.columns.index("margin")
    assert [row[at] for row in table.rows][:3] == ["0.01000", "0.02000", "0.03000"]
    assert "margin" not in tables.build(made)["effects"].columns
    notes = dict(tables.effects_notes(replace(made, margin=float("nan"))))
    assert notes["p, equivalence"].endswith("within ±5 % of local's mean in the condition")


def test_a_changed_run_changes_the_page_markdown_csv_and_plots(written: dict[str, Path], tmp_path: Path) -> None:
    made = comparisons.without_axis()
    runs = made.runs.copy()
    runs.loc[0, "value"] = 47.11
    write.write(replace(made, runs=runs), tmp_path)
    changed = {name for name, there in files(tmp_path).items() if there != files(written["without axis"])[name]}
    plots = {f"plots/seeds.{kind}" for kind in ("png", "svg")}
    assert changed == {"report.html", "report.md", "tables/runs.csv"} | plots


@pytest.mark.parametrize(
    "change",
    [
        {"title": "Another"},
        {"question": "Another?"},
        {"command": "another"},
        {"suggestion": "another"},
        {"margin": 0.5},
        {"alpha": 0.02},
        {"differs": ["another: 1 / 2"]},
        {"constant": ["another: 1"]},
        {"problems": ["another"]},
        {"metric": replace(comparisons.ERROR, label="top-5 error")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_all_that_is_said_is_on_the_page(change: dict[str, Any], tmp_path: Path) -> None:
    made = comparisons.nothing_differs()
    for directory, comparison in (("before", made), ("after", replace(made, **change))):
        write.write(comparison, tmp_path / directory)
    before, after = files(tmp_path / "before"), files(tmp_path / "after")
    assert all(before[name] != after[name] for name in ("report.html", "report.md"))


def test_the_same_comparison_gives_the_same_bytes(written: dict[str, Path], tmp_path: Path) -> None:
    write.write(comparisons.rich(), tmp_path)
    assert files(tmp_path) == files(written["rich"])


def test_the_page_begins_with_the_answer_and_problems_come_before_details(written: dict[str, Path]) -> None:
    made, shown = comparisons.rich(), page(written["rich"])
    said = [
        made.title,
        answer.sentence(made),
        legend(made)[0],
        answer.cost(made),
        made.problems[0],
        "Differences from local between runs of one seed",
        made.constant[0],
        made.command,
    ]
    text = flat(shown.text)
    places = [text.index(flat(words), 1) for words in said]  # after the title of the window
    assert places == sorted(places)
    in_markdown = markdown(written["rich"]).headings
    assert [heading for heading in shown.headings if heading in in_markdown] == in_markdown


def test_failed_runs_and_how_runs_were_run_are_counted(written: dict[str, Path]) -> None:
    text = page(written["rich"]).text
    assert "102 run directories" in text
    assert "1 process for 2 devices: 96 runs, 95 of them in pairs" in text
    assert "2 processes on the CPU: 6 runs, 6 of them in pairs" in text
    assert "not in a pair, failed: 1 run" in text
    nasty = page(written["nasty"])
    assert "not known how: 1 run, 0 of them in pairs" in nasty.text
    assert ["sweep/12", *["—"] * 3, "no result", "—", "—", "no: result.json cannot be read"] in cells(nasty)[-1]


def test_the_page_stands_alone(written: dict[str, Path], name: str) -> None:
    shown = page(written[name])
    assert not {tag for tag, _ in shown.tags} & {"script", "img", "iframe", "object", "a", "base", "form"}
    for tag, attributes in shown.tags:
        for attribute, value in attributes.items():
            if attribute in ("src", "href", "xlink:href", "action", "data", "srcset"):
                assert value is not None
                assert value.startswith(("#", "data:")), (tag, value)
            assert not attribute.startswith("on")
    html = (written[name] / "report.html").read_text(encoding="utf-8")
    style = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert len(style) == 1
    assert "@import" not in html
    assert all(inside.startswith("#") for inside in re.findall(r"url\((.*?)\)", html))


def test_identifiers_are_there_once_and_what_refers_to_one_finds_it(written: dict[str, Path], name: str) -> None:
    html = (written[name] / "report.html").read_text(encoding="utf-8")
    identifiers = [value for _, attributes in Page(html).tags if (value := attributes.get("id"))]
    assert len(identifiers) == len(set(identifiers))
    used = re.findall(r"url\(#(.*?)\)", html) + re.findall(r'href="#(.*?)"', html)
    assert set(used) <= set(identifiers)
    assert bool(used) == (name != "nothing at all")


def test_labels_are_text_not_markup(written: dict[str, Path]) -> None:
    made = comparisons.nasty()
    for shown in (page(written["nasty"]), markdown(written["nasty"])):
        text = flat(shown.text)
        words = (made.title, made.question, answer.sentence(made), made.suggestion, made.command)
        assert all(flat(said) in text for said in (*words, *made.problems, *made.differs))
        assert not {tag for tag, _ in shown.tags} & {"script", "b", "i"}
        ours = ("tables/", "plots/", "#", "data:")
        leads = [str(value) for _, a in shown.tags for name, value in a.items() if name in ("href", "src")]
        assert all(lead.startswith(ours) for lead in leads)
        assert made.title in shown.headings
        assert "not a heading" not in shown.headings
        assert {cell for row in cells(shown)[1] for cell in row} >= set(made.conditions)
    assert [tag for tag, _ in markdown(written["nasty"]).tags].count("li") == 2 + 1 + 6 + 8


def test_labels_are_text_in_plots_too(written: dict[str, Path]) -> None:
    for plot in ("metric", "seeds"):
        drawing = (written["nasty"] / "plots" / f"{plot}.svg").read_text(encoding="utf-8")
        assert "_local $x$ &lt;b&gt;&amp;|</text>" in drawing
        assert '>sync ["*layer3*"] `y`</text>' in drawing.replace("&quot;", '"')


def test_links_in_markdown_lead_to_files_and_every_file_is_linked(written: dict[str, Path], name: str) -> None:
    shown = markdown(written[name])
    linked = {value for _, attributes in shown.tags if (value := attributes.get("src") or attributes.get("href"))}
    there = {file for file in files(written[name]) if file.endswith((".png", ".csv"))}
    assert linked <= there
    built = tables.build(comparisons.ALL[name]())
    assert linked >= {file for file in there if file.endswith(".png")} | {f"tables/{table}.csv" for table in built}


def test_plots_are_there_or_the_page_says_why_not(written: dict[str, Path], name: str) -> None:
    shown = page(written[name])
    inside = {str(a["id"]).removeprefix("plot-") for tag, a in shown.tags if tag == "figure"}
    for kind in ("png", "svg"):
        assert {Path(file).stem for file in files(written[name]) if file.endswith(kind)} == inside
    assert [tag for tag, _ in shown.tags].count("svg") == len(inside)
    for plot, reason in {
        "metric": "No plot of the test error: no run has one.",
        "effects": "No plot of differences: no two runs",
        "seeds": "No plot seed by seed",
        "cost": "No plot of the cost",
        "layers": "No plot of the layers",
    }.items():
        assert (plot in inside) == (reason not in shown.text)


def test_several_comparisons_are_in_full_in_markdown_too(tmp_path: Path) -> None:
    parts = {"first-part": comparisons.rich(), "second": comparisons.nasty()}
    write.write_several("All of <it>", "Does it pay?", parts, tmp_path)
    html, shown = page(tmp_path), markdown(tmp_path)
    assert cells(shown) == cells(html)
    assert shown.headings[0] == "All of <it>"
    assert [text for text in html.headings if text in shown.headings] == shown.headings
    text = flat(shown.text)
    for part in parts.values():
        assert text.count(flat(answer.sentence(part))) == 2  # among the answers, and with its figures
        assert all(flat(line) in text for line in (part.suggestion, *part.problems, *part.differs))
    levels = [tag for tag, _ in shown.tags if tag in ("h1", "h2", "h3", "h4")]
    assert (levels.count("h1"), levels.count("h2")) == (1, 2)
    linked = {value for _, a in shown.tags if (value := a.get("src") or a.get("href"))}
    pictures = {name for name in files(tmp_path) if name.endswith(".png")}
    assert pictures | {f"{name}/report.md" for name in parts} <= linked <= set(files(tmp_path))


def test_a_report_over_an_older_one_leaves_nothing_of_it(written: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(written["rich"], tmp_path, dirs_exist_ok=True)
    write.write(comparisons.without_axis(), tmp_path)
    assert files(tmp_path) == files(written["without axis"])


def test_a_report_leaves_other_files_alone(tmp_path: Path) -> None:
    others = ["plots/mine.png", "plots/effects-talk.svg", "plots/curves-mine.png", "tables/mine.csv", "tables/note.txt"]
    for other in others:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text(other, encoding="utf-8")
    write.write(comparisons.without_axis(), tmp_path)
    assert [(tmp_path / other).read_text(encoding="utf-8") for other in others] == others


def test_every_plot_has_a_name_that_a_later_report_knows_again(written: dict[str, Path], name: str) -> None:
    assert all(comparison_plots.NAMES.fullmatch(file.stem) for file in (written[name] / "plots").iterdir())


def test_problems_come_first_and_are_absent_where_there_are_none(written: dict[str, Path]) -> None:
    assert page(written["rich"]).headings[1:] == ["What to know before believing it"]
    assert page(written["nothing differs"]).headings[1:] == []


def test_all_else_is_folded(written: dict[str, Path]) -> None:
    for text in ((written["rich"] / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md")):
        assert text.count("<details>") == text.count("</details>") == text.count("<summary>") == 10
        inside = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
        assert inside.count("plots/metric.png") + inside.count('id="plot-metric"') == 1
        assert "plots/effects.png" not in inside
        assert 'id="plot-effects"' not in inside


def test_a_page_is_written_again_from_its_tables(written: dict[str, Path], name: str, tmp_path: Path) -> None:
    write.write(read.read(written[name]), tmp_path)
    assert files(tmp_path) == files(written[name])


def test_pages_of_several_comparisons_are_written_again(tmp_path: Path) -> None:
    parts = {"first-part": comparisons.rich(), "second": comparisons.without_axis()}
    write.write_several("Does it pay?", "It may.", parts, tmp_path)
    write.write(comparisons.nothing_differs(), tmp_path / "alone")
    before = files(tmp_path)
    for page_file in tmp_path.glob("**/report.*"):
        page_file.unlink()
    assert rewrite(tmp_path) == [tmp_path / "report.html", tmp_path / "alone/report.html"]
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("margin", "least", "greatest"), [(math.nan, -math.inf, math.inf), (0.75, 0.0, math.inf), (math.nan, 0.0, 1.0)]
)
def test_numbers_that_json_does_not_have_are_read_again(
    tmp_path: Path, margin: float, least: float, greatest: float
) -> None:
    c = comparisons.without_axis()
    write.write(replace(c, margin=margin, metric=replace(c.metric, least=least, greatest=greatest)), tmp_path)
    found = read.read(tmp_path)
    assert (found.metric.least, found.metric.greatest) == (least, greatest)
    assert found.margin == margin or (math.isnan(margin) and math.isnan(found.margin))


def test_curves_may_be_compressed_or_missing(tmp_path: Path) -> None:
    write.write(comparisons.rich(), tmp_path)
    before, curves = files(tmp_path), tmp_path / "tables/curves.csv"
    pd.read_csv(curves, dtype=str, keep_default_na=False).to_csv(f"{curves}.gz", index=False)
    curves.unlink()
    write.write(read.read(tmp_path), tmp_path / "again")
    assert files(tmp_path / "again") == before
    Path(f"{curves}.gz").unlink()
    assert read.read(tmp_path).curves.empty


def test_tables_that_cannot_be_read_are_an_error_in_one_line(tmp_path: Path) -> None:
    with refuses("DIRECTORY", tmp_path, "there is no report in it; syncbn compare writes one"):
        rewrite(tmp_path)
    (tmp_path / "parts.json").write_text('{"title": 1}', encoding="utf-8")
    with refuses("DIRECTORY", tmp_path, "parts.json cannot be read (KeyError: 'question')"):
        rewrite(tmp_path)
    (tmp_path / "parts.json").unlink()
    write.write(comparisons.without_axis(), tmp_path)
    for file, text in {"means.csv": "condition,at\n", "effects.csv": "", "comparison.json": "{"}.items():
        there = tmp_path / "tables" / file
        before = there.read_text(encoding="utf-8")
        there.write_text(text, encoding="utf-8")
        with refuses("DIRECTORY", tmp_path, "no report can be read from its tables", "use the directory of a report"):
            rewrite(tmp_path)
        there.write_text(before, encoding="utf-8")


@pytest.fixture
def own_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Starts a W&B service process for the test, because it keeps the settings it was started with."""
    monkeypatch.setenv("WANDB_DISABLE_CODE", "true")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.usefixtures("own_wandb")
def test_tables_and_plots_go_to_wandb(tmp_path: Path) -> None:
    made = comparisons.nasty()
    write.write(made, tmp_path)
    command = wandb_run.log_to_wandb(made, tmp_path, project="mine", group="together")
    place = Path(command.removeprefix("wandb sync "))
    run = wandb_log.run(place)
    assert (run["project"], run["run_group"], run["job_type"]) == ("mine", "together", "comparison")
    (row,) = wandb_internals.history(place)
    tables_there = {name for name in comparisons.COLUMNS if len(getattr(made, name))}
    logged = {key.split(".")[0] for key in row}
    assert {key for key in logged if key.startswith("tables/")} == {f"tables/{name}" for name in tables_there}
    assert {key for key in logged if key.startswith("plots/")} == {"plots/metric", "plots/effects", "plots/seeds"}
    media = {path.name.split("_")[0]: path for path in (place / "files/media/table/tables").iterdir()}
    effects = json.loads(media["effects"].read_text(encoding="utf-8"))
    assert effects["columns"] == comparisons.COLUMNS["effects"].split()
    assert effects["data"][0][5] == made.effects.difference[0]
    assert len(list((place / "files/media/images").rglob("*.png"))) == 3


@pytest.mark.usefixtures("own_wandb")
def test_wandb_online_without_a_server_is_an_error_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    made = comparisons.comparison(runs=frame("runs"))
    (tmp_path / "plots").mkdir()
    start = time.monotonic()
    with refuses("mode", "online", "W&B says: ", "; use mode=offline"):
        wandb_run.log_to_wandb(made, tmp_path, "online", timeout=2)
    assert time.monotonic() - start < 30
    with refuses("mode", "nowhere", "use offline or online"):
        wandb_run.log_to_wandb(made, tmp_path, "nowhere")
