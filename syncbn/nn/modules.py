"""The synchronized layers: torch's batch norm classes with the statistics of a group of ranks in training."""

import inspect
from typing import Any

from torch import Tensor, nn

from syncbn.nn import functional
from syncbn.nn.autograd import epilogue
from syncbn.nn.comm import groups
from syncbn.nn.kernels.running_statistics import RunningStatistics
from syncbn.nn.torch_internals import BatchNormBase

OPTIONS = ("group", "ghost_batch", "biased_running_var", "fused_act")


def options(
    group: object, ghost_batch: int | None = None, biased_running_var: bool = False, act: str | None = None
) -> dict[str, Any]:
    """The checked attributes of a synchronized layer; those at their defaults are class attributes already.

    Raises:
        ValueError: an invalid group, a ghost batch below 1, or an unknown activation.
    """
    epilogue.check_act(act)
    if ghost_batch is not None and ghost_batch < 1:
        raise ValueError(f"ghost_batch={ghost_batch}: use 1 sample or more, or None")
    chosen = zip(OPTIONS, (groups.parse(group), ghost_batch, biased_running_var, act), strict=True)
    return {name: value for name, value in chosen if value not in (None, False)}


class Synchronized(BatchNormBase):
    """The common part of the synchronized layers; mixed in before a torch batch norm class.

    Parameters, buffers and state_dict are those of the torch class: checkpoints load both ways. In evaluation, and
    if no other rank shares the batch, the forward pass is torch's own.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: share of the new batch in the running statistics; None for the average over all batches.
        affine: learn a weight and a bias per channel.
        track_running_stats: keep running statistics; without them evaluation uses this rank's batch, as torch does.
        group: "world", "node", a number of consecutive ranks, a ProcessGroup, or a DeviceMesh of one dimension (see
            :mod:`syncbn.nn.comm.groups`). For a word or a number the layer makes its own process groups, on all ranks.
        ghost_batch: samples that share statistics, if fewer than the device holds (Hoffer et al. 2017). The batch is
            cut into chunks of this size, a rest joins the last, and there is no all-reduce. The running statistics move
            once, by the means over the chunks of their means and unbiased variances.
        biased_running_var: keep the variance divided by ``n``, as some published recipes do, instead of ``n - 1``.
        act: "relu" for an activation after the batch norm, or None. Among ranks that share statistics it costs no pass
            over the data on a GPU.
        device, dtype: of parameters and buffers.
        bias: with ``affine``, learn a bias; torch's keyword, from torch 2.13 on.

    Shape:
        Input and output ``(N, C)`` or ``(N, C, *)`` as the torch class takes them; ``N`` may be 0 on some ranks.
        ``mask``, optional: bool, broadcasts to ``(N, *)``; True counts. Masked positions are left out of the
        statistics on every rank, and their outputs and gradients are zero. ``residual``, optional: the shape of the
        input; added before the activation, as a residual block does. ``act``, optional: for a layer that was made
        without one.

    Raises:
        ValueError: an input with another number of channels or dimensions, before any all-reduce; one value per channel
            over the whole group in training.
    """

    group: groups.GroupSpec
    ghost_batch: int | None = None
    biased_running_var: bool = False
    fused_act: str | None = None  # not act: timm's subclasses have their own activation by that name
    name_in_model: str = ""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        group: object = "world",
        ghost_batch: int | None = None,
        biased_running_var: bool = False,
        act: str | None = None,
        device: Any = None,
        dtype: Any = None,
        bias: bool = True,
    ) -> None:
        keywords = {} if bias else {"bias": bias}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **keywords)
        self.__dict__ |= options(group, ghost_batch, biased_running_var, act)

    def forward(
        self, input: Tensor, mask: Tensor | None = None, *, residual: Tensor | None = None, act: str | None = None
    ) -> Tensor:
        x = input  # torch's name, for keyword calls and exported graphs
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        if x.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels (num_features), got input size {tuple(x.shape)}")
        kept = self.track_running_stats or not self.training  # torch's rule: evaluation uses buffers that are there
        running = RunningStatistics(
            self.running_mean if kept else None,
            self.running_var if kept else None,
            self.num_batches_tracked if kept else None,
            self.momentum,
            self.biased_running_var,
        )
        return functional.forward_pass(
            x,
            running,
            self.weight,
            self.bias,
            self.eps,
            training=self.training,
            group=self.group,
            ghost_batch=self.ghost_batch,
            mask=mask,
            act=self.fused_act if act is None else act,
            residual=residual,
            name=self.name_in_errors(),
        )

    def name_in_errors(self) -> str:
        """The layer's name in error messages: its name in the model if ``convert`` knew one."""
        return self.name_in_model or f"{type(self).__name__}({self.num_features})"

    def extra_repr(self) -> str:
        torch_says: str = super().extra_repr()  # type: ignore[no-untyped-call]
        more = [f"group={self.group!r}"]
        more += [f"{name}={getattr(self, name)!r}" for name in OPTIONS[1:] if getattr(self, name)]
        return ", ".join([torch_says, *more])

    @property
    def qconfig(self) -> Any:
        """torch's quantization setting; reading it also detects torch's ``convert_sync_batchnorm``.

        That function (torch 2.13) replaces any batch norm, this one included, by a ``torch.nn.SyncBatchNorm`` without
        an error. It reads ``qconfig`` of each layer, which is the only place where the layer can refuse.
        """
        frame = inspect.currentframe()
        caller = frame and frame.f_back
        if caller is not None and caller.f_code.co_name == "convert_sync_batchnorm":
            raise TypeError(
                f"{type(self).__name__} is synchronized already: drop torch.nn.SyncBatchNorm.convert_sync_batchnorm "
                "(in Lightning: Trainer(sync_batchnorm=True)), or call syncbn.revert(module) first"
            )
        if "qconfig" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute 'qconfig'")
        return self.__dict__["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self.__dict__["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        del self.__dict__["qconfig"]


class SyncBatchNorm1d(Synchronized, nn.BatchNorm1d):
    """Synchronized :class:`torch.nn.BatchNorm1d`: input ``(N, C)`` or ``(N, C, L)``."""


class SyncBatchNorm2d(Synchronized, nn.BatchNorm2d):
    """Synchronized :class:`torch.nn.BatchNorm2d`: input ``(N, C, H, W)``."""


class SyncBatchNorm3d(Synchronized, nn.BatchNorm3d):
    """Synchronized :class:`torch.nn.BatchNorm3d`: input ``(N, C, D, H, W)``."""


class SyncBatchNorm(Synchronized):
    """Counterpart of :class:`torch.nn.SyncBatchNorm`: input ``(N, C, *)`` with 2 or more dimensions.

    Not a subclass of torch's: its forward pass and DistributedDataParallel refuse that class on the CPU (torch 2.13).
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


def norm_act(layer: nn.Module, x: Tensor, act: str | None = "relu", residual: Tensor | None = None) -> Tensor:
    """``relu(layer(x) + residual)``: fused if ``layer`` is synchronized, else one operation after the other.

    For models whose layers may or may not be converted by :func:`syncbn.convert`.

    Args:
        layer: a batch norm or its replacement.
        x: its input.
        act: "relu", or None for no activation.
        residual: shape of ``x``, added before the activation; or None.

    Raises:
        ValueError: another activation; a residual of another shape, or on another device.
    """
    if isinstance(layer, Synchronized) and type(layer).forward is Synchronized.forward:
        y: Tensor = layer(x, residual=residual, act=act)
        return y
    epilogue.check(x, act, residual)
    return epilogue.apply(layer(x), act, residual)
