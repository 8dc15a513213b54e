"""Run directories that no run has made: a config.yaml and a checkpoint of any network. And networks of a user."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

HERE = __name__
DIGITS = {"_target_": "syncbn.training.Digits", "val_fraction": 0.15, "test_fraction": 0.2, "split_seed": 0}
CLASSIFIER = {"_target_": "syncbn.training.Classifier", "num_classes": 10}
MLP = {"_target_": "syncbn.training.MLP", "in_features": 64, "num_classes": 10, "depth": 1, "width": 8}


def crafted(
    where: Path, network: nn.Module | None, model: dict[str, Any], prefix: str = "network.", **settings: Any
) -> Path:
    """A run directory whose best checkpoint has the weights of ``network``.

    Args:
        where: the directory.
        network: None for a run without a checkpoint.
        model: its settings.
        prefix: in front of its weights.
        settings: of other groups, in place of the usual ones.
    """
    module = CLASSIFIER | {"network": model}
    written = {"data": DIGITS, "model": model, "norm": {"name": "sync"}, "module": module, "optimizer": {}}
    written |= {"scheduler": {}, "trainer": {"precision": "32-true"}, "logger": {}, "callbacks": {}} | settings
    where.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(written), where / "config.yaml")
    if network is not None:
        save(where, {f"{prefix}{name}": each for name, each in network.state_dict().items()})
    return where


def save(run_dir: Path, state: dict[str, Any], **more: Any) -> Path:
    """Writes the best checkpoint of a run."""
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    torch.save({"state_dict": state} | more, run_dir / "checkpoints/best.ckpt")
    return run_dir / "checkpoints/best.ckpt"


def seen_something(network: nn.Module, *shape: int) -> nn.Module:
    """The network, with running statistics that are not the initial ones."""
    with torch.no_grad():
        network.train()(2 * torch.randn(16, *shape) + 1)
    return network


class Head(nn.Module):
    """Flattens, normalizes and maps to scores."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.flatten(1)))


class Decides(Head):
    """Decides by the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.sum() > 0:
            return y
        return -y


class OneSize(Head):
    """Knows the size of its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(8, 64))


class Several(Head):
    """Returns a tuple and a dict."""

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = super().forward(x)
        return y, {"probabilities": y.softmax(1)}


class Pair(pl.LightningModule):
    """Has two networks that are alike, and no forward pass."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.student, self.teacher = Head(), Head()


class Compiled(nn.Module):
    """What ``torch.compile(module)`` makes of the names of weights, without the seconds that its import takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._orig_mod = network


class Own(pl.LightningModule):
    """Makes its network itself, compiles it, and calls it something else."""

    def __init__(self, hidden: int = 8, **_: Any) -> None:
        super().__init__()
        self.net = Compiled(Head(hidden))


class Adds(pl.LightningModule):
    """Adds a layer to the network that it is given."""

    def __init__(self, network: nn.Module, **_: Any) -> None:
        super().__init__()
        self.network, self.top = network, nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.network(x))


class Wraps(pl.LightningModule):
    """Gets a network, and keeps it by another name among other parts."""

    def __init__(self, backbone: nn.Module, **_: Any) -> None:
        super().__init__()
        self.body, self.projection = nn.Sequential(backbone), nn.Linear(10, 3)
