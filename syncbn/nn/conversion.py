"""The way in and out of a model: ``convert`` and its exact inverse ``revert``.

Layers change their class in place. So everything that hangs on a layer stays: parameters and buffers (an optimizer
built before still works), hooks, attributes, the training flag, a layer shared by two parents, two names for one layer.
"""

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn import groups
from syncbn.nn.modules import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, Synchronized

Only = Callable[[str, nn.Module], bool] | str | Iterable[str] | None
AnyModule = TypeVar("AnyModule", bound=nn.Module)

_TWINS: dict[type[nn.Module], type[Synchronized]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}
_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {twin: original for original, twin in _TWINS.items()}


def convert(module: AnyModule, *, group: object = "world", only: Only = None) -> AnyModule:
    """Turns every torch batch norm in ``module`` into its synchronized twin, in place.

    Args:
        module: a model, or a batch norm itself. Layers that are synchronized by this package already keep their group.
        group: with whom the layers share statistics: "world", "node", a number of consecutive ranks, or a ProcessGroup.
        only: which layers: a predicate ``(name, module) -> bool``, or globs on names (``["*layer3*", "stem.*"]``).

    Returns:
        The same object.

    Raises:
        TypeError: a subclass of torch's batch norm that is none of torch's own: its forward pass may do more than batch
            norm, and nothing is dropped in silence. Leave it out by ``only``. The model is as it was.
        ValueError: a group that is none.
    """
    spec = groups.parse(group)
    chosen = [(name, layer) for name, layer in batch_norms(module, only) if not isinstance(layer, Synchronized)]
    for name, layer in chosen:
        if type(layer) not in _TWINS:
            raise TypeError(
                f"{name or 'the module'} is a {type(layer).__qualname__}, not one of torch's own batch norm classes: "
                "what its forward pass adds would be lost. Leave it out: only=lambda name, module: ..."
            )
    for _, layer in chosen:
        attributes = layer.__dict__
        if isinstance(layer, nn.SyncBatchNorm):
            process_group = attributes.pop("process_group")
            attributes["_torch_group"] = None if process_group is None else groups.parse(process_group)
        layer.__class__ = _TWINS[type(layer)]
        attributes["group"] = spec
    return module


def revert(module: AnyModule, *, only: Only = None) -> AnyModule:
    """Turns every synchronized layer in ``module`` back into the torch batch norm it was, or is the twin of, in place.

    Args:
        module: a model, or a synchronized layer itself.
        only: which layers, as for :func:`convert`.

    Returns:
        The same object.

    Raises:
        TypeError: a subclass of one of this package's layers, of which the torch class is not known.
    """
    chosen = [(name, layer) for name, layer in batch_norms(module, only) if isinstance(layer, Synchronized)]
    for name, layer in chosen:
        if type(layer) not in _ORIGINALS:
            raise TypeError(f"{name or 'the module'} is a {type(layer).__qualname__}: its torch class is not known")
    for _, layer in chosen:
        attributes = layer.__dict__
        del attributes["group"]
        original = _ORIGINALS[type(layer)]
        if original is nn.SyncBatchNorm:
            ranks = attributes.pop("_torch_group", None)
            attributes["process_group"] = None if ranks is None else groups.resolve(ranks)
        layer.__class__ = original  # type: ignore[assignment]
    return module


def batch_norms(module: nn.Module, only: Only = None) -> Iterator[tuple[str, _BatchNorm]]:
    """Each batch norm of ``module`` that ``only`` accepts, once, under the first of its names that it accepts."""
    accepts = _predicate(only)
    seen: set[nn.Module] = set()
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, _BatchNorm) and layer not in seen and accepts(name, layer):
            seen.add(layer)
            yield name, layer


def _predicate(only: Only) -> Callable[[str, nn.Module], bool]:
    if only is None:
        return lambda name, module: True
    if callable(only):
        return only
    globs = [only] if isinstance(only, str) else list(only)
    return lambda name, module: any(fnmatchcase(name, glob) for glob in globs)
