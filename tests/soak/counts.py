"""What the ``prove-*`` programs share: how often each thing was tried, and how often it held."""

import os
import re
import subprocess
import sys
from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table


class Proof:
    """A table of what was tried, N of N.

    Args:
        name: of the program.
        seed: which repeats it.
    """

    def __init__(self, name: str, seed: int) -> None:
        self._name, self._seed = name, seed
        self._tried: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        print(f"seed {seed}", flush=True)

    def note(self, what: str, held: bool) -> None:
        self._tried[what] += 1
        self._held[what] += held

    def pytest(self, *arguments: str, **environment: str) -> None:
        """Runs tests, and notes each by its name; what is printed of those that fail is printed."""
        command = [sys.executable, "-m", "pytest", *arguments, "-q", "-rA", "--tb=short", "-p", "no:cacheprovider"]
        printed = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, encoding="utf-8"
        ).stdout
        found = re.findall(r"^(PASSED|FAILED|ERROR) \S+::test_([^\s\[]+)", printed, re.MULTILINE)
        for word, name in found:
            self.note(name.replace("_", " "), word == "PASSED")
        if not found or any(word != "PASSED" for word, _ in found):
            print(printed, flush=True)
        if not found:
            self.note("pytest", False)

    def end(self) -> None:
        """Prints the table, and ends the program with code 0 if all held."""
        table = Table("what", "held", box=box.HORIZONTALS)
        for what in self._tried:
            table.add_row(what, f"{self._held[what]} of {self._tried[what]}")
        Console(width=110).print(table)
        print(f"{self._name}: {self._held.total()} of {self._tried.total()} held (seed {self._seed})")
        sys.exit(self._held != self._tried)
