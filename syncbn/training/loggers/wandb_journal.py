"""Which lines were handed to W&B: ``wandb-lines.jsonl`` in the run directory, written before W&B gets them.

W&B's own process keeps lines for a while (seconds before it sends them, 32 kB before it writes them), and ends with a
rank that is killed. So what was handed over need not have arrived, and a run that goes on has to find out.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from syncbn.training.atomic_write import replacing
from syncbn.training.loggers import wandb_files, wandb_internals


class Line(NamedTuple):
    """One line of W&B's history: its attempt's directory, its number (``_step``), the training step, the metrics."""

    directory: str
    number: int
    step: int
    names: list[str]


class Journal:
    """The lines of all attempts at a run.

    Args:
        run_dir: where the file lies.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self.path = run_dir, run_dir / "wandb-lines.jsonl"

    def add(self, line: Line) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[Line]:
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]  # without a line that was written by half
        return [line for line in map(_line, whole.split("\n")) if line is not None]

    def arrived(self, on_server: int | None) -> tuple[set[tuple[int, str]], int]:
        """Forgets the lines that did not arrive.

        Args:
            on_server: the first number that the server has not got; None where it was not asked. Then what was handed
                over online counts as arrived, as does what was kept in a directory that is gone (``wandb clean``):
                better a point that is missing than one that is there twice.

        Returns:
            pairs of a training step and a metric that W&B has, and the first number that is free.
        """
        ends = {d.name: _end(d) for d in wandb_files.directories(self._run_dir) if wandb_files.is_offline(d)}
        lines, ours = self.lines(), []
        for line in lines:
            online = math.inf if on_server is None else on_server
            end = online if not wandb_files.is_offline(Path(line.directory)) else ends.get(line.directory, math.inf)
            if line.number < end:
                ours.append(line)
        if lines:
            with replacing(self.path) as draft:
                draft.write_text("".join(json.dumps(line) + "\n" for line in ours), encoding="utf-8")
        free = max([on_server or 0, *ends.values(), *(line.number + 1 for line in ours)])
        return {(line.step, name) for line in ours for name in line.names}, free


def _line(text: str) -> Line | None:
    """None for a line that is damaged: better a point that W&B gets twice than a run that cannot go on."""
    try:
        directory, number, step, names = json.loads(text)
        return Line(str(directory), int(number), int(step), [str(name) for name in names])
    except (ValueError, TypeError):
        return None


def _end(directory: Path) -> int:
    return max((line[wandb_internals.NUMBER] + 1 for line in wandb_files.history(directory)), default=0)
