"""What ``convert`` and ``revert`` have to keep: all that there is on a model, in a form that compares."""

from typing import Any

from torch import Tensor, nn

Snapshot = dict[str, tuple[type[nn.Module], dict[str, Any]]]


def snapshot(model: nn.Module) -> Snapshot:
    """Each module's class and attributes by its name, a shared one under all of its names.

    Tensors, modules and hooks count as the objects they are, so a copy is a difference. Containers are copied, so that
    a later change to one of them shows.
    """
    return {
        name: (type(module), {key: _seen(value) for key, value in module.__dict__.items()} | {"": id(module)})
        for name, module in model.named_modules(remove_duplicate=False)
    }


def _seen(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, _seen(each)) for key, each in value.items()]  # a list: order is kept too
    if isinstance(value, list | tuple | set | frozenset):
        return type(value), [_seen(each) for each in value]
    if isinstance(value, Tensor | nn.Module) or callable(value):
        return id(value)
    return value
