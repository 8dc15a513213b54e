"""The Lightning plugin that synchronizes batch norm layers while the Trainer fits a model."""

from lightning.pytorch.plugins import LayerSync
from torch import nn

from syncbn.nn.comm import c10d, groups
from syncbn.nn.conversion import convert, ddp_buffers
from syncbn.nn.modules import Synchronized


class SyncBatchNormPlugin(LayerSync):
    """Synchronizes the batch norm layers of a model while Lightning fits it, on CPU and GPU.

    Example::

        Trainer(strategy="ddp", plugins=[SyncBatchNormPlugin(group="node")])

    Layers are converted when fitting begins. When it ends, their classes, hooks and training flags are restored.
    Lightning's own ``sync_batchnorm=True`` must be off. Running statistics that the whole world shares stay equal on
    all ranks. They are broadcast once at the start, and DistributedDataParallel need not broadcast them before every
    forward pass.

    Args:
        group: the ranks that share statistics: "world", "node", a number of consecutive ranks, a ProcessGroup, or a
            one-dimensional DeviceMesh. Process groups that the layers need are created when fitting begins.
        only: selects layers, as for :func:`syncbn.convert`; names begin at the LightningModule.
        ghost_batch: number of samples that share statistics, if it is to be smaller than the device's batch.

    Raises:
        ValueError: when fitting begins, if the group does not fit the world, or ``only`` matches no batch norm layer.
    """

    def __init__(self, group: object = "world", only: convert.Only = None, ghost_batch: int | None = None) -> None:
        self.group = groups.parse(group)
        self.only = only
        self.ghost_batch = ghost_batch
        self._found_synchronized: set[nn.Module] = set()
        self._found_ignored: list[str] | None = None

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert the layers."""
        groups.resolve(self.group)  # creates the process groups, a collective, while all ranks are here
        self._found_synchronized = _synchronized(model)
        convert.convert(model, group=self.group, only=self.only, ghost_batch=self.ghost_batch)
        if self.only is not None and _synchronized(model) == self._found_synchronized:
            names = [name for name, _ in convert.batch_norms(model)]
            raise ValueError(f"only={self.only!r} matches no batch norm layer; the names are {names}")
        self._found_ignored = c10d.ignored_by_ddp(model)
        return ddp_buffers.broadcast_buffers_once(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Undo ``apply``; layers that were already synchronized before it stay synchronized."""
        c10d.restore_ignored_by_ddp(model, self._found_ignored)
        return convert.revert(model, only=lambda name, layer: layer not in self._found_synchronized)


def _synchronized(model: nn.Module) -> set[nn.Module]:
    return {layer for layer in model.modules() if isinstance(layer, Synchronized)}
