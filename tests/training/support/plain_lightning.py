"""For tests in plain Lightning: a Trainer that is quiet, a logger that keeps what it is given, ranks as of torchrun."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import Logger

# What a run leaves out too.
QUIET = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*(LeafSpec|treespec)",
    "ignore:.*is smaller than the logging interval",
)


def quiet_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(**{"accelerator": "cpu", "devices": 1} | quiet | options, callbacks=list(callbacks))


class Kept(Logger):
    """Keeps what it is given."""

    name = version = ""

    def __init__(self, directory: str = "") -> None:
        super().__init__()
        self.given: list[tuple[int | None, dict[str, float]]] = []
        self._directory = directory

    @property
    def save_dir(self) -> str:
        return self._directory

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.given.append((step, metrics))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextmanager
def as_of_torchrun(rank: int, world_size: int, port: int) -> Iterator[None]:
    """The environment in which Lightning uses the process group that is there."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "GROUP_RANK": 0, "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (names | {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost"}).items():
            patch.setenv(name, str(value))
        yield
