"""Keeps a logger that fails, because its server is gone or its disk is full, from ending the training."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from lightning.pytorch.loggers import Logger

from syncbn.training.console import print_line

METHODS = ("log_metrics", "log_hyperparams", "log_graph", "save", "after_save_checkpoint", "finalize")
Kind = TypeVar("Kind", bound=Logger)


def guarded(logger: Kind, name: str, more: tuple[str, ...] = ()) -> Kind:
    """Make the methods of a logger print one warning when the first of them raises, and do nothing from then on.

    Args:
        logger: Lightning's or a custom one. It stays of its class, which user code may ask for.
        name: of its settings, for the warning.
        more: further methods, beside those of Lightning's loggers.
    """
    failed: list[str] = []
    for method in (*METHODS, *more):
        setattr(logger, method, _guarded(getattr(logger, method), name, failed))
    return logger


def _guarded(method: Callable[..., Any], name: str, failed: list[str]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        if failed:
            return None
        try:
            return method(*arguments, **options)
        except Exception as error:
            failed.append(name)
            warn(name, error)
            return None

    return call


def warn(name: str, error: BaseException) -> None:
    """Print that a logger has failed, in one line."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    print_line(f"logger {name} failed and gets no more metrics; training continues, metrics.csv has all ({reason})",
               error=True)  # fmt: skip
