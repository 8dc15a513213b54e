"""The tutorials' own files work, the settings of all pages exist, and the lines that they show are still printed.

These are the parts that are quick. ``python -m tests.soak.docs`` follows each page from its beginning to its end.
"""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from syncbn.training.launch import main  # noqa: F401  # registers the types and names that conf/ uses
from tests.support.tutorial_pages import Command, File, shape, steps
from tests.support.tutorial_reader import Reader
from tests.support.warm_process import REPO

PAGES = sorted((REPO / "docs/tutorials").glob("*.md"))
OTHERS = [REPO / "docs" / name for name in ("quickstart.md", "notebooks/comparing_runs.md")]
# Of the pages with files of the reader's own: the words by which the commands are known that are followed here.
FOLLOWED = {
    "own_network": {"init", "cd", "run.id=residual", "pytest"},
    "segmentation": {"init", "cd", "run.id=sync", "mask.py"},
    "own_images": {"make_photos.py", "run.id=photos"},
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_files_of_a_tutorial_work_and_lines_are_printed_as_shown(name: str, tmp_path: Path) -> None:
    reader, left = Reader(REPO / f"docs/tutorials/{name}.md", tmp_path, shortened=True), set(FOLLOWED[name])
    for step in reader.steps:
        if isinstance(step, File) or left & set(step.words):
            left -= set(getattr(step, "words", []))
            assert reader.follow(step) == []
    assert not left


def typed(text: str) -> list[str]:
    """The settings of each command for training in a text, but of those with the reader's own files."""
    text = text.replace("\\\n", " ")
    found = re.findall(r"^ *(?:[$!] *)?(?:\w+=\w+ )?syncbn train (.*=.*)$", text, re.MULTILINE)
    found += re.findall(r'make train ARGS="(.*?)"', text) + re.findall(r"slurm/train.sbatch (.*)$", text, re.MULTILINE)
    return [each for each in found if "--config-dir" not in each]


SETTINGS = sorted({(page.stem, each) for page in (*PAGES, *OTHERS) for each in typed(page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize(("page", "settings"), SETTINGS)
def test_the_settings_on_the_pages_exist(page: str, settings: str) -> None:
    first = [re.sub(r"=([^,\[]+),.*$", r"=\1", word) for word in shlex.split(settings) if "=" in word]
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        compose("config", first)


def test_each_kind_of_command_is_found() -> None:
    pages = {page for page, _ in SETTINGS}
    assert pages == {"own_images", "compare_two_norms", "preemption", "export", "quickstart", "comparing_runs"}


def test_files_commands_and_lines_are_told_apart(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\n# a/b.py\nx = 1\n```\n\n```python\nx = 2\n```\n\n"
        "```yaml\n# @package _global_\n# c.yaml\ny: 1\n```\n\n```\nsyncbn runs\n```\n\n"
        "```console\n$ syncbn train \\\n    seed=1,2\n...\nepoch  1/15  step 18\n$ cd a\n```\n",
        encoding="utf-8",
    )
    assert steps(page) == [
        File("a/b.py", "# a/b.py\nx = 1\n"),
        File("c.yaml", "# @package _global_\n# c.yaml\ny: 1\n"),
        Command(["syncbn", "train", "seed=1,2"], ["epoch  1/15  step 18"]),
        Command(["cd", "a"]),
    ]
    assert shape("epoch  1/15  step 18") == shape("epoch 2/3  step 2,018  val/acc 1") == "epoch #/# step"


def test_a_line_that_is_no_longer_printed_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    shown = "mine: a network, data, settings and a test.\nmine: a network and its data"
    page.write_text(f"```console\n$ syncbn init mine\n{shown}\n```\n", encoding="utf-8")
    reader = Reader(page, tmp_path, shortened=True)
    assert reader.follow(reader.steps[0]) == ["mine: a network and its data"]
