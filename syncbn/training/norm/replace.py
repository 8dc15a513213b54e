"""Replaces the batch norm layers of a model by group norm or by nothing, for ``norm=group_norm`` and ``norm=none``."""

from typing import Any

from torch import Tensor, nn

from syncbn.nn.conversion.convert import batch_norms
from syncbn.nn.torch_internals import BatchNormBase, ConvBase
from syncbn.training.errors import SettingError
from syncbn.training.norm.shuffled_part import shuffled_part


def prepare_model(model: nn.Module, norm: dict[str, Any]) -> None:
    """Replace the batch norm layers of ``model`` in place for ``norm=none`` and ``norm=group_norm``.

    For other norms the model is only checked, since a plugin converts the layers when fitting begins.

    Raises:
        SettingError: ``norm=sync``, ``ghost`` or ``torch_sync`` and a model without batch norm, or without a layer that
            ``norm.only`` names. ``norm=shuffle`` and a part that does not exist or has no batch norm.
    """
    if norm["name"] == "none":
        remove_batch_norm(model)
    elif norm["name"] == "group_norm":
        replace_by_group_norm(model, norm["num_groups"], norm["min_channels"])
    elif norm["name"] == "shuffle":
        shuffled_part(model, norm["part"])
    elif norm["name"] in ("sync", "ghost", "torch_sync") and not any(batch_norms(model, norm.get("only"))):
        names = ", ".join(name for name, _ in batch_norms(model))
        if norm.get("only") is None:
            purpose = "cut into ghost batches" if norm["name"] == "ghost" else "synchronize"
            raise SettingError("norm", norm["name"], f"this model has no batch norm to {purpose}; use norm=local")
        hint = f"no batch norm layer has this name; there are {names or 'none'}"
        raise SettingError("norm.only", norm["only"], hint)


def remove_batch_norm(model: nn.Module) -> None:
    """Replace batch norm by an identity, and give the layer before it a bias, which the batch norm had replaced.

    The layer before is the last convolution or linear layer that was registered before the norm, in the same parent or
    an earlier one. It gets a bias if it has none, and as many outputs as the norm has channels.
    """
    before: nn.Module | None = None
    for layer in model.modules():
        if isinstance(layer, BatchNormBase):
            if before is not None and before.bias is None and _outputs(before) == layer.num_features:
                zeros = before.weight.new_zeros(layer.num_features)
                before.bias = nn.Parameter(zeros)
        elif _outputs(layer) is not None:
            before = layer
    _replace(model, lambda norm: _not_in_place(_activation(norm)))


def replace_by_group_norm(model: nn.Module, num_groups: int = 32, min_channels: int = 16) -> None:
    """Replace batch norm by group norm (Wu & He 2018) with the same weight, bias and eps.

    Args:
        model: changed in place.
        num_groups: maximum number of groups; a layer gets the largest number up to it that divides its channels.
        min_channels: minimum number of channels in a group; a layer with fewer channels has one group.
    """

    def group_norm(norm: BatchNormBase) -> nn.Module:
        channels = norm.num_features
        groups = max(
            n for n in range(1, num_groups + 1) if n == 1 or (channels % n == 0 and channels // n >= min_channels)
        )
        kind = nn.GroupNorm if isinstance(_activation(norm), nn.Identity) else GroupNormAct
        new = kind(groups, channels, eps=norm.eps, affine=norm.affine)
        if isinstance(new, GroupNormAct):
            new.act = _activation(norm)
        new.weight, new.bias = norm.weight, norm.bias
        return new.train(norm.training)

    _replace(model, group_norm)


class GroupNormAct(nn.GroupNorm):
    """Group norm and then the activation that a batch norm layer of timm, such as ``BatchNormAct2d``, had inside."""

    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.act(super().forward(input))
        return y


def _activation(norm: BatchNormBase) -> nn.Module:
    """What a third-party batch norm layer does after it normalizes: its drop layer and activation; often nothing."""
    parts = (getattr(norm, name, None) for name in ("drop", "act"))
    kept = [part for part in parts if isinstance(part, nn.Module) and not isinstance(part, nn.Identity)]
    return kept[0] if len(kept) == 1 else nn.Sequential(*kept) if kept else nn.Identity()


def _not_in_place(act: nn.Module) -> nn.Module:
    """An activation that leaves its input unchanged: without a norm before it, others may use the same tensor."""
    for layer in act.modules():
        if getattr(layer, "inplace", False) is True:
            setattr(layer, "inplace", False)  # noqa: B010  # torch types attributes of modules as tensors and modules
    return act


def _outputs(layer: nn.Module) -> int | None:
    """Number of output channels of a convolution or linear layer; None for any other layer."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, ConvBase) else None


def _replace(model: nn.Module, make: Any) -> None:
    """Replace every batch norm below ``model`` by ``make(layer)``; a shared layer stays shared."""
    made: dict[nn.Module, nn.Module] = {}
    for path, child in list(model.named_modules(remove_duplicate=False)):
        if path and isinstance(child, BatchNormBase):
            if child not in made:
                made[child] = make(child)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made[child])
