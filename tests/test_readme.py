"""What the README shows is true: its code runs, its settings exist, its figures are in the shape that is printed."""

import csv
import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from syncbn.training.launch import main  # noqa: F401  # registers the types and names that conf/ uses
from tests.support.ranks import Ranks

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"train\.py ([^#\n`]*=[^#\n`]*)", README) + re.findall(r'ARGS="(.*?)"', README)


@pytest.mark.parametrize("arguments", COMMANDS)
def test_the_settings_in_the_readme_exist(arguments: str) -> None:
    overrides = [word for word in shlex.split(arguments) if "=" in word and "," not in word]
    if "--config-dir" in arguments:  # the user's own files
        overrides = []
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        compose("config", overrides)


def five_lines(rank: int, world_size: int) -> tuple[torch.Tensor, type]:
    torch.manual_seed(0)
    block = re.findall(r"```python\n(import syncbn.*?)```", README, re.DOTALL)[0]
    training = (
        "layer = type(model.module[1]); model(torch.ones(2, 3, 4, 4) * rank + torch.rand(2, 3, 4, 4)).sum().backward()"
    )
    names = {"model": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "torch": torch, "rank": rank}
    exec(re.sub(r"^\.\.\..*$", training, block, flags=re.MULTILINE), names)
    assert type(names["model"][1]) is nn.BatchNorm2d
    return names["model"][1].running_mean, names["layer"]


def test_the_layer_in_five_lines_runs_and_synchronizes(ranks: Ranks) -> None:
    (first, kind), (second, _) = ranks.run(five_lines, world_size=2)
    assert kind.__name__ == "SyncBatchNorm2d"
    assert first.any()
    assert torch.equal(first, second)


def test_the_nine_verdicts_are_those_of_the_page() -> None:
    rows = list(
        csv.DictReader((REPO / "docs/results/claims/tables/verdicts.csv").read_text(encoding="utf-8").splitlines())
    )
    lines = [line for line in README.splitlines() if re.match(r"\| \d ", line)]
    assert len(lines) == 9
    for row in rows:
        cells = [cell.strip() for cell in lines[int(row["number"]) - 1].strip("|").split("|")]
        assert cells[0].lower() == f"{row['number']} {row['text']}".lower()
        side = ("local", "sync", "group_norm").index(row["side"]) + 1
        assert (cells[side], cells[4]) == (row["verdict"], row["sharing"])
