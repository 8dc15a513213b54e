"""Counts the floating-point operations of a network's forward and backward pass, without running it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from syncbn.nn.torch_internals import tree_leaves, tree_map


class Flops(NamedTuple):
    """Floating-point operations for one sample; a multiplication and an addition are two."""

    forward: int
    backward: int


def network_of(module: pl.LightningModule) -> nn.Module:
    """The part of a LightningModule that takes the images: its ``network``, or its own ``forward``, or its one part."""
    own = getattr(module, "network", None)
    if isinstance(own, nn.Module):
        return own
    parts = [part for part in module.children() if any(True for _ in part.parameters())]
    has_forward = type(module).forward is not pl.LightningModule.forward
    return parts[0] if len(parts) == 1 and not has_forward else module


def shadow(network: nn.Module) -> nn.Module | None:
    """A copy of ``network`` in evaluation mode, on torch's meta device: shapes and types, no numbers and no memory.

    Make it before training begins. Later the network has hooks of callbacks, which a copy would call.

    Returns:
        None for a network that cannot be copied.
    """
    state = [*network.parameters(), *network.buffers()]
    if any(map(is_lazy, state)):  # of a LazyModule, whose shapes the first forward pass decides
        return None
    # deepcopy takes what the memo has for an object, so that no weights are copied.
    memo: dict[int, Any] = {id(tensor): _meta(tensor) for tensor in state}
    try:
        return copy.deepcopy(network, memo).eval()
    except Exception:  # of a custom module, which may hold a lock, a file or a generator
        return None


def _meta(tensor: Tensor) -> Tensor:
    made = tensor.detach().to("meta")
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def count(network: nn.Module, sample: Any) -> int | None:
    """Counts the operations of ``network(sample)``; a multiplication and an addition are two.

    Matrix products, convolutions and attention are counted (``torch.utils.flop_counter``); normalization, activations
    and pooling, which take few operations, are not.

    Args:
        network: from :func:`shadow`.
        sample: the input, from :func:`first`.

    Returns:
        None where the forward pass depends on numbers, or fails for another reason.
    """
    found = _count(network, sample, backward=False)
    return None if found is None else found.forward


def count_training(network: nn.Module, sample: Any) -> Flops | None:
    """Counts the operations of the forward and the backward pass of one sample; see :func:`count`.

    A part that does not train has no gradients of its weights, and they are not counted. Activations that are computed
    again in backward (``checkpoint_activations``) are counted once.
    """
    return _count(network, sample, backward=True)


def _count(network: nn.Module, sample: Any, *, backward: bool) -> Flops | None:
    counter = FlopCounterMode(display=False)
    try:
        with _countable(), torch.inference_mode(False), torch.set_grad_enabled(backward), counter:
            outputs = network(_in_type_of(network, sample))
            forward = counter.get_total_flops()
            if backward:
                _differentiate(outputs, network)
    except Exception:  # of the network's own code
        return None
    return Flops(forward, counter.get_total_flops() - forward) if forward else None


@contextmanager
def _countable() -> Iterator[None]:
    """Operations that FlopCounterMode knows, in eager mode, and no draws from the generators that training draws from.

    The fused encoder layer and flash attention on the CPU are not in torch 2.13's table of formulas.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # isolate_rng: a forward pass may draw from Python's or numpy's generator.
        with isolate_rng(include_cuda=False), torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _differentiate(outputs: Any, network: nn.Module) -> None:
    parameters = [each for each in network.parameters() if each.requires_grad]
    sums = [each.sum() for each in tree_leaves(outputs) if isinstance(each, Tensor) and each.requires_grad]
    if sums and parameters:
        torch.autograd.grad(sums, parameters, allow_unused=True)


def first(inputs: Any) -> Any:
    """The shapes of one sample of a batch, on the meta device; ``inputs`` is a tensor, or a collection of tensors."""
    return tree_map(_one, inputs)


def _one(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    shape = (1, *value.shape[1:]) if value.dim() else ()
    return torch.empty(shape, dtype=value.dtype, device="meta")


def _in_type_of(network: nn.Module, sample: Any) -> Any:
    """The sample in the type of the weights, which may be half precision."""
    kinds = [each.dtype for each in network.parameters() if each.is_floating_point()]
    dtype = kinds[0] if kinds else torch.get_default_dtype()
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, sample)
