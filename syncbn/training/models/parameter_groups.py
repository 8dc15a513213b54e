"""Divides the parameters of a module into optimizer groups: weight decay, and learning rates of layers."""

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer

from syncbn.nn.torch_internals import NormBase
from syncbn.training.errors import AgreedError

NORMALIZATION = (NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


def parameter_groups(
    module: nn.Module,
    *,
    decay_norm: bool = False,
    layer_decay: float | None = None,
    lr_scale: dict[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Return the trainable parameters as optimizer groups; normalization layers get no weight decay.

    With rates of layers, each group has the factor on its learning rate as ``lr_scale``, which is timm's name for it.
    :func:`scale_rates` applies it.

    Args:
        module: any module; a parameter shared by two layers is listed once.
        decay_norm: whether to apply the optimizer's weight decay to all parameters.
        layer_decay: factor on the learning rate from each block to the block before it (Bao et al. 2022, BEiT); the
            last block has the optimizer's rate. See :func:`blocks`.
        lr_scale: factors by globs on the names of parameters; all that match multiply.

    Raises:
        AgreedError: a glob that matches no trainable parameter.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    norm = {p for m in module.modules() if isinstance(m, NORMALIZATION) for p in m.parameters(recurse=False)}
    factors = _factors(module, trainable, layer_decay, lr_scale or {})
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        groups.setdefault((factors[name], parameter in norm and not decay_norm), []).append(parameter)
    scaled = layer_decay is not None or bool(lr_scale)
    return [
        {"params": groups[key]} | ({"weight_decay": 0.0} if key[1] else {}) | ({"lr_scale": key[0]} if scaled else {})
        for key in sorted(groups)
    ]


def scale_rates(optimizer: Optimizer) -> Optimizer:
    """Multiply the learning rate of each group by its ``lr_scale``, in place; call it once, before a scheduler."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.get("lr_scale", 1.0)
    return optimizer


def blocks(module: nn.Module) -> dict[str, int]:
    """The depth of each parameter, by its name: the number of its block, in the order in which layers are registered.

    timm's networks say which parameters are a block (``group_matcher``). In others, a block is a numbered part such as
    ``layer1.0`` with all that it contains, or a layer outside such parts. A normalization layer outside them belongs to
    the block before it.
    """
    for name, part in module.named_modules():
        if hasattr(part, "group_matcher"):
            return _of_timm(name, part, module)
    depth, block = -1, None
    found: dict[str, int] = {}
    for name, layer in module.named_modules():
        own = [f"{name}.{key}".lstrip(".") for key, _ in layer.named_parameters(recurse=False, remove_duplicate=False)]
        around = _block(name)
        alone = isinstance(layer, NORMALIZATION) and around == name and depth >= 0
        if own and around != block and not alone:
            depth, block = depth + 1, around
        found |= dict.fromkeys(own, depth)
    return found


def _block(name: str) -> str:
    """The innermost numbered part around a layer that has layers itself; the layer if there is none."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if parts[end - 1].isdigit():
            return ".".join(parts[:end])
    return name


def _of_timm(name: str, part: nn.Module, module: nn.Module) -> dict[str, int]:
    from timm.models import group_parameters  # type: ignore[import-not-found, unused-ignore]

    matcher: Callable[..., Any] = part.group_matcher  # type: ignore[assignment]
    prefix = f"{name}." if name else ""
    inside = {
        f"{prefix}{each}": depth for each, depth in group_parameters(part, matcher(coarse=False), reverse=True).items()
    }
    last = max(inside.values())
    return {each: inside.get(each, last) for each, _ in module.named_parameters()}


def _factors(
    module: nn.Module, names: Iterable[str], layer_decay: float | None, lr_scale: dict[str, float]
) -> dict[str, float]:
    """The factor on the learning rate of each parameter, by name."""
    names = list(names)
    for glob in lr_scale:
        if not any(fnmatchcase(name, glob) for name in names):
            hint = f"no trainable parameter has such a name; names are {', '.join(_some(names))}"
            raise AgreedError("optimizer.lr_scale", glob, hint)
    depths = {} if layer_decay is None else blocks(module)
    last = max((depths[name] for name in names if name in depths), default=0)
    found = {}
    for name in names:
        factor = 1.0 if layer_decay is None else layer_decay ** (last - depths.get(name, last))
        for glob, each in lr_scale.items():
            factor *= each if fnmatchcase(name, glob) else 1.0
        found[name] = factor
    return found


def _some(names: list[str]) -> Iterator[str]:
    yield from names[:2]
    if len(names) > 2:
        yield f"..., {names[-1]}"
