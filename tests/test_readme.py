"""What README and the documentation show is true: code runs, settings exist, and verdicts are those of the page."""

import csv
import re
import shlex
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from syncbn.training.launch import main  # noqa: F401  # registers the types and names that conf/ uses
from tests.support.markdown_pages import REPO, pages
from tests.support.ranks import Ranks

README = REPO / "README.md"
VERDICTS = REPO / "docs/results/claims/tables/verdicts.csv"
NINE_CLAIMS = (REPO / "docs/nine_claims.md").read_text(encoding="utf-8")
SYMBOLS = {
    "holds only": "◐ in part",
    "holds": "✓ holds",
    "does not hold": "✗ fails",
    "not decided": "? undecided",
    "no difference": "= no difference",
    "better": "✓ better",
    "worse": "✗ worse",
}
IN_FULL = ("holds", "does not hold", "not decided", "no difference")  # a verdict that is no longer than its symbol


def commands(page: Path) -> list[str]:
    """The arguments of the training commands of a page, in its code; continued lines are joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    program = r"(?:train\.py|syncbn train|train\.sbatch|sweep\.sbatch|torchrun\.sbatch) "
    found = re.findall(rf"{program}([^#\n`|&]*=[^#\n`|&]*)", text) + re.findall(r'ARGS="(.*?)"', text)
    refused = re.findall(rf"\$ (?:python )?{program}(.*)\nerror: ", text)
    return [each for each in found if each.strip() not in {other.strip() for other in refused}]


def all_commands() -> dict[str, str]:
    """The commands of all pages, each with a page that has it, without those that read the user's own files."""
    named = [README, REPO / "CONTRIBUTING.md", REPO / "slurm/README.md"]
    read = [*named, *(page for page in pages() if REPO / "docs" in page.parents)]
    read.remove(REPO / "docs/guide/search.md")  # it needs a plugin, and tests/extras runs it
    found = [(command, page) for page in read[::-1] for command in commands(page) if "--config-dir" not in command]
    return {command: page.relative_to(REPO).as_posix() for command, page in found}


def overrides(command: str) -> dict[str, str]:
    """The settings of a command by their names; of several values of a sweep the first."""
    words = [word for word in shlex.split(command) if "=" in word and not word.startswith("-")]
    swept = re.compile(r"^([\w./+]+)=([\w.+-]+)(,[\w.+-]+)+$")
    return {word.partition("=")[0]: swept.sub(r"\1=\2", word) for word in words}


def choices(settings: dict[str, str]) -> set[str]:
    """Those of the settings that choose files of conf/."""
    return {word for name, word in settings.items() if (REPO / "conf" / name.strip("+")).is_dir()}


def batches() -> list[tuple[dict[str, str], list[str]]]:
    """Settings that are composed together, which takes a third of the time, and the commands that have them."""
    made: list[tuple[dict[str, str], list[str]]] = []
    for command in all_commands():
        own = overrides(command)
        for settings, its in made:
            if choices(settings) == choices(own) and all(
                settings.get(name, word) == word for name, word in own.items()
            ):
                settings.update(own)
                its.append(command)
                break
        else:
            made.append((own, [command]))
    return made


def test_the_settings_in_all_commands_exist() -> None:
    wrong = []
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        for settings, its in batches():
            try:
                compose("config", [*settings.values()])
            except Exception as error:  # of any class; the test names all commands that fail
                wrong.append(f"one of {its}: {error}")
    assert wrong == []


def test_commands_are_found_on_most_pages() -> None:
    assert len(commands(README)) >= 5
    assert {"docs/guide/settings.md", "docs/guide/studies.md", "slurm/README.md"} <= {*all_commands().values()}


def six_lines(rank: int, world_size: int) -> tuple[torch.Tensor, type]:
    torch.manual_seed(0)
    block = re.findall(r"```python\n(import syncbn.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[0]
    training = (
        "layer = type(model.module[1]); model(torch.ones(2, 3, 4, 4) * rank + torch.rand(2, 3, 4, 4)).sum().backward()"
    )
    names = {"model": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "torch": torch, "rank": rank}
    exec(re.sub(r"^\.\.\..*$", training, block, flags=re.MULTILINE), names)
    assert type(names["model"][1]) is nn.BatchNorm2d
    return names["model"][1].running_mean, names["layer"]


def test_the_layer_in_six_lines_runs_and_synchronizes(ranks: Ranks) -> None:
    (first, kind), (second, _) = ranks.run(six_lines, world_size=2)
    assert kind.__name__ == "SyncBatchNorm2d"
    assert first.any()
    assert torch.equal(first, second)


def symbol(verdict: str) -> str:
    return next(each for start, each in SYMBOLS.items() if verdict.startswith(start))


def test_the_nine_verdicts_are_those_of_the_page() -> None:
    rows = list(csv.DictReader(VERDICTS.read_text(encoding="utf-8").splitlines()))
    table, details = (NINE_CLAIMS.split("\n## ", 2)[at] for at in (0, 1))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "][
        1:
    ]
    assert len(lines) == 9
    for row in rows:
        cells = lines[int(row["number"]) - 1]
        side = ("local", "sync", "group_norm").index(row["side"])
        assert cells[0].lower() == f"{row['number']} {row['text']}".lower()
        assert (cells[side + 1], cells[4]) == (symbol(row["verdict"]), symbol(row["sharing"]))
        norm = ("per-device", "synchronized", "group norm")[side]
        for of, verdict in ((norm, row["verdict"]), ("sharing", row["sharing"])):
            assert verdict in IN_FULL or f"| {row['number']} | {of} | {verdict} |" in details


def test_the_figures_of_readme_are_those_of_the_table() -> None:
    table = REPO / "docs/results/small_batch/fixed_step-test-acc/tables/means.csv"
    shown = {
        row["side"]: f"{float(row['mean']):.1f} ± {float(row['sd']):.1f} %"
        for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines())
        if (row["at"], row["how"]) == ("2.0", "1 process for 2 devices")
    }
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"from {shown['local'].removesuffix(' %')} to {shown['sync']}" in text
    assert shown["group_norm"] in text
