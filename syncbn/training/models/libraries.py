"""Networks of timm and torchvision by their names. The packages are imported when a network is built."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.training.config.trust import BY_NAME
from syncbn.training.errors import SettingError
from syncbn.training.vision_packages import install_command

INSTALL = f"install it: {install_command()}"
COLOURS = 3  # channels of the images that the networks of these packages were made for
REGISTERED = re.compile(r"^@register_model\b.*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


def timm_network(
    name: str, num_classes: int = 10, in_channels: int = COLOURS, *, pretrained: bool = False, **arguments: Any
) -> nn.Module:
    """Return a network of timm with one output per class.

    Args:
        name: as in ``timm.list_models()``; a tag may follow, which names its weights (``resnet18.a1_in1k``).
        num_classes: number of outputs.
        in_channels: channels of the images. Pretrained weights of the first layer are summed or repeated for another
            number than 3.
        pretrained: whether to begin with the weights that timm has for this name.
        arguments: further arguments of ``timm.create_model``.

    Raises:
        SettingError: there is no such network, its weights cannot be loaded, or it has no such argument.
    """
    timm = _imported("timm")
    check_name("timm", name)
    try:
        network: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels, **arguments
        )
    except Exception as error:
        raise _refused(name, pretrained, error) from error
    return network


def torchvision_network(
    name: str, num_classes: int = 10, in_channels: int = COLOURS, *, pretrained: bool = False, **arguments: Any
) -> nn.Module:
    """Return a classification network of torchvision with one output per class.

    Args:
        name: as in ``torchvision.models.list_models()``.
        num_classes: number of outputs.
        in_channels: channels of the images. For another number than 3 the first convolution is replaced, with
            pretrained weights summed or repeated.
        pretrained: whether to begin with the newest weights that torchvision has for this name.
        arguments: further arguments of the network.

    Raises:
        SettingError: there is no such network, its weights cannot be loaded, or it has no such argument.
    """
    models = _imported("torchvision").models
    check_name("torchvision", name)
    try:
        network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **arguments)
        if in_channels != COLOURS:
            _replace_first_convolution(network, in_channels)
        if pretrained:
            load_fitting(network, pretrained_weights("torchvision", name))
    except SettingError:
        raise
    except Exception as error:
        raise _refused(name, pretrained, error) from error
    return network


def check_name(package: str, name: Any) -> None:
    """Refuse a name that the package has no classification network for.

    The names are read from the source files of the package, which takes 50 ms. Its import takes seconds, and is needed
    only for a name of weights that is not found there.

    Raises:
        SettingError: the package is not installed, or it has no such network; the hint has the nearest names.
    """
    if find_spec(package) is None:
        raise SettingError("model", package, f"there is no package {package} here; {INSTALL}")
    source = _source(package)
    names = REGISTERED.findall(source)
    wanted, _, tag = str(name).partition(".") if package == "timm" else (str(name), "", "")
    if wanted in names and (not tag or f"'{name}'" in source or f'"{name}"' in source):
        return
    if tag and wanted in names:
        tags = _imported("timm").list_models(f"{wanted}.*", pretrained=True)
        if name in tags:  # a few are put together by code
            return
        what = f"timm has no such weights; there are {', '.join(tags)}" if tags else "timm has no weights for it"
        raise SettingError("model.name", name, f"{what}, or {wanted} without any")
    near = get_close_matches(wanted, names, n=3, cutoff=0.5) or get_close_matches(wanted, names, n=3, cutoff=0.0)
    raise SettingError("model.name", name, f"{package} has no such network; the nearest are {', '.join(near)}")


def check(model: Any) -> None:
    """Check the name of a network of timm or torchvision in the settings ``model``.

    Raises:
        SettingError: as :func:`check_name`.
    """
    package = BY_NAME.get(str(model.get("_target_"))) if isinstance(model, Mapping) else None
    if package is not None:
        check_name(package, model.get("name"))


def pretrained_weights(package: str, name: str, **arguments: Any) -> dict[str, Tensor]:
    """The pretrained weights of a network: ``resnet18``, or with the name of the weights ``resnet18.a1_in1k``.

    Raises:
        SettingError: there is no such network or no such weights, or they cannot be loaded.
    """
    library, (architecture, _, tag) = _imported(package), name.partition(".")
    check_name(package, name if package == "timm" else architecture)
    try:
        if package == "timm":
            state = library.create_model(name, pretrained=True, **arguments).state_dict()
        else:
            weights = library.models.get_model_weights(architecture)
            state = (weights[tag] if tag else weights.DEFAULT).get_state_dict(progress=False, check_hash=True)
    except Exception as error:
        raise _refused(name, True, error) from error
    return dict(state)


def load_fitting(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the weights whose names and shapes fit; those of the first convolution are adapted to its input channels."""
    own = network.state_dict()
    adapted = {name: adapted_input(each, own[name]) for name, each in weights.items() if name in own}
    network.load_state_dict(
        {name: each for name, each in adapted.items() if each.shape == own[name].shape}, strict=False
    )


def adapted_input(weight: Tensor, to: Tensor) -> Tensor:
    """The weight of a first convolution for images with another number of channels; any other weight unchanged.

    For grey images the weights of the colours are summed: the output is that for a colour image of equal channels. For
    other numbers they are repeated and scaled, so that the output keeps its size.
    """
    channels = to.shape[1] if to.dim() == weight.dim() == 4 else COLOURS
    if channels == COLOURS or weight.dim() != 4 or weight.shape[1] != COLOURS or weight.shape[::2] != to.shape[::2]:
        return weight
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, -(-channels // COLOURS), 1, 1)[:, :channels] * (COLOURS / channels)


def _replace_first_convolution(network: nn.Module, in_channels: int) -> None:
    """Replace the first convolution by one for another number of channels, initialized as in He et al. 2015."""
    name, old = next((name, each) for name, each in network.named_modules() if isinstance(each, nn.Conv2d))
    settings: Any = {name: getattr(old, name) for name in ("kernel_size", "stride", "padding")}
    new = nn.Conv2d(in_channels, old.out_channels, **settings, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, new)


@cache
def _source(package: str) -> str:
    """The source code of the networks of a package, read without an import."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "models"
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py")))


def _imported(package: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise SettingError("model", package, f"there is no package {package} here; {INSTALL}") from None
    except (ImportError, OSError, RuntimeError) as error:  # torchvision beside another build of torch
        what = " ".join(str(error).split())[:100]
        hint = f"the package cannot be imported beside torch {torch.__version__} ({what}); install the build for it"
        raise SettingError("model", package, hint) from error


def _refused(name: str, pretrained: bool, error: Exception) -> SettingError:
    """The error of a network that could not be built, or whose weights could not be loaded."""
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if isinstance(error, TypeError) or not pretrained:
        return SettingError("model.name", name, f"the network refuses its arguments ({what})")
    return SettingError("model.pretrained", True, f"the weights of {name} cannot be loaded ({what}); use false")
