"""The public function :func:`syncbn.load`: a trained network in evaluation mode."""

import os
from typing import Any

import torch
from torch import nn

from syncbn.inference.trained import open_run

ADDED = ("classes", "preprocess")  # attributes of the returned network


def load(
    run_or_checkpoint: str | os.PathLike[str],
    *,
    network: nn.Module | None = None,
    part: str | None = None,
    trust: bool = False,
    device: torch.device | str | None = None,
) -> Any:
    """Load a trained network, in evaluation mode, with torch's own batch norm layers.

    Example::

        network = syncbn.load("outputs/mine")
        scores = network(network.preprocess("photo.jpg").unsqueeze(0))
        print(network.classes[scores.argmax()])

    The network has two attributes more: ``classes``, the names of the classes in the order of the outputs, and
    ``preprocess``, which makes an input of the path of an image file or of a Pillow image. They are None if the data
    module of the run has not saved them, and a network that has attributes of these names keeps its own.

    The weights are those of the best checkpoint, or of the newest if the run keeps no best. The outputs are bitwise
    those of the run's own test on the same machine, in batches of the same size (with ``trainer.precision=bf16-mixed``
    or ``16-mixed`` within ``torch.autocast``).

    Args:
        run_or_checkpoint: a run directory, a checkpoint file, or a directory that holds exactly one run.
        network: the network, built as before training; it is loaded in place and returned. Without it the network is
            built from the run's ``config.yaml``.
        part: the part of a LightningModule to take, if it has several networks: ``"generator"``. ``""`` takes
            the whole module, with its own forward pass.
        trust: allow classes that the run's ``config.yaml`` names, such as a network of your own, to be imported and
            called. Networks of syncbn, torch, torchvision and timm need no trust.
        device: where to put the network; the CPU if it is None.

    Returns:
        The network, an ``nn.Module``.

    Raises:
        SettingError: a ValueError of one line: there is no checkpoint, it does not fit, or it names a class that is
            refused.
    """
    trained = open_run(run_or_checkpoint, network=network, part=part, trust=trust)
    loaded: Any = trained.network
    for name, value in zip(ADDED, (trained.classes, trained.preprocessing), strict=True):
        if not hasattr(loaded, name):
            setattr(loaded, name, value)
    return loaded if device is None else loaded.to(device)
