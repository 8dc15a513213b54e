"""Numbers that follow from the settings: devices, batch sizes, and how many samples share statistics."""

from omegaconf import DictConfig


def world_size(cfg: DictConfig) -> int:
    """The number of processes that train, over all nodes."""
    return int(cfg.trainer.devices * cfg.trainer.num_nodes)


def devices(cfg: DictConfig) -> int:
    """The number of devices whose batches make a global one: processes, or those that one process simulates."""
    return int(cfg.get("simulate") or world_size(cfg))


def in_one(cfg: DictConfig) -> int:
    """Batches of one accumulation that a process takes at once: all of them where it simulates devices, else one."""
    return int(cfg.trainer.get("accumulate_grad_batches") or 1) if cfg.get("simulate") else 1


def loader_batch(cfg: DictConfig) -> int:
    """Samples in a batch of the loaders, over all processes: by these a position in the data is counted."""
    return int(cfg.data.global_batch_size * in_one(cfg))


def counted_in(cfg: DictConfig) -> dict[str, int | None]:
    """What a position in the middle of an epoch is counted in, and would not mean the same with anything else."""
    return {"simulate": cfg.get("simulate"), "samples": loader_batch(cfg)}


def normalization_batch(cfg: DictConfig) -> int | None:
    """How many samples share batch statistics (Wu & Johnson 2021); None where no batch statistics are taken.

    For ``norm.group=node`` a node is taken to hold ``trainer.devices`` ranks.
    """
    if cfg.norm.name in ("none", "group_norm"):
        return None
    if cfg.norm.get("ghost_batch") is not None:
        return int(cfg.norm.ghost_batch)
    if cfg.norm.name == "torch_sync":
        return int(cfg.data.batch_size * devices(cfg))
    if cfg.norm.name != "sync":
        return int(cfg.data.batch_size)
    node = cfg.get("simulate") or cfg.trainer.devices
    ranks = {"world": devices(cfg), "node": node}.get(cfg.norm.group, cfg.norm.group)
    return int(cfg.data.batch_size * ranks)


def adaptation_batch(cfg: DictConfig) -> int:
    """How many samples ``adapt`` takes statistics of together, at most: what the group's loaders give in a batch."""
    if cfg.get("simulate"):
        return loader_batch(cfg)
    group = cfg.adapt.get("group", "world")
    return int(cfg.data.batch_size * {"world": world_size(cfg), "node": cfg.trainer.devices}.get(group, group))
