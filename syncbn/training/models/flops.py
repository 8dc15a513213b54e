"""Counts the floating-point operations of a network's forward pass, without running it."""

import copy
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from syncbn.nn.torch_internals import tree_map


def shadow(network: nn.Module) -> nn.Module | None:
    """A copy of ``network`` in evaluation mode, on torch's meta device: shapes and types, no numbers and no memory.

    Make it before training begins. Later the network has hooks of callbacks, which a copy would call.

    Returns:
        None for a network that cannot be copied.
    """
    # deepcopy takes what the memo has for an object, so that no weights are copied.
    state = [*network.parameters(), *network.buffers()]
    memo: dict[int, Any] = {id(tensor): _meta(tensor) for tensor in state}
    try:
        return copy.deepcopy(network, memo).eval()
    except Exception:  # of a custom module, which may hold a lock, a file or a generator
        return None


def _meta(tensor: Tensor) -> Tensor:
    made = tensor.detach().to("meta")
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


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
    counter = FlopCounterMode(display=False)
    try:
        # isolate_rng: a forward pass may draw from Python's or numpy's generator, from which training draws too.
        with isolate_rng(include_cuda=False), torch.no_grad(), torch.compiler.set_stance("force_eager"), counter:
            network(_in_type_of(network, sample))
    except Exception:
        return None
    return int(counter.get_total_flops()) or None


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
