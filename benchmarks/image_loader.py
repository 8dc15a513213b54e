"""Images per second of ``data=folder``'s training loader, without a network.

python -m benchmarks.image_loader DIR [augment]      # DIR has class folders; augment: none, standard, randaugment, ...
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from syncbn.training import ImageFolder

CONF = Path(__file__).parents[1] / "conf"
BATCH = 64


def main(root: str, augment: str = "none") -> None:
    settings: Any = None
    if augment != "none":
        settings = OmegaConf.to_container(OmegaConf.load(CONF / "augment" / f"{augment}.yaml"))
    torch.set_num_threads(1)
    print(f"{'workers':>8} {'cache':>6} {'epoch 1':>9} {'epoch 2':>9} {'epoch 3':>9}   images/s, augment={augment}")
    for workers in (0, 2):
        for cache in (None, 1.0):
            data = ImageFolder(root, BATCH, num_workers=workers, cache=cache, augment=settings)
            data.setup("fit")
            loader = data.train_dataloader()
            speeds = [_speed(loader, epoch) for epoch in range(3)]
            print(
                f"{workers:>8} {'no' if cache is None else 'yes':>6} " + " ".join(f"{each:>9,.0f}" for each in speeds)
            )


def _speed(loader: Any, epoch: int) -> float:
    loader.sampler.set_epoch(epoch)
    start = time.perf_counter()
    images = sum(len(labels) for _, labels in loader)
    return images / (time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
