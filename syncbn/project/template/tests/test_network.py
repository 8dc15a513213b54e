"""The network takes the images, and its batch norm is synchronized."""

import torch
from my_project.images import Images
from my_project.network import Network

import syncbn


def test_the_network_takes_the_images() -> None:
    data = Images(batch_size=8)
    data.setup("fit")
    images, labels = data.parts[0][0]
    scores = Network(num_classes=10)(torch.stack([images, images]))
    assert scores.shape == (2, 10)
    assert 0 <= int(labels) < 10


def test_all_batch_norm_is_synchronized() -> None:
    network = syncbn.convert(Network(num_classes=10))
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 2
    assert all(isinstance(module, syncbn.SyncBatchNorm2d) for module in norms)
