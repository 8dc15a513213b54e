"""The Lightning plugin of ``norm=shuffle``: samples are permuted over the devices before a part, restored after it."""

import hashlib
import weakref
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, nn

from syncbn.nn import functional, shuffling, torch_internals
from syncbn.nn.comm import groups
from syncbn.nn.shuffling import Shuffled
from syncbn.training.errors import AgreedError
from syncbn.training.norm.shuffled_part import shuffled_part


class ShufflePlugin(LayerSync):
    """Shuffles the samples of one part of a LightningModule over the devices, in training (He et al. 2020).

    Example::

        Trainer(strategy="ddp", plugins=[ShufflePlugin("key_network", seed=1)])

    Each forward pass of the part in training mode gets its samples in a new order, and returns its outputs in the
    given order. See :func:`syncbn.shuffle`. Batch norm layers are torch's. The order depends on the seed, the number
    of the batch in training and the number of the call within it, so that a resumed run draws the same.

    The first dimension of each tensor among the part's arguments, and of each output, must be that of the samples.
    Outputs may be a tensor or nested tuples, lists and dictionaries of tensors.

    Args:
        part: the dotted name of a submodule of the LightningModule.
        seed: the same on all ranks.
        batches_at_once: so many batches, one after the other, are in each batch of a process that simulates devices;
            each is shuffled by itself.
        layers: another plugin, for the batch norm layers; Lightning takes one alone.

    Raises:
        AgreedError: when fitting begins, if there is no such submodule or it has no batch norm; in its forward pass,
            if its arguments or outputs are others.
    """

    def __init__(
        self, part: str = "network", *, seed: int = 0, batches_at_once: int = 1, layers: LayerSync | None = None
    ) -> None:
        self.part, self.seed, self.batches_at_once, self.layers = part, seed, batches_at_once, layers
        self._hooks: list[Any] = []
        self.has_shuffled = False

    def apply(self, model: nn.Module) -> nn.Module:
        """Add the hooks to the part."""
        part = shuffled_part(model, self.part)
        groups.resolve("world")  # creates the process group, a collective, while all ranks are here
        if self.layers is not None:
            self.layers.apply(model)
        around = _AroundPart(self, model)
        self._hooks = [
            part.register_forward_pre_hook(around.shuffle, with_kwargs=True),
            part.register_forward_hook(around.restore),
        ]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Remove the hooks."""
        while self._hooks:
            self._hooks.pop().remove()
        return model if self.layers is None else self.layers.revert(model)


class RefuseUnshuffled(pl.Callback):
    """Raises after the first batch if the part did not shuffle: ``part.forward(x)`` calls no hooks, for example."""

    def __init__(self, plugin: ShufflePlugin) -> None:
        self._plugin = plugin

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        if not self._plugin.has_shuffled:
            hint = "training_step did not call this part as part(x), so nothing was shuffled; name one that it calls"
            raise AgreedError("norm.part", self._plugin.part, hint)


class _AroundPart:
    """The hooks before and after the forward pass of the part."""

    def __init__(self, plugin: ShufflePlugin, model: nn.Module) -> None:
        self._plugin = plugin
        self._model = weakref.ref(model)  # a deep copy of the part has a copy of its hooks, not of the trainer
        self._at, self._calls = -1, 0  # the batch, and how often it has come here
        self._shuffled: Shuffled | None = None

    def shuffle(self, part: nn.Module, args: Any, kwargs: Any) -> Any:
        """Permutes the samples in the arguments."""
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._shuffle)(part, args, kwargs)
        return self._shuffle(part, args, kwargs)

    def restore(self, part: nn.Module, args: Any, output: Any) -> Any:
        """Restores the order of the samples in the outputs."""
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._restore)(part, output)
        return self._restore(part, output)

    def _shuffle(self, part: nn.Module, args: Any, kwargs: Any) -> Any:
        self._shuffled = None
        if not part.training:
            return args, kwargs
        tensors = [each for each in torch_internals.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        shapes = [tuple(each.shape) for each in tensors]
        if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
            raise self._error(f"its tensor arguments have the shapes {shapes}; all must begin with the samples")
        call = self._call()

        def moved(each: Any) -> Any:
            if not isinstance(each, Tensor):
                return each
            self._shuffled = self._shuffled_samples(each, call)
            return self._shuffled.samples

        return torch_internals.tree_map(moved, (args, kwargs))

    def _restore(self, part: nn.Module, output: Any) -> Any:
        shuffled, self._shuffled = self._shuffled, None
        if shuffled is None:
            return output
        samples = len(shuffled.samples)

        def restored(each: Any) -> Any:
            if each is None:
                return None
            if not isinstance(each, Tensor):
                raise self._error(f"one of its outputs is {type(each).__name__}; all must be tensors")
            if each.dim() == 0 or len(each) != samples:
                raise self._error(
                    f"one of its outputs has the shape {tuple(each.shape)}; all must begin with the samples"
                )
            return shuffled.restore(each)

        self._plugin.has_shuffled = True
        return torch_internals.tree_map(restored, output)

    def _call(self) -> int:
        """The number of this call of the part within the batch."""
        if functional.recomputing():
            if self._calls == 1:
                return 0
            raise self._error(
                f"activation checkpointing recomputes it, and a batch calls it {self._calls} times, so its order is "
                "not known; recompute parts inside it"
            )
        if (at := self._batch()) != self._at:
            self._at, self._calls = at, 0
        self._calls += 1
        return self._calls - 1

    def _batch(self) -> int:
        model: Any = self._model()
        at: int = model.trainer.fit_loop.total_batch_idx
        return at

    def _shuffled_samples(self, x: Tensor, call: int) -> Shuffled:
        many = self._plugin.batches_at_once
        first = self._at * many
        seeds = [_seed(self._plugin.seed, batch, call) for batch in range(first, first + many)]
        if many == 1:
            return shuffling.shuffle(x, seed=seeds[0])
        if len(x) % many:
            raise self._error(f"its {len(x)} samples cannot be cut into {many} batches of gradient accumulation")
        size = len(x) // many
        parts = [shuffling.random_permutation(size, seed) + size * number for number, seed in enumerate(seeds)]
        return shuffling.shuffle(x, permutation=torch.cat(parts))

    def _error(self, hint: str) -> AgreedError:
        return AgreedError("norm.part", self._plugin.part, hint)


def _seed(*numbers: int) -> int:
    """A seed of 63 bits that is another one for other numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1
