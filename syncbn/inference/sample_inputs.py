"""Takes a few test images of a run, as its network gets them, to compare an exported network on."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.inference.network import find_own_files
from syncbn.inference.preprocessing import CIFARS, DIGITS, FOLDERS, IMAGENETS, MNISTS, Preprocessing
from syncbn.inference.trained import Trained
from syncbn.training.data.images import listing
from syncbn.training.errors import SettingError
from syncbn.training.models.build import build

# Settings of syncbn's data modules that decide which images are in the test. Only these are used.
SPLIT = ("name", "val_fraction", "test_fraction", "split_seed", "test_images", "corruption", "severity", "num_classes")


def images(trained: Trained, count: int, *, trust: bool) -> Tensor:
    """The first test images of the run, preprocessed, of shape ``(N, ...)`` with N up to ``count``.

    Args:
        trained: the run.
        count: how many.
        trust: whether a data module of the user's own, which the run's ``config.yaml`` names, may be called.

    Raises:
        SettingError: the data module is not trusted, or the data are not there.
        OSError: an image cannot be read.
    """
    found = trained.settings.get("data")
    data = found if isinstance(found, dict) else {}
    target = data.get("_target_")
    for name, value in data.items() if not trust else ():
        if isinstance(value, str) and "${" in value:  # it would be resolved, and could show an environment variable
            raise SettingError(f"data.{name}", value, "the run's config.yaml sets it, and it is no value")
    if target in DIGITS | CIFARS | MNISTS:
        return _in_memory(trained, data, count)
    if target in FOLDERS | IMAGENETS and trained.preprocessing is not None:
        paths = _of_folder(data, count) if target in FOLDERS else _of_imagenet(data, count)
        return _stacked(trained.preprocessing, paths)
    if not trust:
        hint = "its data module is not one of syncbn's; --trust calls it, for real test images"
        raise SettingError("data._target_", target, hint)
    find_own_files(trained.run_dir, trained.settings)
    return _of_module(build({name: each for name, each in data.items() if name != "global_batch_size"}), count)


def _in_memory(trained: Trained, data: Mapping[str, Any], count: int) -> Tensor:
    arguments = {name: data[name] for name in SPLIT if data.get(name) is not None}
    target = {"_target_": data["_target_"], "batch_size": count}
    if data["_target_"] in DIGITS:
        module = build(target | arguments)
    else:
        known = trained.preprocessing
        if known is None:
            raise SettingError("data", hint="the checkpoint has no mean and std of its images")
        statistics = {"mean": list(known.mean), "std": list(known.std)}
        module = build(target | arguments | statistics | {"root": data.get("root")})
    return _of_module(module, count)


def _of_module(module: Any, count: int) -> Tensor:
    module.prepare_data()
    module.setup("test")
    batch = next(iter(module.test_dataloader()))
    x = batch[0] if isinstance(batch, list | tuple) else batch
    if not isinstance(x, Tensor):
        hint = f"a batch of its test begins with a {type(x).__name__}, not a tensor"
        raise SettingError("data._target_", f"{type(module).__module__}.{type(module).__name__}", hint)
    return x[:count].clone()


def _of_folder(data: Mapping[str, Any], count: int) -> list[str]:
    shares = data.get("val_fraction", 0.1), data.get("test_fraction", 0.1)
    files = listing.find(data.get("root"), *shares, data.get("split_seed", 0)).parts["test"]
    return [path for path, _ in files[:: max(len(files) // count, 1)][:count]]


def _of_imagenet(data: Mapping[str, Any], count: int) -> list[str]:
    root = Path(str(data.get("root"))) / "val"
    if not root.is_dir():
        raise SettingError("data.root", data.get("root"), "there is no folder val in it")
    return list(islice(_one_of_each_class(root), count))


def _one_of_each_class(root: Path) -> Iterator[str]:
    for folder in sorted(root.iterdir()):
        found = (each for each in sorted(folder.glob("*")) if each.suffix.lower() in listing.SUFFIXES)
        yield from (str(each) for each in islice(found, 1))


def _stacked(preprocessing: Preprocessing, paths: list[str]) -> Tensor:
    if not paths:
        raise SettingError("data.root", hint="it has no test images")
    return torch.stack([preprocessing(path) for path in paths])
