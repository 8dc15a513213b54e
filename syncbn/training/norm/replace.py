"""Replaces the batch norm of a model: synchronized, group norm, or none."""

from typing import Any

from torch import nn

from syncbn.nn.conversion.convert import batch_norms
from syncbn.nn.torch_internals import BatchNormBase, ConvBase
from syncbn.training.errors import SettingError


def prepare_model(model: nn.Module, norm: dict[str, Any]) -> None:
    """Rewrites the batch norm layers of ``model`` in place where ``norm`` takes them out; else leaves them alone.

    Raises:
        SettingError: ``norm=sync``, ``ghost`` or ``torch_sync`` finds no batch norm in this model, or none of the
            names in ``norm.only``.
    """
    if norm["name"] == "none":
        remove_batch_norm(model)
    elif norm["name"] == "group_norm":
        replace_by_group_norm(model, norm["num_groups"], norm["min_channels"])
    elif norm["name"] in ("sync", "ghost", "torch_sync") and not any(batch_norms(model, norm.get("only"))):
        names = ", ".join(name for name, _ in batch_norms(model))
        if norm.get("only") is None:
            wants = "cut into ghost batches" if norm["name"] == "ghost" else "synchronize"
            raise SettingError("norm", norm["name"], f"this model has no batch norm to {wants}; use norm=local")
        hint = f"no batch norm layer has this name; there are {names or 'none'}"
        raise SettingError("norm.only", norm["only"], hint)


def remove_batch_norm(model: nn.Module) -> None:
    """Batch norm becomes an identity, and the layer before it gets the bias that the norm had made superfluous.

    The layer before is the last convolution or linear layer that was registered before the norm, in the same parent or
    an earlier one, if it has no bias and as many outputs as the norm has channels.
    """
    before: nn.Module | None = None
    for layer in model.modules():
        if isinstance(layer, BatchNormBase):
            if before is not None and before.bias is None and _outputs(before) == layer.num_features:
                zeros = before.weight.new_zeros(layer.num_features)
                before.bias = nn.Parameter(zeros)
        elif _outputs(layer) is not None:
            before = layer
    _replace(model, lambda norm: nn.Identity())


def replace_by_group_norm(model: nn.Module, num_groups: int = 32, min_channels: int = 16) -> None:
    """Batch norm becomes group norm (Wu & He 2018) with the same weight, bias and eps.

    Args:
        model: changed in place.
        num_groups: at most; a layer takes the largest number that divides its channels.
        min_channels: in a group, at least, unless a layer has fewer.
    """

    def group_norm(norm: BatchNormBase) -> nn.Module:
        channels = norm.num_features
        groups = max(
            n for n in range(1, num_groups + 1) if n == 1 or (channels % n == 0 and channels // n >= min_channels)
        )
        new = nn.GroupNorm(groups, channels, eps=norm.eps, affine=norm.affine)
        new.weight, new.bias = norm.weight, norm.bias
        return new.train(norm.training)

    _replace(model, group_norm)


def _outputs(layer: nn.Module) -> int | None:
    """How many channels a convolution or linear layer gives; None for any other."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, ConvBase) else None


def _replace(model: nn.Module, make: Any) -> None:
    """Puts ``make(layer)`` in the place of every batch norm below ``model``; a shared layer stays shared."""
    made: dict[nn.Module, nn.Module] = {}
    for path, child in list(model.named_modules(remove_duplicate=False)):
        if path and isinstance(child, BatchNormBase):
            if child not in made:
                made[child] = make(child)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made[child])
