"""Implements the setting ``checkpoint_activations``: parts of a network that compute activations again in backward."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint as torch_checkpoint

from syncbn.nn.modules import Synchronized
from syncbn.nn.simulation import Simulated
from syncbn.nn.torch_internals import BatchNormBase, buffers_restored
from syncbn.training.errors import SettingError
from syncbn.training.network.names import nearest

OWN = (Synchronized, Simulated)  # layers that do not move their running statistics in a recomputation


def checkpoint(module: nn.Module, globs: Sequence[str]) -> None:
    """Recompute the activations of the selected modules in backward instead of keeping them (Chen et al. 2016).

    The modules keep their classes and names. A module within a selected one is not selected a second time.

    Args:
        module: names begin here.
        globs: on the names of modules.

    Raises:
        SettingError: a glob selects no module, or only batch norm layers.
    """
    parts = {name: part for name, part in module.named_modules() if name and _is_network(part)}
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in parts):
            hint = f"no module of the network has this name; {nearest(glob, list(parts))}"
            raise SettingError("checkpoint_activations", glob, hint)
    chosen: list[str] = []
    for name, part in parts.items():
        within = any(name.startswith(f"{outer}.") for outer in chosen)
        if not within and any(fnmatchcase(name, glob) for glob in globs):
            chosen.append(name)
            part.forward = partial(_checkpointed, part, part.forward)


def _is_network(part: nn.Module) -> bool:
    """Whether a module can be checkpointed: it has parameters and a forward pass, and is no batch norm itself."""
    containers = (nn.ModuleList, nn.ModuleDict, BatchNormBase)
    return not isinstance(part, containers) and any(True for _ in part.parameters())


def _checkpointed(part: nn.Module, forward: Any, *inputs: Any, **keywords: Any) -> Any:
    if not (part.training and torch.is_grad_enabled()):
        return forward(*inputs, **keywords)
    # A compiler sees each change of a buffer once, and accepts no contexts of its own kind.
    contexts: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": partial(_contexts, part)}
    return torch_checkpoint.checkpoint(forward, *inputs, use_reentrant=False, **contexts, **keywords)


def _contexts(part: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of the forward pass and of the recomputation."""
    return nullcontext(), _running_statistics_kept(part)


@contextmanager
def _running_statistics_kept(part: nn.Module) -> Iterator[None]:
    """Restores the running statistics of torch's own batch norm layers, which a recomputation would move again."""
    layers = nn.ModuleList(
        each for each in part.modules() if isinstance(each, BatchNormBase) and not isinstance(each, OWN)
    )
    with torch.no_grad(), buffers_restored(layers), torch.enable_grad():
        yield
