"""Third-party batch norm classes: keeps their forward pass, and synchronizes the batch norm inside it.

An example is timm's ``BatchNormAct2d``, a BatchNorm2d whose forward pass calls ``torch.nn.functional.batch_norm`` and
then dropout and an activation. Its synchronized class runs that forward pass and replaces that one call.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from syncbn.nn import functional, torch_internals
from syncbn.nn.autograd import operands
from syncbn.nn.modules import Synchronized
from syncbn.nn.torch_internals import BatchNormBase


@cast(Callable[[Any], Any], cache)  # classes are hashable, but Module's annotations hide it from mypy
def twin(original: type[BatchNormBase]) -> type[Synchronized]:
    """The synchronized twin of a subclass of torch's batch norm; made once.

    Raises:
        TypeError: the reason why this class has none.
    """
    if issubclass(original, LazyModuleMixin):
        raise TypeError("its size is not known yet: run a batch through the model first")
    if issubclass(original, nn.SyncBatchNorm):
        raise TypeError(
            "it is a kind of torch.nn.SyncBatchNorm and would go on to synchronize by itself: convert the model before "
            "it gets such layers, instead of giving them to it"
        )
    if original.forward is BatchNormBase.forward:
        bases: tuple[type, ...] = (_Rebuilt, Synchronized, original)
    elif _calls_batch_norm(original):
        bases = (_Rebuilt, KeepsForward, Synchronized, original)
    else:
        raise TypeError(
            "its forward pass is its own and calls neither torch.nn.functional.batch_norm nor super().forward: "
            "there is nothing in it to synchronize"
        )
    return type(f"Sync{original.__name__}", bases, {"original": original, "__module__": original.__module__})


class _Rebuilt(BatchNormBase):
    """Pickles by its original class, since its own class cannot be imported by name."""

    original: type[BatchNormBase]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.original,), self.__dict__


def _rebuild(original: type[BatchNormBase]) -> BatchNormBase:
    made: BatchNormBase = object.__new__(twin(original))
    return made


class KeepsForward(Synchronized):
    """Runs the original forward pass, with its call of ``batch_norm`` replaced by the synchronized one."""

    original: type[BatchNormBase]

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Any:  # type: ignore[override]
        if not self.training:
            return self.original.forward(self, x, *arguments, **keywords)
        tracked = self.num_batches_tracked
        counted = None
        if tracked is not None and functional.recomputing():
            # Selective checkpointing refuses a recomputation with operations that the first pass did not have.
            with torch_internals.without_dispatch_modes():
                counted = tracked.clone()
        replacement = _ReplaceBatchNorm(self)  # torch.compile loses the name in `with ... as` (torch 2.13)
        try:
            with replacement:
                result = self.original.forward(self, x, *arguments, **keywords)
        except RuntimeError as error:
            if "would mutate a captured Tensor" in str(error):  # torch's refusal under torch.func, of several lines
                raise RuntimeError(
                    f"layer {self.name_in_errors()}: its own forward pass changes buffers that torch.func did not get; "
                    "make the buffers an argument of the transformed function, or use track_running_stats=False or "
                    "eval()"
                ) from error
            raise
        finally:  # checkpointing may stop a recomputation half-way
            if tracked is not None and counted is not None:
                with torch_internals.without_dispatch_modes():
                    tracked.copy_(counted)  # the original has counted this batch a second time
        if not replacement.was_called:
            raise RuntimeError(
                f"the forward pass of {self.original.__qualname__} did not call torch.nn.functional.batch_norm, so its "
                "statistics are not synchronized; leave it out: syncbn.convert(..., only=...)"
            )
        return result


def inputs(layer: BatchNormBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The input of a call, and a mask that broadcasts to it or None, for a hook before the forward pass."""
    given = dict(zip(("input", "mask"), args, strict=False)) | kwargs
    x = given["input"] if "input" in given else next(iter(given.values()))
    masked = isinstance(layer, Synchronized) and not isinstance(layer, KeepsForward)
    mask = given.get("mask") if masked else None
    return x, None if mask is None else operands.over_channels(mask, x)


class _ReplaceBatchNorm(TorchFunctionMode):
    """Replaces ``torch.nn.functional.batch_norm(..., training=True)`` for one layer."""

    def __init__(self, layer: Synchronized) -> None:
        super().__init__()
        self.layer, self.was_called = layer, False
        # Batch norms within the layer (timm's SplitBatchNorm2d has some) are converted themselves, or were left out.
        within = (module for module in layer.modules() if module is not layer and isinstance(module, BatchNormBase))
        # Identified by either tensor: with track_running_stats=False there is no running mean in the call.
        self.not_its_own = [t for module in within for t in (module.running_mean, module.weight) if t is not None]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Has torch's signature, so that calls with any arguments work."""
        if not training or any(t is running_mean or t is weight for t in self.not_its_own):
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        self.was_called = True
        layer = self.layer
        return functional.sync_batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training=True,
            momentum=momentum,
            eps=eps,
            group=layer.group,
            biased_running_var=layer.biased_running_var,
            name=layer.name_in_errors(),
        )


def _calls_batch_norm(original: type[BatchNormBase]) -> bool:
    """Whether the code of its forward pass names ``batch_norm``, or calls that of a parent that does."""
    for cls in original.__mro__:
        if "forward" in vars(cls):
            code = getattr(inspect.unwrap(vars(cls)["forward"]), "__code__", None)
            names = code.co_names if code else ()
            if "batch_norm" in names:
                return True
            if not {"super", "forward"} <= set(names):
                return False
    return False
