"""Reads weights for ``init_from`` from a run, a file, timm or torchvision."""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, strided

from syncbn.training.checkpoint import files
from syncbn.training.errors import SettingError
from syncbn.training.models import libraries
from syncbn.training.run_directory import paths

LIBRARY = re.compile(r"(timm|torchvision):(.+)")
SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".tar", ".safetensors")
NESTED = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
EXAMPLES = "use a run directory, a file, timm:resnet18 or torchvision:resnet18"


def located(source: str) -> str:
    """Checks ``init_from`` without reading weights, and returns it with the absolute path of the file.

    Of a run directory it is the best checkpoint, or the newest one if the run keeps no best.

    Raises:
        SettingError: there is no such file, run or network.
    """
    if not source:
        raise SettingError("init_from", "''", f"it is empty; {EXAMPLES}, or null")
    library = LIBRARY.fullmatch(source)
    if library is not None:
        package, name = library.groups()
        _renamed(libraries.check_name, package, name if package == "timm" else name.partition(".")[0])
        return source
    path = Path(source)
    if path.is_dir():
        return str(_of_run(path))
    if not paths.is_file(path):
        raise SettingError("init_from", source, f"there is no such file; {EXAMPLES}")
    if path.suffix == ".safetensors" and find_spec("safetensors") is None:
        raise SettingError("init_from", source, "there is no package safetensors here; pip install safetensors")
    if path.suffix not in SUFFIXES:
        raise SettingError("init_from", source, f"this is no file of weights ({', '.join(SUFFIXES)}); {EXAMPLES}")
    return str(path.absolute())


def read(source: str) -> dict[str, Tensor]:
    """Reads the weights of a source that :func:`located` has checked, with the names that they have there.

    Files are read with ``weights_only=True``, so they run no code.

    Raises:
        SettingError: the file cannot be read or holds no weights; or the weights cannot be downloaded.
    """
    library = LIBRARY.fullmatch(source)
    if library is not None:
        downloaded: dict[str, Tensor] = _renamed(libraries.pretrained_weights, *library.groups())
        return downloaded
    path = Path(source)
    try:
        found = _load(path)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise SettingError("init_from", source, f"no weights can be read from it ({reason})") from error
    weights = _weights(found)
    if not weights:
        raise SettingError("init_from", source, f"it holds no weights, neither alone nor under {', '.join(NESTED[:4])}")
    for name, each in weights.items():
        if each.layout != strided or each.is_meta or each.is_quantized:
            kind = "quantized" if each.is_quantized else "without data (meta)" if each.is_meta else "sparse"
            raise SettingError("init_from", source, f"the tensor {name} is {kind}; save dense tensors of numbers")
    return weights


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # type: ignore[import-not-found,unused-ignore]  # an optional package

        return load_file(path)
    try:
        return files.load(path)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return files.load_unmapped(path)  # torch's format before version 1.6 cannot be mapped


def _weights(found: Any, depth: int = 0) -> dict[str, Tensor]:
    """The tensors of a state dict, which may be below one of the usual keys; empty if there are none."""
    if not isinstance(found, Mapping) or depth > len(NESTED):  # a mapping may contain itself
        return {}
    for key in NESTED:
        if isinstance(inner := found.get(key), Mapping) and (weights := _weights(inner, depth + 1)):
            return weights
    return {str(name): each for name, each in found.items() if isinstance(each, Tensor)}


def _of_run(run_dir: Path) -> Path:
    """The best checkpoint of a run; without one the newest."""
    found = files.best(run_dir)
    if found is None:
        hint = f"this directory has no checkpoints/best.ckpt or last.ckpt, so it is no run that has trained; {EXAMPLES}"
        raise SettingError("init_from", run_dir, hint)
    return found.absolute()


def _renamed(function: Any, package: str, name: str) -> Any:
    """Calls a function whose errors are about ``model.name``; here the name is in ``init_from``."""
    try:
        return function(package, name)
    except SettingError as error:
        raise SettingError("init_from", f"{package}:{name}", error.hint) from error
