"""Journal of the metrics passed to W&B, ``wandb-lines.jsonl``, from which a resumed run finds the ones that were lost.

W&B's own process buffers lines (for seconds before it sends them, up to 32 kB before it writes them), and it ends when
its rank is killed. Lines passed to W&B may therefore be lost. The journal is written before W&B gets a line, and a
resumed run compares it with the lines that W&B has.
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
    """The journal of a run, with the lines of all its attempts.

    Args:
        run_dir: the run directory; the file is in it.
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
        whole = text[: text.rfind("\n") + 1]  # without an incomplete last line
        return [line for line in map(_line, whole.split("\n")) if line is not None]

    def arrived(self, on_server: int | None) -> tuple[set[tuple[int, str]], int]:
        """Remove the lines that W&B does not have from the journal, and return those that it has.

        Args:
            on_server: the first line number that the server does not have; None if the server was not asked. Without
                it, lines logged online count as arrived. So do lines of a directory that was removed
                (``wandb clean``): a missing point is better than a duplicate one.

        Returns:
            The pairs of training step and metric that W&B has, and the first free line number.
        """
        ends = {d.name: _end(d) for d in wandb_files.directories(self._run_dir) if wandb_files.is_offline(d)}
        lines, arrived = self.lines(), []
        for line in lines:
            online = math.inf if on_server is None else on_server
            end = online if not wandb_files.is_offline(Path(line.directory)) else ends.get(line.directory, math.inf)
            if line.number < end:
                arrived.append(line)
        if lines:
            with replacing(self.path) as draft:
                draft.write_text("".join(json.dumps(line) + "\n" for line in arrived), encoding="utf-8")
        free = max([on_server or 0, *ends.values(), *(line.number + 1 for line in arrived)])
        return {(line.step, name) for line in arrived for name in line.names}, free


def _line(text: str) -> Line | None:
    """Parse one line; None if it is damaged: W&B then gets a point twice, but the run can resume."""
    try:
        directory, number, step, names = json.loads(text)
        return Line(str(directory), int(number), int(step), [str(name) for name in names])
    except (ValueError, TypeError):
        return None


def _end(directory: Path) -> int:
    """The first line number that the log of an offline attempt does not have."""
    return max((line[wandb_internals.NUMBER] + 1 for line in wandb_internals.history(directory)), default=0)
