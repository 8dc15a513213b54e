"""Applies the settings of ``ddp`` to DistributedDataParallel, and explains its errors in terms of these settings."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from syncbn.nn.comm import shared_gradients
from syncbn.training.errors import SettingError

HOOKS: dict[str, Any] = {
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": default_hooks.bf16_compress_hook,
    "powersgd": powerSGD_hook.powerSGD_hook,
}
WRAPPERS: dict[str, Any] = {"fp16": default_hooks.fp16_compress_wrapper, "bf16": default_hooks.bf16_compress_wrapper}
FEW = 3  # names of parameters that an error message lists


class Strategy(DDPStrategy):
    """Lightning's DDPStrategy with the communication hook of ``ddp.comm_hook``.

    Lightning 2.6 registers a hook on GPUs only (``DDPStrategy._register_ddp_hooks``), so it is registered here.

    Args:
        settings: of ``ddp``.
        buffers: arguments of DistributedDataParallel about buffers, such as ``broadcast_buffers``.
        timeout: of collectives.
    """

    def __init__(self, settings: DictConfig, buffers: Mapping[str, Any], timeout: timedelta) -> None:
        names = ("find_unused_parameters", "static_graph", "gradient_as_bucket_view", "bucket_cap_mb")
        arguments = {name: settings[name] for name in names}
        super().__init__(timeout=timeout, **arguments, **buffers)
        self.settings, self.trained = settings, list[str]()

    def configure_ddp(self) -> None:
        assert self.model is not None
        # DDP's errors give indices into this list. It is made now: toggle_optimizer() freezes some parameters later.
        self.trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        settings = self.settings
        if settings.comm_hook is None:
            shared_gradients.register(self.model)
            return
        hook, state = HOOKS[settings.comm_hook], None
        if settings.comm_hook == "powersgd":
            state = powerSGD_hook.PowerSGDState(
                dist.group.WORLD,
                matrix_approximation_rank=settings.powersgd_rank,
                start_powerSGD_iter=settings.powersgd_start,
            )
        if settings.comm_wrapper is not None:
            hook = WRAPPERS[settings.comm_wrapper](hook)
        self.model.register_comm_hook(state, hook)

    def on_exception(self, exception: BaseException) -> None:
        """Does nothing: Lightning's hint names ``strategy=``, which is no setting here; see :func:`explained`."""


@contextmanager
def explained(strategy: Any) -> Iterator[None]:
    """Within this context, an error of DistributedDataParallel is replaced by one that names the ``ddp`` setting.

    Errors that no setting of ``ddp`` solves are not changed. ``strategy`` is a :class:`Strategy`.
    """
    try:
        yield
    except RuntimeError as error:
        explanation = _explanation(str(error), strategy.settings, strategy.trained)
        if explanation is None:
            raise
        raise SettingError(*explanation) from error


def _explanation(message: str, settings: DictConfig, trained: Sequence[str]) -> tuple[str, bool, str] | None:
    """Setting, value and hint of a :class:`SettingError`; None if the message is not about these settings.

    The matched texts are from reducer.cpp of torch 2.13.
    """
    if "Expected to mark a variable ready only once" in message:
        which = _named(re.findall(r"Parameter at index (\d+)", message), trained)
        if settings.find_unused_parameters:
            return (
                "ddp.find_unused_parameters",
                True,
                f"one backward pass reached a parameter twice{which}; use ddp.find_unused_parameters=false, or "
                "ddp.static_graph=true if each step uses the same parameters",
            )
        return (
            "ddp.static_graph",
            settings.static_graph,
            f"one backward pass reached a parameter twice{which}; use torch.utils.checkpoint with "
            "use_reentrant=False, or ddp.static_graph=true",
        )
    if "expect_autograd_hooks_ INTERNAL ASSERT" in message and settings.static_graph:
        return (
            "ddp.static_graph",
            True,
            "torch's DistributedDataParallel fails with it where batches are accumulated; use ddp.static_graph=false",
        )
    if "training graph has changed in this iteration" in message:
        return (
            "ddp.static_graph",
            True,
            "this step used other parameters than the first one; use ddp.static_graph=false "
            "ddp.find_unused_parameters=true",
        )
    if "Expected to have finished reduction in the prior iteration" not in message:
        return None
    indices = re.findall(r"did not receive grad for rank \d+: ([\d ]+)", message)
    which = _named(" ".join(indices).split(), trained)
    if settings.find_unused_parameters:
        return (
            "ddp.find_unused_parameters",
            True,
            f"the loss of a step did not use all that forward returned{which}; return only what the loss uses, or "
            "freeze the rest (requires_grad_(False))",
        )
    return (
        "ddp.find_unused_parameters",
        False,
        f"parameters had no part in the loss of a step{which}; use ddp.find_unused_parameters=true",
    )


def _named(indices: Sequence[str], trained: Sequence[str]) -> str:
    """The names of the parameters with these indices, in brackets; at most ``FEW`` of them."""
    names = [trained[int(each)] for each in indices if int(each) < len(trained)]
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return f" ({', '.join(names[:FEW])}{more})" if names else ""
