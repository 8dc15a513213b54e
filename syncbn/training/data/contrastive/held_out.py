"""Batches of held-out images, composed as those of training."""

from collections.abc import Callable, Iterator, Sized
from itertools import count
from typing import Any, cast

from torch.utils.data import DataLoader

from syncbn.training.data.batches import Batches
from syncbn.training.data.loaders import BatchLoader, TrainLoader, train_loader
from syncbn.training.data.samplers import world_size
from syncbn.training.errors import AgreedError

SEED = 0  # not that of the run: runs are measured on the same images and views


def held_out_loader(trainer: Any, make_error: Callable[..., AgreedError]) -> TrainLoader:
    """Make a loader of the validation data with batches as large as those of training, in a random order.

    Each rank holds as many samples as in training, and the global batches are the same on any number of ranks.

    Args:
        trainer: that fits; its data sets are map-style.
        make_error: called with ``hint=``, if no such loader can be made; the result is raised.
    """
    if trainer.val_dataloaders is None:  # with check_val_every_n_epoch above 1 Lightning 2.6 makes it later
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loader, training = trainer.val_dataloaders, trainer.train_dataloader
    loader = loader[0] if isinstance(loader, list) and loader else loader
    if isinstance(loader, BatchLoader) and isinstance(loader.dataset, Batches):
        dataset, collate = loader.dataset.dataset, loader.dataset.collate
    elif isinstance(loader, DataLoader) and hasattr(loader.dataset, "__getitem__"):
        dataset, collate = loader.dataset, loader.collate_fn
    else:
        raise make_error(hint="there is no validation loader over a map-style data set; pass batches=")
    if isinstance(training, TrainLoader):
        size = training.sampler.global_batch // training.sampler.num_replicas
    else:
        size = getattr(training, "batch_size", None) or 0
    images, needed = len(cast(Sized, dataset)), size * world_size()
    if not 0 < needed <= images:
        raise make_error(
            hint=f"a batch of all devices has {needed} images, and the validation data have {images}; use more"
        )
    return train_loader(dataset, size, seed=SEED, collate_fn=collate)


def batches_without_end(loader: TrainLoader) -> Iterator[Any]:
    """Yield the batches of epoch 0, 1, and so forth; the random draws for a sample differ between epochs."""
    for epoch in count():
        loader.sampler.set_position(epoch, 0)
        yield from loader
