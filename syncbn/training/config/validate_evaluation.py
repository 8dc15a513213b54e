"""Checks the settings of tests and measurements: which tests need others, and which cannot be combined."""

from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import Any

from omegaconf import DictConfig, OmegaConf

from syncbn.training.config.plan import Plan
from syncbn.training.config.ranges.targets import TARGETS
from syncbn.training.errors import SettingError, as_typed

LOGGED = ("acc", "loss", "count")  # the names of what a Classifier logs of validation or test


def check(plan: Plan) -> None:
    """Refuses measurements that are not possible, or that would change the result of another one.

    Raises:
        SettingError: for the first setting that cannot work.
    """
    cfg = plan.cfg
    _check_precise(cfg)
    _check_corruptions(cfg)
    if cfg.fit and not cfg.test:
        raise SettingError("fit", True, "test=false leaves no test to compare with; use test=true")
    _check_target(cfg)
    _check_metrics(cfg)
    if cfg.mode == "test":
        _check_test(cfg)
    if cfg.get("adapt") is not None:
        _check_adapt(cfg)


def target_monitor(cfg: DictConfig) -> str:
    """The name of the validation accuracy that ``target`` refers to."""
    return str(OmegaConf.select(cfg, "callbacks.checkpoint.monitor") or "val/acc")


def _check_precise(cfg: DictConfig) -> None:
    batches = cfg.precise_batches
    if batches and not cfg.test:
        raise SettingError("precise_batches", batches, "test=false leaves no test to repeat; use test=true")
    if batches and cfg.norm.name in ("none", "group_norm"):
        hint = f"norm={cfg.norm.name} leaves no batch norm to measure; use norm=sync or local, or precise_batches=0"
        raise SettingError("precise_batches", batches, hint)


def _check_corruptions(cfg: DictConfig) -> None:
    if not cfg.corruptions:
        return
    if not cfg.test:
        hint = "test=false leaves no test to repeat; use test=true, or corruptions=null"
        raise SettingError("corruptions", hint=hint)
    if cfg.data.get("corruption") is not None:
        hint = f"data.corruption={cfg.data.corruption} corrupts the images of the test already; use "
        raise SettingError("corruptions", hint=f"{hint}data.corruption=null, or corruptions=null")


def _check_target(cfg: DictConfig) -> None:
    if cfg.target is not None and OmegaConf.select(cfg, "callbacks.checkpoint.mode") == "min":
        hint = f"callbacks.checkpoint.monitor={target_monitor(cfg)} is better the lower it is "
        hint += "(callbacks.checkpoint.mode=min), and no accuracy; use target=null"
        raise SettingError("target", cfg.target, hint)


def _check_metrics(cfg: DictConfig) -> None:
    metrics = cfg.get("metrics")
    if metrics is not None and not isinstance(metrics, DictConfig):
        hint = "choose metrics by name: metrics=[top5,f1], or add one: +metrics.NAME._target_=torchmetrics.CLASS"
        raise SettingError("metrics", metrics, hint)
    for key, node in (metrics or {}).items():
        name = str(key)
        if not isinstance(node, DictConfig) or node.get("_target_") is None:
            hint = f"a metric has a class: +metrics.{name}._target_=torchmetrics.CLASS"
            raise SettingError(f"metrics.{name}", node, hint)
        if name in LOGGED and OmegaConf.select(cfg, "module._target_") == "syncbn.training.Classifier":
            hint = f"the module logs val/{name} or test/{name}, which it would replace; use another name"
            raise SettingError(f"metrics.{name}", hint=hint)
        _check_torchmetrics(f"metrics.{name}", node)
        most, classes = node.get("top_k"), node.get("num_classes")
        if isinstance(most, int) and isinstance(classes, int) and most > 1 and most >= classes:
            hint = f"of {classes} classes every one is among the first {most}; leave it out, or use "
            raise SettingError("metrics", name, f"{hint}metrics.{name}.top_k={max(1, classes - 1)} or less")


def _check_torchmetrics(setting: str, node: DictConfig) -> None:
    """Refuses a class that torchmetrics does not have, or whose arguments are others.

    The built-in ones are not checked, since the import takes a second.
    """
    target = str(node.get("_target_"))
    module, _, name = target.rpartition(".")
    if target in TARGETS or module.partition(".")[0] != "torchmetrics":
        return
    try:
        found = import_module(module)
    except ImportError:
        found = import_module("torchmetrics")
    if not hasattr(found, name):
        names = [each for each in dir(found) if each[0].isupper()]
        near = get_close_matches(name, names, n=1, cutoff=0.5)
        works = f"the nearest is {found.__name__}.{near[0]}" if near else "see torchmetrics' documentation"
        raise SettingError(f"{setting}._target_", target, f"torchmetrics has no such class; {works}")
    _check_arguments(setting, getattr(found, name), node)


def _check_arguments(setting: str, kind: Any, node: DictConfig) -> None:
    """The metric is not made: some classes load weights then."""
    given = {str(key) for key in node if not str(key).startswith("_")}
    found = {} if node.get("_args_") else dict(signature(kind).parameters)
    for name, each in found.items():
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD and name not in given:
            hint = f"it needs the argument {name}; add +{setting}.{name}=..."
            raise SettingError(f"{setting}._target_", node.get("_target_"), hint)


def _check_test(cfg: DictConfig) -> None:
    if cfg.ckpt_path is None:
        hint = "mode=test tests a checkpoint; use ckpt_path=outputs/RUN/checkpoints/best.ckpt"
        raise SettingError("ckpt_path", None, hint)
    if not cfg.test:
        raise SettingError("test", False, "mode=test leaves nothing else to do; use test=true")
    if cfg.target is not None:
        raise SettingError("target", cfg.target, "mode=test trains nothing that could reach it; use target=null")


def _check_adapt(cfg: DictConfig) -> None:
    if not cfg.test:
        raise SettingError("adapt", hint="test=false leaves no test to adapt in; use test=true, or adapt=null")
    if cfg.norm.name in ("none", "group_norm"):
        hint = f"norm={cfg.norm.name} leaves no batch norm to adapt; use norm=sync or local, or adapt=null"
        raise SettingError("adapt", hint=hint)
    if cfg.corruptions:
        hint = "corruptions adapts itself, also by corruptions.prior; use adapt=null, or no suite"
        raise SettingError("adapt", hint=hint)
    for name, value, without in (("precise_batches", cfg.precise_batches, 0), ("fit", cfg.fit, "false")):
        if value:
            hint = f"{name}={as_typed(value)} repeats the test with other statistics or images, which adapting would "
            raise SettingError("adapt", hint=f"{hint}hide; use {name}={without}, or adapt=null")
