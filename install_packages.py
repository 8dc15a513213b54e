"""Runs ``pip install`` for the Makefile, and shows what it installs and how large that is, as pip finds it out.

``python install_packages.py --constraint constraints.txt --editable '.[dev]'``: the arguments are those of ``pip
install``. It needs Python alone, since it runs before anything is installed. Errors are printed by pip.
"""

import re
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
LARGE = 5.0  # MB from which on a package is named
UNITS = {"bytes": 1e-6, "kB": 1e-3, "MB": 1.0, "GB": 1e3}
# pip 22 to 26: "  Downloading torch-2.13.0-cp311-none-linux_x86_64.whl (187.4 MB)"; also "Using cached ..."
LOCAL = re.compile(r"Processing (\S*/([^-\s/]+)-([^-\s]+)\S*\.whl)")  # a file of an index on this machine
FOUND = re.compile(r"\s*(Downloading|Using cached) (?:\S*/)?([^-\s/]+)-([^-\s]+)\S*? \(([\d.]+) (bytes|[kMG]B)\)")

MISSING = re.compile(r"WARNING: Location '.*' is ignored: it is neither a file nor a directory\.$")


class Report:
    """Turns pip's lines into few lines of its own.

    Args:
        tty: whether a line can be drawn again.
    """

    def __init__(self, *, tty: bool) -> None:
        self._tty, self._start = tty, time.monotonic()
        self._collected: set[str] = set()
        self._sizes: dict[str, float] = {}  # MB, of packages
        self._drawn = False

    def line(self, text: str) -> None:
        """Takes the next line of pip's output."""
        first, _, rest = text.strip().partition(" ")
        if first == "Collecting":
            self._collected.add(re.split(r"[^\w.-]", rest)[0])
            self._draw(f"  {len(self._collected)} packages to resolve so far, now {rest}")
        elif (found := FOUND.match(text)) and ".metadata" not in text:
            how, name, version, size, unit = found.groups()
            self._add(name, version, float(size) * UNITS[unit], "" if how == "Downloading" else ", from pip's cache")
        elif (found := LOCAL.match(text)) and Path(found[1]).is_file():
            self._add(found[2], found[3], Path(found[1]).stat().st_size / 1e6, ", a local file")
        elif text.startswith("Installing collected packages"):
            number = text.count(",") + 1
            total = f"{len(self._sizes)} files of {sum(self._sizes.values()):,.0f} MB together"
            self._print(f"  {total}, after {self._seconds():.0f} s; now unpacking {number} packages")

    def _add(self, name: str, version: str, size: float, how: str) -> None:
        self._sizes[name] = size
        said = f"  {name} {version}, {size:,.1f} MB{how}"
        self._draw(f"{said}; {sum(self._sizes.values()):,.0f} MB so far")
        if size >= LARGE:
            self._print(said)

    def end(self, installed: Path) -> None:
        """Prints what is there at the end, if anything was installed."""
        if self._sizes:
            size = sum(path.lstat().st_size for path in installed.rglob("*") if not path.is_dir()) / 1e6
            self._print(f"  done in {self._seconds():.0f} s: {installed.name} has {size:,.0f} MB")
        self._clear()

    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _draw(self, text: str) -> None:
        if self._tty:
            self._clear()
            print(f"{text[:78]}", end="", flush=True)
            self._drawn = True

    def _clear(self) -> None:
        if self._drawn:
            print("\r\x1b[2K", end="", flush=True)
            self._drawn = False

    def _print(self, text: str) -> None:
        self._clear()
        print(text, flush=True)


def asked(arguments: list[str]) -> str:
    """The packages that pyproject.toml names for these arguments, with the versions of constraints.txt."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for names in re.findall(r"\[([\w,]+)\]", " ".join(arguments)) for name in names.split(",")]
    optional = [each for extra in extras for each in project["optional-dependencies"][extra]]
    names = [re.split(r"[^\w.-]", each)[0] for each in [*project["dependencies"], *optional]]
    lines = (HERE / "constraints.txt").read_text(encoding="utf-8").splitlines()
    versions = {_normal(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}
    return ", ".join(" ".join([name, versions.get(_normal(name), "")]).strip() for name in dict.fromkeys(names))


def _normal(name: str) -> str:
    """The name of a package as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pass_on(errors: Iterable[str]) -> None:
    """Prints pip's errors and warnings, but for one that comes once per package: a directory of wheels lacks it."""
    for line in errors:
        if not MISSING.match(line):
            print(line, end="", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Installs, and returns pip's exit code."""
    where = Path(sys.prefix)
    print(f"first use: pip installs into {where.name}, in the versions that were tested (constraints.txt):")
    print(f"{textwrap.fill(asked(arguments), 100, initial_indent='  ', subsequent_indent='  ')},")
    print(f"  and what these need. Files of {LARGE:.0f} MB and more:", flush=True)
    options = ["--disable-pip-version-check", "--progress-bar", "off"]
    command = [sys.executable, "-m", "pip", "install", *options, *arguments]
    report = Report(tty=sys.stdout.isatty())
    piped = subprocess.PIPE
    with subprocess.Popen(command, stdout=piped, stderr=piped, encoding="utf-8", errors="replace") as pip:
        assert pip.stdout is not None
        assert pip.stderr is not None
        errors = threading.Thread(target=pass_on, args=(pip.stderr,))
        errors.start()
        for line in pip.stdout:
            report.line(line)
        errors.join()
    if pip.returncode == 0:
        report.end(where)
    return pip.returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
