"""Refuses a monitored metric that the module never logs, before training: Lightning fails after the first epoch.

Which metrics a module logs is read from the source of its class: the names in its calls of ``self.log`` and
``self.log_dict``. A name that code computes may be any, so nothing is refused then. A validation batch before training
would find less: not the metrics of the training step, and it would move random states and running statistics.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import lightning.pytorch as pl
from hydra.utils import get_object
from omegaconf import DictConfig

from syncbn.training.errors import AgreedError, SettingError
from syncbn.training.metrics.evaluation_metrics import EvaluationMetrics

FORKED = r"(_step|_epoch)?(/dataloader_idx_\d+)?"  # what Lightning 2.6 appends to a name
OWN_NAMES = ("epoch", "step")  # that ModelCheckpoint adds itself
LEARNING_RATE = "lr-"  # how the names begin that LearningRateMonitor logs
OTHER_LOGS = ("math", "torch", "np", "numpy", "jnp", "logging")  # modules with a log() of their own
LIBRARIES = ("lightning", "pytorch_lightning", "torch", "torchmetrics", "builtins", "abc", "typing")
SAFE = ("isinstance", "super", "type", "id", "len", "repr", "issubclass", "hasattr")  # functions that log nothing


def check(module: pl.LightningModule, callbacks: Sequence[pl.Callback], settings: DictConfig | None) -> None:
    """Checks the metrics that callbacks monitor.

    Args:
        module: that is trained.
        callbacks: of the trainer, which may log too.
        settings: ``callbacks`` of the run; those with a ``monitor`` are checked.

    Raises:
        AgreedError: no line of the module's code logs such a metric; every rank raises it.
    """
    monitors = {name: node.get("monitor") for name, node in (settings or {}).items() if _wants_metric(node)}
    asked = {str(name): monitor for name, monitor in monitors.items() if isinstance(monitor, str)}
    if not asked:
        return
    parts = [each for each in module.modules() if isinstance(each, pl.LightningModule)]
    named = [each for each in callbacks if isinstance(each, EvaluationMetrics)]  # what they log is known
    names = set().union(*(each.names for each in named))
    classes = [type(each) for each in [*parts, *(each for each in callbacks if each not in named)]]
    missing = {name: monitor for name, monitor in asked.items() if not _is_logged(monitor, names)}
    for found in logged(classes) if missing else ():
        if found is None:
            return
        names |= found
        missing = {name: monitor for name, monitor in missing.items() if not _is_logged(monitor, found)}
        if not missing:  # to parse the other classes takes 10 ms each
            return
    for name, monitor in missing.items():
        raise AgreedError(f"callbacks.{name}.monitor", monitor, _hint(name, monitor, names))


def _is_logged(monitor: str, names: set[str]) -> bool:
    if monitor in OWN_NAMES or monitor.startswith(LEARNING_RATE):
        return True
    return any(re.fullmatch(_pattern(each) + FORKED, monitor) for each in names)


def _wants_metric(node: Any) -> bool:
    """Whether ``monitor`` of this callback is a metric; in a class of the user's it may be anything."""
    if not isinstance(node, DictConfig):
        return False
    try:
        kind = get_object(str(node.get("_target_")))
    except Exception:  # of the import; instantiating it reports it
        return False
    return isinstance(kind, type) and issubclass(kind, pl.callbacks.ModelCheckpoint | pl.callbacks.EarlyStopping)


def explained(error: Exception, settings: DictConfig | None, metrics: Iterable[str]) -> SettingError | None:
    """The error of a metric that was not logged in the first epoch, where the source did not show it; None for others.

    Args:
        error: that Lightning raised.
        settings: ``callbacks`` of the run.
        metrics: the names that were logged.
    """
    found = re.search(r"monitor='?([^')]+)'?\)?`? could not find the monitored key", str(error))
    for name, node in (settings or {}).items():
        if found and isinstance(node, DictConfig) and node.get("monitor") == found[1]:
            return AgreedError(f"callbacks.{name!s}.monitor", found[1], _hint(str(name), found[1], set(metrics)))
    return None


def _hint(name: str, monitor: str, names: set[str]) -> str:
    if not names:
        return f"the module logs no metric; log one with self.log(), or use callbacks.{name}.monitor=null"
    stage = monitor.partition("/")[0] if "/" in monitor else "val"
    filled = sorted({re.sub(r"{.*?}", stage, each, count=1) for each in names})
    usable = [each for each in filled if "{" not in each and not each.startswith("test")]
    near = get_close_matches(monitor, usable, n=1, cutoff=0.4) or usable[:1] or ["NAME"]
    works = near[0]
    more = f" callbacks.{name}.mode=min" if "loss" in works else ""
    return f"the module does not log it, but {', '.join(usable or filled)}; use callbacks.{name}.monitor={works}{more}"


def logged(classes: Iterable[type]) -> Iterator[set[str] | None]:
    """The names of the metrics that the code of these classes and their bases logs, one class after the other.

    Yields:
        The names of a class, of which a part in braces may be any text; None if its code does not show them all.
    """
    for kind in dict.fromkeys(base for each in classes for base in each.__mro__):
        if kind.__module__.partition(".")[0] not in LIBRARIES:
            yield _logged_by(kind)


def _logged_by(kind: type) -> set[str] | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return None
    names, called = set[str](), set[ast.AST]()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if _hands_over_self(call) and not kind.__module__.startswith("syncbn."):
            return None  # the function that gets the module may log
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("log", "log_dict"):
            called.add(call.func)
            found = _of_call(call)
            if found is None:
                return None
            names |= found
    others = (each for each in ast.walk(tree) if isinstance(each, ast.Attribute) and each.attr in ("log", "log_dict"))
    return None if any(each not in called and not _is_other(each) for each in others) else names


def _hands_over_self(call: ast.Call) -> bool:
    function = call.func.id if isinstance(call.func, ast.Name) else ""
    values = [*call.args, *(each.value for each in call.keywords)]
    return function not in SAFE and any(
        isinstance(each, ast.Name) and each.id in ("self", "pl_module") for each in values
    )


def _is_other(function: ast.Attribute) -> bool:
    """Whether this is ``math.log``, or ``log`` of a logger: ``self.logger.experiment.log``."""
    receiver = ast.unparse(function.value)
    return receiver in OTHER_LOGS or "logger" in receiver or "experiment" in receiver or "wandb" in receiver


def _of_call(call: ast.Call) -> set[str] | None:
    assert isinstance(call.func, ast.Attribute)
    if _is_other(call.func):
        return set()
    keywords: dict[str | None, Any] = {each.arg: each.value for each in call.keywords}
    first = call.args[0] if call.args else keywords.get("name", keywords.get("dictionary"))
    if call.func.attr == "log":
        found = [_name(first)]
    elif isinstance(first, ast.Dict):
        found = [_name(each) for each in first.keys]
    else:
        return None
    return None if None in found else set(filter(None, found))


def _name(node: ast.AST | None) -> str | None:
    """The name of a metric, with ``{...}`` for what code computes; None if all of it may be computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if not isinstance(node, ast.JoinedStr):
        return None
    name = "".join(_part(each) for each in node.values)
    return name if re.sub(r"{.*?}", "", name) else None


def _part(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return f"{{{ast.unparse(node.value) if isinstance(node, ast.FormattedValue) else ''}}}"


def _pattern(name: str) -> str:
    return "".join(_escaped(name))


def _escaped(name: str) -> Iterator[str]:
    for part in re.split(r"({.*?})", name):
        yield ".*" if part.startswith("{") else re.escape(part)
