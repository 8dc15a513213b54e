"""What may come after a batch norm as the layer's own work: a residual, and an activation."""

import torch.nn.functional as F
from torch import Tensor


def finished(y: Tensor, act: str | None, residual: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """``act(y + residual)``, and zero where masked."""
    if residual is not None:
        y = y + residual
    if act is not None:
        y = F.relu(y)
    return y if mask is None else y.masked_fill(~mask, 0)


def check_act(act: str | None) -> None:
    """Raises ValueError for an activation that there is none of."""
    if act not in (None, "relu"):
        raise ValueError(f"act={act!r}: use 'relu', or None and an activation of your own")


def check_added(x: Tensor, act: str | None, residual: Tensor | None) -> None:
    """Raises ValueError for what :func:`sync_batch_norm` cannot do to its output."""
    check_act(act)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, but the input {tuple(x.shape)}: make them alike")
    if residual is not None and residual.device != x.device:
        raise ValueError(f"the residual is on {residual.device}, but the input on {x.device}: move it there")
