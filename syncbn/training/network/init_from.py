"""Implements the setting ``init_from``: a network begins with the weights of another training."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import NamedTuple

from torch import Tensor, nn

from syncbn.training.errors import SettingError
from syncbn.training.models.libraries import adapted_input
from syncbn.training.network import weights_source
from syncbn.training.network.names import SHOWN

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # of torch.compile and FSDP's activation checkpointing
COUNTERS = ("n_averaged", "num_batches_tracked")  # are no weights
FITS = 0.5  # the share of the weight matrices, of the source or of the network, below which it is another architecture


class Fit(NamedTuple):
    """Which weights of a source fit a network, by the names that the network has for them."""

    weights: dict[str, Tensor]
    adapted: list[str]  # of the first convolution, for another number of input channels
    missing: list[str]
    unexpected: list[str]
    other_shape: list[str]


def load(module: nn.Module, source: str, report: Callable[[str], None]) -> None:
    """Load the weights of a source into a LightningModule, without optimizer and counters.

    Weights with another shape are left as they were initialized, for example a head for another number of classes.

    Args:
        module: changed in place.
        source: as :func:`syncbn.training.network.weights_source.located` returns it.
        report: called with a line that lists what did not fit.

    Raises:
        SettingError: the source cannot be read, or is of another architecture.
    """
    weights = weights_source.read(source)
    own = module.state_dict()
    fit = fitted(weights, own)
    mine, theirs = _matrices(own), _matrices(weights)
    share = max(len(_matrices(fit.weights)) / max(len(each), 1) for each in (mine, theirs))
    if share < FITS or not fit.weights:
        hint = f"it is of another architecture: {len(fit.weights)} of {len(own)} tensors fit ({differences(fit)})"
        raise SettingError("init_from", source, hint)
    module.load_state_dict(fit.weights, strict=False)
    report(f"init_from={source}: {len(fit.weights)} of {len(own)} tensors loaded; {differences(fit)}")


def fitted(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Fit:
    """Match weights to those of a network by name and shape, with the prefixes that match most.

    ``module.conv1.weight``, ``network._orig_mod.conv1.weight`` and ``conv1.weight`` are the same weight.
    """
    clean = {unwrapped(name): each for name, each in weights.items()}
    pairs = product(_prefixes(clean), _prefixes(own))
    fits = (_fitted(_below(clean, theirs), _below(own, mine), own, mine) for theirs, mine in pairs)
    return max(fits, key=lambda fit: len(fit.weights))


def differences(fit: Fit) -> str:
    """What did not fit, in a few words: up to three names of each kind."""
    kinds = (
        ("missing", fit.missing),
        ("unexpected", fit.unexpected),
        ("other shape, left as initialized", fit.other_shape),
        ("adapted to the input channels", fit.adapted),
    )
    return "; ".join(f"{kind}: {_some(names)}" for kind, names in kinds if names) or "all fit"


def _fitted(theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor], own: Mapping[str, Tensor], prefix: str) -> Fit:
    fit = Fit({}, [], [f"{name}" for name in own if not name.startswith(prefix) and not _counts(name)], [], [])
    for name, now in mine.items():
        if name not in theirs:
            if not _counts(name):
                fit.missing.append(prefix + name)
            continue
        given = adapted_input(theirs[name], now) if _is_first(name, mine) else theirs[name]
        if given.shape != now.shape or given.is_complex() != now.is_complex():
            fit.other_shape.append(f"{prefix}{name} {_shape(theirs[name])} for {_shape(now)}")
            continue
        fit.weights[prefix + name] = given
        if given is not theirs[name]:
            fit.adapted.append(prefix + name)
    fit.unexpected.extend(name for name in theirs if name not in mine and not _counts(name))
    return fit


def _is_first(name: str, mine: Mapping[str, Tensor]) -> bool:
    """Whether this is the weight of the network's first convolution."""
    return name == next((key for key, each in mine.items() if each.dim() == 4), None)


def _prefixes(names: Iterable[str]) -> list[str]:
    """The beginnings of names up to a dot, of at most three parts, the shortest first; the empty one too."""
    parts = [name.split(".") for name in names]
    found = Counter(".".join([*each[:depth], ""]) for each in parts for depth in range(1, min(4, len(each))))
    # A prefix of fewer names is a part of the network and not around it.
    return ["", *sorted((each for each, number in found.items() if number > len(parts) / 2), key=len)]


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}


def unwrapped(name: str) -> str:
    """The name of a weight without the prefixes of wrappers that keep the names of parts."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _matrices(weights: Mapping[str, Tensor]) -> list[str]:
    """The weights of convolutions and linear layers, which tell an architecture."""
    return [name for name, each in weights.items() if each.dim() >= 2]


def _counts(name: str) -> bool:
    return name.rpartition(".")[2] in COUNTERS


def _shape(tensor: Tensor) -> str:
    kind = "complex " if tensor.is_complex() else ""
    return kind + ("x".join(map(str, tensor.shape)) or "1")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
