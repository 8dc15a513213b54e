"""The data sets to evaluate on: as ``--data`` names them, or those on which the run itself was trained."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from syncbn.training.errors import SettingError

OWN = "own data"
# The data sets of conf/data by class and name; only these are taken from the config.yaml of a run without trust.
KNOWN = {
    ("Digits", None): "digits",
    ("ImageFolder", None): "folder",
    ("ImageNet", None): "imagenet",
    ("MNIST", None): "mnist",
    ("CIFAR", "cifar10"): "cifar10",
    ("CIFAR", "cifar100"): "cifar100",
}
HOME = re.compile(r"syncbn\.training\.(data\.(\w+\.)?)?(\w+)")
# Settings that decide which images are tested. Size and normalization are in the checkpoint.
TAKEN = (
    *("root", "val_fraction", "test_fraction", "split_seed", "unreadable", "shards", "num_shards"),
    *("corruption", "severity", "corrupt_train", "test_images"),
)


class DataSet(NamedTuple):
    """A data set.

    Attributes:
        label: the head of its columns.
        overrides: the settings that choose it; None for the data of the run.
    """

    label: str
    overrides: list[str] | None


def parse(text: str) -> DataSet:
    """The data set of ``--data``: ``digits``, or settings with commas between: ``data=folder,data.root=DIR``.

    Raises:
        SettingError: a setting is not one of data.
    """
    parts: list[str] = []
    for part in _split(text):
        if "=" in part or not parts:
            parts.append(part if "=" in part else f"data={part}")
        else:
            parts[-1] += f",{part}"  # a comma within a value
    for each in parts:
        if not re.match(r"[+~]*data(\.[\w.]+)?=", each):
            hint = f"{each} is no setting of data; settings of all evaluations stand without --data"
            raise SettingError("--data", text, hint)
    if not any(each.startswith("data=") for each in parts):
        raise SettingError("--data", text, "name the data set first: --data=data=folder,data.root=DIR")
    label = ",".join(each.removeprefix("data=").removeprefix("data.") for each in parts)
    return DataSet(label, parts)


def of_run(settings: Mapping[str, Any], about: Mapping[str, Any], *, trust: bool) -> list[str]:
    """The settings that choose the data on which a run was trained.

    Args:
        settings: ``config.yaml`` of the run.
        about: ``run.json`` of the run.
        trust: whether a data set of the user's own is taken too, by the overrides of the run's command.

    Raises:
        SettingError: the run has other data than those of ``KNOWN``, and is not trusted; or its settings are unusable.
    """
    data = settings.get("data")
    data = data if isinstance(data, dict) else {}
    target, name = str(data.get("_target_")), data.get("name")
    match = HOME.fullmatch(target)
    group = KNOWN.get((match[3], name if match[3] == "CIFAR" else None)) if match else None
    if group is not None:
        taken = {key: data[key] for key in TAKEN if data.get(key) is not None}
        return [f"data={group}", *(f"{override(key, each)}" for key, each in taken.items())]
    overrides = about.get("overrides")
    if trust and isinstance(overrides, list):
        return [each for each in map(str, overrides) if re.match(r"[+~]*data(\.[\w.]+)?=", each)]
    hint = "its run has data of its own; name them with --data and --config-dir, or add --trust if you trust the run"
    raise SettingError("data._target_", target, hint)


def override(key: str, value: Any) -> str:
    """A setting of data as on the command line.

    Raises:
        SettingError: the value is an expression, which could read the environment, or no plain value.
    """
    if isinstance(value, bool | int | float):
        return f"data.{key}={str(value).lower()}"
    if not isinstance(value, str) or "${" in value:
        raise SettingError(f"data.{key}", value, "the run's config.yaml sets it to no plain value; use --data")
    return f"data.{key}={quoted(value)}"


def quoted(text: str | Path) -> str:
    """A value in quotes, as Hydra reads it: a backslash before a quote is one more, others are kept."""
    inner = re.sub(r"(\\*)'", lambda found: f"{found[1] * 2}\\'", str(text))
    inner = re.sub(r"(\\+)$", lambda found: found[1] * 2, inner)
    return f"'{inner}'"


def _split(text: str) -> Sequence[str]:
    """The parts between commas that are in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [each.strip() for each in parts if each.strip()]
