"""Checks the tensors and the mask that a layer gets in forward, and its saved tensors in backward."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

_TYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
_NAMES = ("running_mean", "running_var", "weight", "bias")
Kind = tuple[torch.dtype, torch.Size, torch.device] | None


def takes(x: Tensor) -> bool:
    """Whether ``x`` is of a type that batch norm takes."""
    return x.dtype in _TYPES


def check_input(x: Tensor, name: str) -> None:
    """Refuses an input whose type torch's batch norm refuses (integers, complex, 8 bits), with torch's exception."""
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
    """Refuses, before any all-reduce, the operands that torch's batch norm refuses to train with.

    Parameters and running statistics may be of another floating-point type than the input.

    Raises:
        ValueError: another shape than ``(C,)``; one running statistic without the other.
        RuntimeError: a type that is not floating-point, or another device than the input's.
    """
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"layer {name}: running_mean and running_var must either both be None or neither be None")
    channels, device = x.shape[1], x.device
    given = (running_mean, running_var, weight, bias)
    for t in given:
        if t is None or (t.dim() == 1 and t.numel() == channels and t.dtype in _TYPES and t.device == device):
            continue
        _refuse(next(what for what, each in zip(_NAMES, given, strict=True) if each is t), t, x, name)


def _refuse(what: str, t: Tensor, x: Tensor, name: str) -> NoReturn:
    if t.shape != (x.shape[1],):
        raise ValueError(
            f"layer {name}: {what} has shape {tuple(t.shape)}, but the input {tuple(x.shape)}: {x.shape[1]} channels"
        )
    if t.dtype not in _TYPES:
        raise RuntimeError(f"layer {name}: {what} is {t.dtype}; use the type of the input, {x.dtype}")
    raise RuntimeError(f"layer {name}: {what} is on {t.device}, but the input on {x.device}; move it there")


def kinds(saved: Sequence[Tensor | None]) -> list[Kind]:
    """Type, shape and device of each, for :func:`restored`."""
    return [None if t is None else (t.dtype, t.shape, t.device) for t in saved]


def restored(saved: Sequence[Tensor | None], expected: list[Kind], name: str) -> Sequence[Tensor | None]:
    """The tensors that autograd saved, on their device. Saved-tensor hooks may return anything in their place.

    Raises:
        RuntimeError: a tensor of another type or shape, or on the meta device, which has no values.
    """
    if kinds(saved) == expected:
        return saved
    found: list[Tensor | None] = []
    for t, kind in zip(saved, expected, strict=True):
        if t is None or kind is None:
            found.append(None)
            continue
        dtype, shape, device = kind
        if t.dtype != dtype or t.shape != shape or (t.is_meta and device.type != "meta"):
            raise RuntimeError(
                f"layer {name}: a saved tensor is {t.dtype} {tuple(t.shape)} on {t.device} in backward, and was "
                f"{dtype} {tuple(shape)} on {device} in forward; a saved-tensor hook must return what it was given, "
                "and parameters keep their type between the two"
            )
        found.append(t.to(device))
    return found


def over_channels(mask: Tensor, x: Tensor) -> Tensor:
    """``mask`` as a tensor that broadcasts to ``x``, channels included, and has its number of dimensions.

    Raises:
        TypeError: another type than bool.
        ValueError: another device; a shape that does not broadcast to ``x`` without its channels.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True counts), got {mask.dtype}")
    without_channels = (x.shape[0], *x.shape[2:])
    if mask.device != x.device:
        raise ValueError(f"the mask is on {mask.device}, but the input on {x.device}: move it there")
    try:
        return mask.expand(without_channels).unsqueeze(1)
    except RuntimeError:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not broadcast to {without_channels}, the input less its channels"
        ) from None
