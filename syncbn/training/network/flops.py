"""Counts the floating point operations of a network, with torch's FlopCounterMode."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from syncbn.nn import rng
from syncbn.nn.torch_internals import buffers_restored, tree_leaves, tree_map


class Flops(NamedTuple):
    """Floating point operations for one sample; a multiplication and an addition are two."""

    forward: int
    backward: int


def forward_flops(network: nn.Module, *inputs: Any) -> int | None:
    """Count the operations of the forward pass of one sample.

    Only matrix products, convolutions and attention are counted (``torch.utils.flop_counter``); they are nearly all of
    a network's. The sample goes through the network once, in evaluation mode. Weights, buffers, gradients, the training
    mode and the random number generators are as before. Nothing is sent to other ranks.

    Args:
        network: any module; a compiled one (``network.compile()``) is counted uncompiled.
        inputs: the arguments of its forward pass, of shape ``(N, *)``, on any device; the first sample is used.

    Returns:
        The number; None if the network does not accept the sample.
    """
    found = _count(network, inputs, backward=False)
    return None if found is None else found.forward


def training_flops(network: nn.Module, *inputs: Any) -> Flops | None:
    """Count the operations of the forward and the backward pass of one sample; see :func:`forward_flops`.

    A part that does not train has no gradients of its weights, and they are not counted. Activations that are computed
    again in backward (``checkpoint_activations``) are counted once.
    """
    return _count(network, inputs, backward=True)


def _count(network: nn.Module, inputs: tuple[Any, ...], *, backward: bool) -> Flops | None:
    counter = FlopCounterMode(display=False)
    try:
        with _undisturbed(network), torch.inference_mode(False), torch.set_grad_enabled(backward):
            sample = tree_map(lambda leaf: _first(leaf, network), inputs)
            with counter:
                outputs = network.forward(*sample)
                forward = counter.get_total_flops()
                if backward:
                    _differentiate(outputs, network)
                return Flops(forward, counter.get_total_flops() - forward)
    except Exception:  # of the network's own code: an input of another kind, or one sample is too few
        return None


def _differentiate(outputs: Any, network: nn.Module) -> None:
    """Compute the gradients of the weights that train, and keep none of them."""
    parameters = [each for each in network.parameters() if each.requires_grad]
    sums = [each.sum() for each in tree_leaves(outputs) if isinstance(each, Tensor) and each.requires_grad]
    if sums and parameters:
        torch.autograd.grad(sums, parameters, allow_unused=True)


@contextmanager
def _undisturbed(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, and operations that FlopCounterMode knows; afterwards the network is as before."""
    modes = [(each, each.training) for each in network.modules()]
    # The fused encoder layer and flash attention on the CPU are not in torch 2.13's table of formulas.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(rng.untouched())
        with torch.no_grad():
            stack.enter_context(buffers_restored(network))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            for each, _ in modes:
                each.training = False  # not eval(), which a class may override
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for each, training in modes:
                each.training = training


def _first(leaf: Any, network: nn.Module) -> Any:
    """The first sample, on the device and in the floating point type of the network."""
    if not isinstance(leaf, Tensor):
        return leaf
    weight = next(network.parameters(), None)
    sample = (leaf[:1] if leaf.dim() else leaf).detach()
    if weight is None:
        return sample
    return sample.to(weight.device, weight.dtype if sample.is_floating_point() else None)
