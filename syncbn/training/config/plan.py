"""The plan of a run: its settled settings, and the numbers that are derived from them."""

from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf


@dataclass(frozen=True)
class Plan:
    """The plan of a run that can start. :func:`syncbn.training.config.settle.settle` makes it; nothing changes it.

    Attributes:
        cfg: settled settings, read-only, with the checkpoint that the user named; see :meth:`settings`.
        run_dir: the run directory; it need not exist yet.
        accelerator: "cpu" or "gpu".
        devices: processes per node.
        num_nodes: how many nodes.
        simulated: how many devices the one process simulates; None where devices are real.
        batch_size: samples per device and step.
        global_batch_size: samples per step over all devices.
        batches_at_once: how many batches of one gradient accumulation a process computes together: all of them if it
            simulates devices, otherwise 1.
        normalization_batch: how many samples share batch statistics (Wu & Johnson 2021, arXiv:2105.07576); None if the
            norm takes no batch statistics. For ``norm.group=node`` a node has ``devices`` ranks.
        checkpoint: the checkpoint that the run starts from, or tests; None for none.
        restore: "all" continues the training of the checkpoint, "weights" takes only its weights; None if that is not
            decided yet or there is no checkpoint.
    """

    cfg: DictConfig
    run_dir: Path
    accelerator: str
    devices: int
    num_nodes: int
    simulated: int | None
    batch_size: int
    global_batch_size: int
    batches_at_once: int
    normalization_batch: int | None
    checkpoint: str | None
    restore: str | None

    @classmethod
    def of(cls, cfg: DictConfig, run_dir: Path) -> "Plan":
        """The plan of settings that are settled already, such as those in a ``config.yaml``."""
        cfg = cfg.copy()
        trainer, simulated = cfg.trainer, cfg.get("simulate")
        OmegaConf.set_readonly(cfg, True)
        return cls(
            cfg=cfg,
            run_dir=run_dir,
            accelerator=trainer.accelerator,
            devices=int(trainer.devices),
            num_nodes=int(trainer.num_nodes),
            simulated=simulated,
            batch_size=int(cfg.data.batch_size),
            global_batch_size=int(cfg.data.global_batch_size),
            batches_at_once=int(trainer.get("accumulate_grad_batches") or 1) if simulated else 1,
            normalization_batch=_normalization_batch(cfg),
            checkpoint=cfg.get("ckpt_path"),
            restore=cfg.get("ckpt_restore"),
        )

    @property
    def world_size(self) -> int:
        """The number of processes that train, over all nodes."""
        return self.devices * self.num_nodes

    @property
    def replicas(self) -> int:
        """The number of devices whose batches make up a global batch, real or simulated."""
        return self.simulated or self.world_size

    @property
    def loader_batch_size(self) -> int:
        """Samples in a batch of the loaders, over all processes. A position in the data is counted in these."""
        return self.global_batch_size * self.batches_at_once

    @property
    def position_unit(self) -> dict[str, int | None]:
        """The unit of a position in the middle of an epoch. In another unit the same position is at other samples."""
        return {"simulate": self.simulated, "samples": self.loader_batch_size}

    @property
    def adaptation_batch(self) -> int:
        """The largest number of samples whose statistics ``adapt`` pools: one batch of each loader in the group."""
        if self.simulated:
            return self.loader_batch_size
        group = self.cfg.adapt.get("group", "world")
        return int(self.batch_size * {"world": self.world_size, "node": self.devices}.get(group, group))

    def starting_from(self, checkpoint: str | Path | None, restore: str | None) -> "Plan":
        """The same run, started from another checkpoint."""
        return replace(self, checkpoint=None if checkpoint is None else str(checkpoint), restore=restore)

    def settings(self) -> DictConfig:
        """The settings by which every rank makes this plan: those of ``cfg``, with the start of the run."""
        cfg = self.cfg.copy()
        OmegaConf.set_readonly(cfg, False)
        cfg.ckpt_path, cfg.ckpt_restore = self.checkpoint, self.restore
        return cfg


def _normalization_batch(cfg: DictConfig) -> int | None:
    norm, size = cfg.norm, int(cfg.data.batch_size)
    replicas = int(cfg.get("simulate") or cfg.trainer.devices * cfg.trainer.num_nodes)
    if norm.name in ("none", "group_norm"):
        return None
    if norm.get("ghost_batch") is not None:
        return int(norm.ghost_batch)
    if norm.name == "torch_sync":
        return size * replicas
    if norm.name != "sync":
        return size
    node = cfg.get("simulate") or cfg.trainer.devices
    return int(size * {"world": replicas, "node": node}.get(norm.group, norm.group))
