"""The residual and the activation that a layer may apply after the batch norm."""

import torch.nn.functional as F
from torch import Tensor


def apply(y: Tensor, act: str | None, residual: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """``act(y + residual)``, zero where masked."""
    if residual is not None:
        y = y + residual
    if act is not None:
        y = F.relu(y)
    return y if mask is None else y.masked_fill(~mask, 0)


def check_act(act: str | None) -> None:
    """Raises ValueError for an unknown activation."""
    if act not in (None, "relu"):
        raise ValueError(f"act={act!r}: use 'relu', or None and an activation of your own")


def check(x: Tensor, act: str | None, residual: Tensor | None) -> None:
    """Raises ValueError for an unknown activation, or a residual of another shape or device than ``x``."""
    check_act(act)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, but the input {tuple(x.shape)}: make them alike")
    if residual is not None and residual.device != x.device:
        raise ValueError(f"the residual is on {residual.device}, but the input on {x.device}: move it there")
