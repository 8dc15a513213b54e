"""Applies the settings about the network to a new LightningModule, in the only order that works."""

from collections.abc import Callable

from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import nn

from syncbn.training.config.trust import BY_NAME
from syncbn.training.network import checkpoint_activations, freeze, init_from
from syncbn.training.network.channels_last import networks, use_channels_last


def prepare(
    module: LightningModule, cfg: DictConfig, *, begins: bool, report: Callable[[str], None]
) -> LightningModule:
    """Apply ``init_from``, ``freeze``, ``channels_last``, ``checkpoint_activations`` and ``compile`` in place.

    The layers of ``norm=sync`` are converted later, in place. torch compiles in the first forward pass, after that.

    Args:
        module: with the batch norm that it was built with, or its replacement by ``norm=none`` and ``group_norm``.
        cfg: settled settings.
        begins: a training begins here, which no checkpoint continues; otherwise ``init_from`` is not loaded.
        report: called with lines for the user.

    Raises:
        SettingError: for the first setting that does not fit this network.
    """
    if begins and cfg.init_from is not None:
        init_from.load(module, cfg.init_from, report)
    if cfg.freeze:
        freeze.freeze(module, cfg.freeze)
    if cfg.channels_last:
        use_channels_last(module)
    if cfg.checkpoint_activations:
        checkpoint_activations.checkpoint(module, cfg.checkpoint_activations)
    if cfg.compile:
        compile_networks(module, cfg.compile_mode)
    return module


def without_pretrained(module: DictConfig) -> DictConfig:
    """Settings of a LightningModule whose network of timm or torchvision is built without pretrained weights."""
    network = module.get("network")
    if not OmegaConf.is_dict(network) or network.get("_target_") not in BY_NAME or not network.get("pretrained"):
        return module
    return OmegaConf.merge(module, {"network": {"pretrained": False}})  # type: ignore[return-value]


def compile_networks(module: nn.Module, mode: str | None = None) -> None:
    """Compile the networks in place, so that names in checkpoints stay the same.

    ``nn.Module.compile`` replaces the call of the module and not the module, as ``torch.compile(module)`` would.

    Args:
        module: a LightningModule.
        mode: of ``torch.compile``; None for its default.
    """
    for network in networks(module).values():
        network.compile(mode=mode)
