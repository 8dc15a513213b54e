"""Every text file is read and written as UTF-8. ruff's PLW1514 finds this only where it can infer a Path."""

import ast
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
MODE_AT = {"open": 1, "fdopen": 1, "io.open": 1, ".open": 0, "NamedTemporaryFile": 0, "TemporaryFile": 0}
BINARY_BY_DEFAULT = ("NamedTemporaryFile", "TemporaryFile")
OPENS_NO_TEXT_FILE = (
    "os.open",
    "Image.open",
    "image_module.open",
    "browser.open",
    "tarfile.open",
    "gzip.open",
)  # without "t"
ARGUMENTS_BEFORE_ENCODING = {"read_text": 0, "write_text": 1}


def unclear(call: ast.Call) -> bool:
    """Whether this call opens a text file, or reads a program's output as text, in the locale's encoding."""
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    given = {each.arg: each.value for each in call.keywords}
    if "encoding" in given or name in OPENS_NO_TEXT_FILE:
        return False
    if last in ARGUMENTS_BEFORE_ENCODING:
        return len(call.args) <= ARGUMENTS_BEFORE_ENCODING[last]
    if last in ("run", "Popen", "check_output", "check_call"):
        return not {"text", "universal_newlines"}.isdisjoint(given)
    at = MODE_AT.get(name, MODE_AT.get(last if last != "open" else ".open"))
    if at is None or ("." not in name and last == "fdopen"):
        return last in ("FileHandler", "TextIOWrapper")
    mode = given.get("mode", call.args[at] if len(call.args) > at else None)
    if mode is None:
        return last not in BINARY_BY_DEFAULT
    return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))


def unclear_lines(source: str) -> list[int]:
    return [n.lineno for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and unclear(n)]


@pytest.mark.parametrize(
    "line",
    [
        "open(path)",
        "open(path, 'w', newline='')",
        "io.open(path, mode='a')",
        "os.fdopen(number, 'w')",
        "(directory / 'a').open()",
        "path.open('w')",
        "path.read_text()",
        "path.read_text(errors='replace')",
        "path.write_text(text)",
        "tempfile.NamedTemporaryFile('w')",
        "logging.FileHandler(path)",
        "subprocess.run(command, text=True)",
        "subprocess.check_output(command, universal_newlines=True)",
    ],
)
def test_what_is_found(line: str) -> None:
    assert unclear_lines(line) == [1]
    assert unclear_lines(line[:-1] + f"{'' if line.endswith('()') else ', '}encoding='utf-8')") == []


@pytest.mark.parametrize(
    "line", ["open(path, 'rb')", "path.open('xb')", "os.open(path, flags)", "open(path, mode='wb')"]
)
def test_bytes_need_no_encoding(line: str) -> None:
    assert unclear_lines(line) == []


def test_every_text_file_is_utf_8() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=REPO, capture_output=True, encoding="utf-8", check=True)
    found = [
        f"{name}:{line}"
        for name in listed.stdout.split()
        for line in unclear_lines((REPO / name).read_text(encoding="utf-8"))
    ]
    assert found == []
