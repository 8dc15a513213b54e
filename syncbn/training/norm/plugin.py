"""Lightning's switch for layers that talk to each other, thrown for this package's layers."""

from lightning.pytorch.plugins import LayerSync
from torch import nn

from syncbn.nn.comm import c10d, groups
from syncbn.nn.conversion import convert, ddp_buffers
from syncbn.nn.modules import Synchronized


class SyncBatchNormPlugin(LayerSync):
    """Synchronizes the batch norm layers of a model while Lightning fits it, on CPU and GPU.

    ``Trainer(strategy="ddp", plugins=[SyncBatchNormPlugin(group="node")])``. Layers are converted when fitting begins
    and are what they were when it ends: classes, hooks, training flags. Lightning's own ``sync_batchnorm=True`` must be
    off. Running statistics that the whole world shares are equal on all ranks by themselves: they are made so once, at
    the start, and DistributedDataParallel need not broadcast them before every forward pass.

    Args:
        group: with whom the layers share statistics: "world", "node", a number of consecutive ranks, a ProcessGroup, or
            a DeviceMesh of one dimension. Process groups that the layers need are made when fitting begins.
        only: which layers, as for :func:`syncbn.convert`; names begin at the LightningModule.
        ghost_batch: samples that share statistics, where that is to be fewer than the device holds.

    Raises:
        ValueError: when fitting begins, a group that does not fit the world, or ``only`` that names no batch norm.
    """

    def __init__(self, group: object = "world", only: convert.Only = None, ghost_batch: int | None = None) -> None:
        self.group = groups.parse(group)
        self.only = only
        self.ghost_batch = ghost_batch
        self._found_synchronized: set[nn.Module] = set()
        self._found_ignored: list[str] | None = None

    def apply(self, model: nn.Module) -> nn.Module:
        """Converts; process groups are made here, where all ranks are, and not in the middle of the first batch."""
        groups.resolve(self.group)
        self._found_synchronized = _synchronized(model)
        convert.convert(model, group=self.group, only=self.only, ghost_batch=self.ghost_batch)
        if self.only is not None and _synchronized(model) == self._found_synchronized:
            names = [name for name, _ in convert.batch_norms(model)]
            raise ValueError(f"only={self.only!r} matches no batch norm layer; the names are {names}")
        self._found_ignored = c10d.ignored_by_ddp(model)
        return ddp_buffers.broadcast_buffers_once(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Takes back what ``apply`` did; layers that were synchronized before stay so."""
        c10d.restore_ignored_by_ddp(model, self._found_ignored)
        return convert.revert(model, only=lambda name, layer: layer not in self._found_synchronized)


def _synchronized(model: nn.Module) -> set[nn.Module]:
    return {layer for layer in model.modules() if isinstance(layer, Synchronized)}
