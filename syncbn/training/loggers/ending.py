"""How a run has ended, as its loggers record it, and the interface of the loggers that record it."""

from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple


class Ending(NamedTuple):
    """How a run has ended.

    Attributes:
        run_dir: the run directory.
        status: finished, failed or interrupted.
        result: the contents of ``result.json``; None if the run has not finished.
    """

    run_dir: Path
    status: str
    result: dict[str, Any] | None = None

    def pictures(self) -> list[Path]:
        """The pictures in the run directory, by name."""
        return sorted(path for path in self.run_dir.glob("*.png") if path.is_file() and not path.is_symlink())

    def checkpoint(self) -> Path | None:
        """The best checkpoint of a run that has finished."""
        path = (self.result or {}).get("checkpoint")
        return Path(path) if path and Path(path).is_file() else None

    def numbers(self) -> dict[str, float]:
        """The numbers of ``result.json`` by their names there: ``monitored/val/acc``, ``seconds``."""
        found = dict[str, float]()
        for name, each in (self.result or {}).items():
            values = {f"{name}/{key}": value for key, value in each.items()} if isinstance(each, dict) else {name: each}
            found |= {key: value for key, value in values.items() if isinstance(value, int | float)}
        return found


class Store(ABC):
    """A logger of ours with a store that continues after a resume.

    A class of its own, since a custom logger may have methods ``resume`` and ``end`` with another meaning.
    """

    @abstractmethod
    def resume(self, step: int) -> None:
        """Bring the store to the state of ``metrics.csv`` before training continues at ``step``."""

    @abstractmethod
    def end(self, ending: Ending) -> None:
        """Log how the run has ended, and close the store."""


def about_model(ending: Ending, cfg: Any) -> dict[str, Any]:
    """What the best checkpoint is: metric and value, norm, epoch (from 0, as in the file) and test metrics."""
    result = ending.result or {}
    about: dict[str, Any] = {"norm": cfg.norm.name, "epoch": _epoch(ending.checkpoint())}
    for name, value in (result.get("monitored") or {}).items():
        about |= {"metric": name, "value": value}
    return about | (result.get("test") or {})


def _epoch(checkpoint: Path | None) -> int | None:
    import torch

    with suppress(Exception):  # of a file that another version wrote, or that is damaged
        loaded = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)  # type: ignore[arg-type]
        return int(loaded["epoch"])
    return None
