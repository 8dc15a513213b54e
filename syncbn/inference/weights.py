"""Puts the weights of a checkpoint into a network, whatever the parts around it were called."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.nn.torch_internals import BatchNormBase
from syncbn.training.errors import SettingError
from syncbn.training.network.init_from import differences, fitted, unwrapped

DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64, "64": torch.float64}


def state_of(checkpoint: Any, where: str) -> dict[str, Tensor]:
    """The weights of a checkpoint by name, without the prefixes of ``torch.compile`` and of activation checkpointing.

    Raises:
        SettingError: it is no checkpoint of a training run.
    """
    state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise SettingError(
            where, hint="it has no state_dict, so it is no checkpoint of a run; use RUN/checkpoints/*.ckpt"
        )
    return {unwrapped(str(name)): each for name, each in state.items()}


def prefixes(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """The names of the parts of a checkpoint that are this network exactly: ``"network."``, or "" for all of it."""
    own = {name: each.shape for name, each in network.state_dict().items() if isinstance(each, Tensor)}
    first = next(iter(own), None)
    if first is None:
        return []
    candidates = (name.removesuffix(first) for name in state if name == first or name.endswith(f".{first}"))
    return [each for each in candidates if _shapes(state, each) == own]


def load(network: nn.Module, state: Mapping[str, Tensor], prefix: str, where: str, versions: str) -> None:
    """Load the weights below ``prefix``, in the precision that they have in the checkpoint.

    Raises:
        SettingError: they are those of another network.
    """
    weights = {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}
    wrapped = {unwrapped(name): name for name in network.state_dict()}  # the module may compile its network itself
    weights = {wrapped.get(name, name): each for name, each in weights.items()}
    for name, each in (*network.named_parameters(), *network.named_buffers()):
        saved = weights.get(name)
        if saved is not None and saved.dtype != each.dtype:
            each.data = each.data.to(saved.dtype)
    try:
        network.load_state_dict(weights)
    except (RuntimeError, KeyError) as error:
        raise SettingError(where, hint=f"{misfit(network, state)}{versions}") from error


def misfit(network: nn.Module, state: Mapping[str, Tensor]) -> str:
    """What differs between a network and a checkpoint of another one, in one line."""
    tensors = {name: each for name, each in state.items() if isinstance(each, Tensor)}
    own = {name: each for name, each in network.state_dict().items() if isinstance(each, Tensor)}
    fit = fitted(tensors, own)
    return f"its weights are not of this network: {len(fit.weights)} of {len(own)} tensors fit ({differences(fit)})"


def take_inputs_in(network: nn.Module, precision: Any) -> None:
    """Cast the network's inputs to the precision of its weights, as Lightning does it (``trainer.precision``)."""
    dtype = DTYPES.get(str(precision))
    if dtype is None:
        return
    kept = {name for name, layer in network.named_modules() if isinstance(layer, BatchNormBase)}
    for name, buffer in network.named_buffers():  # those that are not in the checkpoint
        if buffer.is_floating_point() and name.rpartition(".")[0] not in kept:
            buffer.data = buffer.data.to(dtype)
    network.register_forward_pre_hook(_Cast(dtype))


class _Cast:
    """A class and not a closure, so that the network can be pickled."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            each.to(self.dtype) if isinstance(each, Tensor) and each.is_floating_point() else each for each in inputs
        )


def _shapes(state: Mapping[str, Tensor], prefix: str) -> dict[str, torch.Size]:
    return {
        name.removeprefix(prefix): each.shape
        for name, each in state.items()
        if name.startswith(prefix) and isinstance(each, Tensor)
    }
