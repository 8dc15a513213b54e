"""Which tensors the layer takes, and whether it gets for the backward pass what it saved."""

from collections.abc import Sequence

import torch
from torch import Tensor

_TYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
_NAMES = ("running_mean", "running_var", "weight", "bias")
Kind = tuple[torch.dtype, torch.Size] | None


def takes(x: Tensor) -> bool:
    """Whether ``x`` is of a type that batch norm takes."""
    return x.dtype in _TYPES


def check_input(x: Tensor, name: str) -> None:
    """Refuses an input whose type torch's batch norm refuses, with torch's exception.

    Args:
        x: the input.
        name: what errors call the layer.

    Raises:
        NotImplementedError: an integer, bool, complex, quantized or 8-bit floating type.
    """
    if x.dtype not in _TYPES:
        raise NotImplementedError(
            f"layer {name}: batch norm is not implemented for an input of {x.dtype}; use x.float(), or another "
            "floating-point type"
        )


def check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    name: str,
) -> None:
    """Refuses, before anything is sent, what torch's batch norm refuses to train with.

    Parameters and running statistics may be of another floating-point type than the input.

    Raises:
        NotImplementedError: as :func:`check_input`.
        ValueError: another shape than ``(C,)``; one running statistic without the other.
        RuntimeError: no floating type, or another device than the input's.
    """
    check_input(x, name)
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"layer {name}: running_mean and running_var must either both be None or neither be None")
    channels, device = x.shape[1], x.device
    for what, tensor in zip(_NAMES, (running_mean, running_var, weight, bias), strict=True):
        if tensor is None:
            continue
        if tensor.shape != (channels,):
            raise ValueError(
                f"layer {name}: {what} has shape {tuple(tensor.shape)}, but the input {tuple(x.shape)}: "
                f"{channels} channels"
            )
        if tensor.dtype not in _TYPES:
            raise RuntimeError(f"layer {name}: {what} is {tensor.dtype}; use the type of the input, {x.dtype}")
        if tensor.device != device:
            raise RuntimeError(f"layer {name}: {what} is on {tensor.device}, but the input on {device}; move it there")


def kinds(saved: Sequence[Tensor | None]) -> list[Kind]:
    """Type and shape of each, for :func:`given_back`."""
    return [None if t is None else (t.dtype, t.shape) for t in saved]


def given_back(
    saved: Sequence[Tensor | None], expected: Sequence[Kind], device: torch.device, name: str
) -> list[Tensor | None]:
    """What autograd saved, as it was saved, on ``device``. Saved-tensor hooks may return anything in its place.

    Raises:
        RuntimeError: another type or shape, or no values.
    """
    found = []
    for t, kind in zip(saved, expected, strict=True):
        if t is not None and kind is not None:
            elsewhere = t.device != device
            if t.dtype != kind[0] or t.shape != kind[1] or (elsewhere and t.is_meta):
                raise RuntimeError(
                    f"layer {name}: a saved-tensor hook returned {t.dtype} {tuple(t.shape)} on {t.device} in place of "
                    f"{kind[0]} {tuple(kind[1])} on {device}; its unpack must undo what its pack does"
                )
            if elsewhere:
                t = t.to(device)
        found.append(t)
    return found
