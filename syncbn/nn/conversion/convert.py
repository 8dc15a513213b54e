"""``convert``, which turns torch's batch norms in a model into synchronized ones, and its exact inverse ``revert``.

Layers change their class in place. So everything that belongs to a layer stays: parameters and buffers (an optimizer
built before still works), hooks, attributes, the training flag, a layer shared by two parents, two names for one layer.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from syncbn.nn.comm import groups
from syncbn.nn.conversion import hidden, third_party
from syncbn.nn.modules import (
    OPTIONS,
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
    Synchronized,
    options,
)
from syncbn.nn.torch_internals import BatchNormBase

_LEAVE_OUT = "only=lambda name, module: ..."
Only = Callable[[str, nn.Module], bool] | str | Iterable[str] | None
AnyModule = TypeVar("AnyModule", bound=nn.Module)

_TWINS: dict[type[nn.Module], type[Synchronized]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}
_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {twin: original for original, twin in _TWINS.items()}


def convert(
    module: AnyModule,
    *,
    group: object = "world",
    only: Only = None,
    ghost_batch: int | None = None,
    biased_running_var: bool = False,
) -> AnyModule:
    """Turns every torch batch norm in ``module`` into its synchronized counterpart, in place.

    A subclass with its own forward pass (timm's BatchNormAct2d) keeps it, with the batch norm inside synchronized.

    Args:
        module: a model, or a batch norm itself. Layers of this package are left unchanged.
        group: the ranks that share statistics: "world", "node", a number of consecutive ranks, a ProcessGroup, or
            a DeviceMesh of one dimension (see :mod:`syncbn.nn.comm.groups`). It replaces the
            process group of a ``torch.nn.SyncBatchNorm`` until that is reverted.
        only: which layers: a predicate ``(name, module) -> bool``, or globs on names (``["*layer3*", "stem.*"]``). It
            is also called for modules of other classes that would be refused or warned of.
        ghost_batch: samples that share statistics, if fewer than the device holds.
        biased_running_var: keep the running variance divided by ``n``.

    Returns:
        The same object.

    Raises:
        TypeError: ``module`` is not a module; or a layer in it, by name, cannot be synchronized: a lazy one; one whose
            own forward pass contains no batch norm that could be found; a scripted, traced, exported or fx module with
            batch norm in its graph; a module of another class whose forward pass calls batch norm with running
            statistics. Nothing is skipped silently, and the model is unchanged.
        ValueError: an invalid group, one that this rank is not a member of, or a ghost batch below 1.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert takes a torch.nn.Module, got {type(module).__qualname__}")
    chosen_options = options(group, ghost_batch, biased_running_var)
    accepts = predicate(only)
    refuse_hidden(module, accepts)
    for name, each in module.named_modules():
        if hidden.learns_by_itself(each) and not _is_left_out(name, each, accepts):
            warnings.warn(
                f"{name or 'the module'} is a {type(each).__qualname__}: it has running statistics, but is no "
                "torch.nn.BatchNorm, so each device keeps its own statistics there",
                stacklevel=2,
            )
    chosen = [
        (name, layer, _twin(name, layer, ghost_batch), _torch_group(name, layer))
        for name, layer in batch_norms(module, accepts)
        if not isinstance(layer, Synchronized)
    ]
    for name, layer, twin, torch_group in chosen:
        attributes = layer.__dict__
        if isinstance(layer, nn.SyncBatchNorm):
            del attributes["process_group"]
            attributes["_torch_group"] = torch_group
        layer.__class__ = twin
        attributes |= chosen_options | ({"name_in_model": name} if name else {})
    return module


def revert(module: AnyModule, *, only: Only = None) -> AnyModule:
    """Turns every synchronized layer in ``module`` back into torch's batch norm, in place.

    Args:
        module: a model, or a synchronized layer itself.
        only: which layers, as for :func:`convert`.

    Returns:
        The same object.

    Raises:
        TypeError: a layer, by name, with an activation (``act``), which torch's class would drop; a subclass of one of
            this package's layers, whose torch class is unknown. The model is unchanged.
        ValueError: a torch.nn.SyncBatchNorm had a process group that this process does not have.
    """
    chosen = [
        (layer, _original(name, layer), _process_group(name, layer))
        for name, layer in batch_norms(module, only)
        if isinstance(layer, Synchronized)
    ]
    for layer, original, process_group in chosen:
        attributes = layer.__dict__
        for option in (*OPTIONS, "name_in_model"):
            attributes.pop(option, None)
        if original is nn.SyncBatchNorm:
            attributes.pop("_torch_group", None)
            attributes["process_group"] = process_group
        layer.__class__ = original  # type: ignore[assignment]
    return module


def batch_norms(module: nn.Module, only: Only = None) -> Iterator[tuple[str, BatchNormBase]]:
    """Each batch norm of ``module`` that ``only`` accepts, once, under the first of its names that it accepts."""
    accepts = predicate(only)
    seen: set[nn.Module] = set()
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, BatchNormBase) and layer not in seen and accepts(name, layer):
            seen.add(layer)
            yield name, layer


def refuse_hidden(module: nn.Module, only: Only = None) -> None:
    """Raises TypeError, by name, for batch norm outside any layer of torch's class; see ``hidden``."""
    accepts = predicate(only)
    for name, each in module.named_modules():
        if (reason := hidden.reason(each)) is not None and not _is_left_out(name, each, accepts):
            kind = getattr(each, "original_name", type(each).__name__)
            raise TypeError(f"{name or 'the module'} is a {kind}: {reason}. Or leave it out: {_LEAVE_OUT}")


def _is_left_out(name: str, module: nn.Module, accepts: Callable[[str, nn.Module], bool]) -> bool:
    """Whether ``accepts`` leaves out a module of another class; not if it fails on a batch norm's attributes."""
    try:
        return not accepts(name, module)
    except AttributeError:
        return False


def _twin(name: str, layer: BatchNormBase, ghost_batch: int | None) -> type[Synchronized]:
    kind = type(layer)
    try:
        if "forward" in vars(layer):
            raise TypeError("this one object has a forward pass of its own, which would go on to be called")
        twin: type[Synchronized] = _TWINS.get(kind) or third_party.twin(kind)
        if ghost_batch is not None and issubclass(twin, third_party.KeepsForward):
            raise TypeError("its forward pass is its own and cannot be cut into ghost batches")
        return twin
    except TypeError as error:
        raise TypeError(
            f"{name or 'the module'} is a {kind.__qualname__}: {error}. Or leave it out: {_LEAVE_OUT}"
        ) from None


def _original(name: str, layer: BatchNormBase) -> type[nn.Module]:
    original = _ORIGINALS.get(type(layer)) or vars(type(layer)).get("original")
    if original is None:
        raise TypeError(
            f"{name or 'the module'} is a {type(layer).__qualname__}: its torch class is not known. "
            f"Leave it out: {_LEAVE_OUT}"
        )
    if layer.fused_act is not None:
        raise TypeError(
            f"{name or 'the module'} has act={layer.fused_act!r}, which {original.__qualname__} would drop: set its "
            f"fused_act to None and activate after it, by syncbn.norm_act(layer, x). Or leave it out: {_LEAVE_OUT}"
        )
    return original


def _torch_group(name: str, layer: BatchNormBase) -> Any:
    """The process group of a torch.nn.SyncBatchNorm as plain data; any other value unchanged."""
    process_group = layer.process_group if isinstance(layer, nn.SyncBatchNorm) else None
    if not isinstance(process_group, dist.ProcessGroup):
        return process_group  # None, or what new_group returns on ranks that are not members
    try:
        return groups.parse(process_group)
    except ValueError as error:
        raise ValueError(f"{name or 'the module'} is a {type(layer).__qualname__}: {error}") from None


def _process_group(name: str, layer: BatchNormBase) -> Any:
    """The inverse of :func:`_torch_group`: the same process group, or in another process one of the same ranks."""
    torch_group = layer.__dict__.get("_torch_group")
    if not isinstance(torch_group, tuple):
        return torch_group
    try:
        return groups.resolve(torch_group)
    except ValueError as error:
        raise ValueError(f"{name or 'the module'} was a torch.nn.SyncBatchNorm: {error}") from None


def predicate(only: Only) -> Callable[[str, nn.Module], bool]:
    """Whether ``only`` accepts a layer, as a function that may be called repeatedly; an iterator is read once."""
    if only is None:
        return lambda name, module: True
    if callable(only):
        return only
    globs = [only] if isinstance(only, str) else list(only)
    return lambda name, module: any(fnmatchcase(name, glob) for glob in globs)
