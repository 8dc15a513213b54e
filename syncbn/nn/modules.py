"""The layers: torch's batch norm classes, normalizing with the statistics of a group of ranks while they train."""

import inspect
from typing import Any

from torch import Tensor, nn

from syncbn.nn import epilogue, functional
from syncbn.nn.comm import groups
from syncbn.nn.kernels.running_statistics import RunningStatistics
from syncbn.nn.torch_internals import BatchNormBase

OPTIONS = ("group", "ghost_batch", "biased_running_var", "fused_act")


def options(
    group: object, ghost_batch: int | None = None, biased_running_var: bool = False, act: str | None = None
) -> dict[str, Any]:
    """The attributes that make a torch layer one of these, checked; those at their defaults are left to the class.

    Raises:
        ValueError: a group that is none, a ghost batch below 1, or an activation that the layer does not have.
    """
    epilogue.check_act(act)
    if ghost_batch is not None and ghost_batch < 1:
        raise ValueError(f"ghost_batch={ghost_batch}: use 1 sample or more, or None")
    chosen = zip(OPTIONS, (groups.parse(group), ghost_batch, biased_running_var, act), strict=True)
    return {name: value for name, value in chosen if value not in (None, False)}


class Synchronized(BatchNormBase):
    """What the synchronized layers have in common; mixed in before a torch batch norm class.

    Parameters, buffers and state_dict are those of the torch class: checkpoints load both ways. In evaluation, and
    where there is nobody to share with, the forward pass is torch's own.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: share of the new batch in the running statistics; None for the average over all batches.
        affine: learn a weight and a bias per channel.
        track_running_stats: keep running statistics; without them evaluation uses this rank's batch, as torch does.
        group: "world", "node", a number of consecutive ranks, a ProcessGroup, or a DeviceMesh of one dimension (see
            :mod:`syncbn.nn.comm.groups`). For a word or a number the layer makes its own process groups, on all ranks.
        ghost_batch: samples that share statistics, where that is to be fewer than the device holds (Hoffer et al.
            2017): the batch is cut into chunks of so many, the rest joining the last, and nothing is exchanged. The
            running statistics move once, by the means over the chunks of their means and unbiased variances.
        biased_running_var: keep the variance divided by ``n``, as some published recipes do, not by ``n - 1``.
        act: "relu" for an activation after the batch norm, or None. While ranks share it costs no pass over the data on
            a GPU.
        device, dtype: of parameters and buffers.
        bias: with ``affine``, learn a bias; torch's keyword, from the version on that has it (2.13).

    Shape:
        Input and output ``(N, C)`` or ``(N, C, *)`` as the torch class takes them; ``N`` may be 0 on some ranks.
        ``mask``, optional: bool, broadcasts to ``(N, *)``; True counts. What is masked is left out of the statistics,
        on every rank, and its outputs and gradients are zero. ``residual``, optional: the shape of the input; added
        before the activation, as a residual block does. ``act``, optional: for a layer that was made without.

    Raises:
        ValueError: an input with another number of channels or dimensions, before any message; one value per channel
            over the whole group in training.
    """

    group: groups.GroupSpec
    ghost_batch: int | None = None
    biased_running_var: bool = False
    fused_act: str | None = None  # not act: subclasses of torch's have an activation of their own by that name
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
        x = input  # torch's name for it, by which a call may give it and an exported graph knows it
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
        """What errors call this layer: its name where ``convert`` knew one."""
        return self.name_in_model or f"{type(self).__name__}({self.num_features})"

    def extra_repr(self) -> str:
        torch_says: str = super().extra_repr()  # type: ignore[no-untyped-call]
        more = [f"group={self.group!r}"]
        more += [f"{name}={getattr(self, name)!r}" for name in OPTIONS[1:] if getattr(self, name)]
        return ", ".join([torch_says, *more])

    @property
    def qconfig(self) -> Any:
        """torch's quantization setting; also where torch's ``convert_sync_batchnorm`` is noticed.

        That function builds a ``torch.nn.SyncBatchNorm`` out of any batch norm, this one included, and would drop ours
        in silence. It asks each layer for ``qconfig`` on the way.
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
    """The twin of :class:`torch.nn.SyncBatchNorm`: input ``(N, C, *)`` with any number of dimensions from 2 up.

    Not a subclass of torch's, which neither its own forward pass nor DistributedDataParallel lets run on the CPU.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


def norm_act(layer: nn.Module, x: Tensor, act: str | None = "relu", residual: Tensor | None = None) -> Tensor:
    """``relu(layer(x) + residual)``: in one, where ``layer`` is synchronized; else one after the other.

    For models whose layers may be converted or not: :func:`syncbn.convert` makes theirs the fused form.

    Args:
        layer: a batch norm, or what took its place.
        x: its input.
        act: "relu", or None for no activation.
        residual: shape of ``x``, added before the activation; None for nothing.

    Raises:
        ValueError: another activation; a residual of another shape, or on another device.
    """
    if isinstance(layer, Synchronized) and type(layer).forward is Synchronized.forward:
        y: Tensor = layer(x, residual=residual, act=act)
        return y
    epilogue.check_added(x, act, residual)
    return epilogue.finished(layer(x), act, residual)
