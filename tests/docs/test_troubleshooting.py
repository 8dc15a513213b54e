"""The error lines on the page of troubleshooting are those that the code prints today."""

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PAGE = (REPO / "docs/troubleshooting.md").read_text(encoding="utf-8")
# Not imported, which would take seconds.
TORCH, LIGHTNING = (Path(str(getattr(find_spec(name), "origin"))).parent for name in ("torch", "lightning"))  # noqa: B009
THEIRS = (
    TORCH / "nn/modules/batchnorm.py",
    TORCH / "nn/functional.py",
    TORCH / "nn/parallel/distributed.py",
    TORCH / "distributed/distributed_c10d.py",
    LIGHTNING / "pytorch/strategies/ddp.py",
    LIGHTNING / "pytorch/trainer/connectors/accelerator_connector.py",
    LIGHTNING / "pytorch/trainer/connectors/data_connector.py",
    LIGHTNING / "pytorch/trainer/connectors/logger_connector/result.py",
)
COMPILED = (  # lines of C++, of Python's workers, and of packages that are not installed here
    *("Expected to have finished reduction", "one of the variables needed", "Detected mismatch", "Received data size"),
    *("Connection closed by peer", "Gloo connectFullMesh", "EADDRINUSE", "derivative for", "Caught RuntimeError"),
    *("The server socket", "operator torchvision::nms", "Key backend"),
)


def section(title: str) -> str:
    """The text of a section of the page."""
    return re.split(r"^## ", PAGE.partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]


def lines(*titles: str) -> list[str]:
    """The error lines that these sections have as headings."""
    return [line for title in titles for line in re.findall(r"^### `(.+)`$", section(title), re.MULTILINE)]


OURS = lines("The layer: lines that syncbn prints", "Training runs: lines that syncbn prints")
OTHERS = [line for line in lines("torch and gloo", "Lightning") if not line.startswith(COMPILED)]


class Texts(ast.NodeVisitor):
    """The texts in a file of Python, each as one piece: adjacent ones joined, and values in it as ``...``."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def visit_Constant(self, node: ast.Constant) -> None:  # the name that ast calls
        if isinstance(node.value, str):
            self.found.append(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pieces = [piece.value if isinstance(piece, ast.Constant) else "..." for piece in node.values]
        self.found.append("".join(map(str, pieces)))


@cache
def texts(*files: Path) -> str:
    """All texts in these files; in docstrings and comments a line that the program prints does not count."""
    visitor = Texts()
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0])
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
            and isinstance(node.body[0].value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and id(node) in docstrings:
                node.value = ast.Constant(0)
        visitor.visit(tree)
    return "\n".join(visitor.found)


def missing(line: str, *files: Path) -> list[str]:
    """The parts of a line, between its values and its clauses, that no text in the files has."""
    parts = [part.strip(" ,:()") for part in re.split(r"(?:rank )?\.\.\.|;|, and ", line)]
    known = texts(*files).replace("`", "")
    return [part for part in parts if part and part not in known]


def test_the_page_has_enough_entries() -> None:
    assert len(OURS) >= 25
    assert len(OTHERS) >= 8
    assert len(re.findall(r"^### ", PAGE, re.MULTILINE)) >= 55


@pytest.mark.parametrize("line", OURS)
def test_the_code_prints_this_line(line: str) -> None:
    assert missing(line, *sorted((REPO / "syncbn").rglob("*.py"))) == []


@pytest.mark.parametrize("line", OTHERS)
def test_torch_or_lightning_prints_this_line(line: str) -> None:
    assert missing(line, *THEIRS) == []


def test_a_line_that_nothing_prints_is_found() -> None:
    """One that was on the page once: it had been changed in the code."""
    files = sorted((REPO / "syncbn").rglob("*.py"))
    assert missing("... is at work in this directory; wait for it, or stop it", *files) != []
    assert missing("... is running this run already; wait for it, or stop it", *files) == []


@pytest.mark.parametrize("setting", sorted(set(re.findall(r"`((?:[a-z_]+\.)+[a-z_]+)=[^`]*`", PAGE))))
def test_a_setting_on_the_page_exists(setting: str) -> None:
    group, _, name = setting.rpartition(".")
    files = [REPO / f"conf/{group.replace('.', '/')}.yaml", *(REPO / "conf" / group.partition(".")[0]).glob("*.yaml")]
    settings = "\n".join(
        file.read_text(encoding="utf-8") for file in [REPO / "conf/config.yaml", *files] if file.exists()
    )
    schema = (REPO / "syncbn/training/config/schema.py").read_text(encoding="utf-8")
    assert re.search(rf"^ *{name}: ", settings, re.MULTILINE) or re.search(rf"^    {name}: ", schema, re.MULTILINE)
