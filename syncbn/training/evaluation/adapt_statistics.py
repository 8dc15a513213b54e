"""Batch norm's statistics from the test data, for as long as Lightning tests or predicts."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from syncbn.nn.adaptation import Adaptation, adapt
from syncbn.nn.conversion.convert import Only, batch_norms
from syncbn.nn.torch_internals import tree_leaves
from syncbn.training.data.samplers import ExactSampler
from syncbn.training.errors import AgreedError

ORDER = 0  # the seed of the order in which a test's samples are dealt


class AdaptStatistics(pl.Callback):
    """Adapts batch norm layers (:func:`syncbn.adapt`) in tests and predictions; in validation they are as ever.

    What is tested is what the checkpoint holds, with other statistics: these stay as they are, and nothing of it is
    left afterwards. Ranks are to have equally many batches, as :func:`syncbn.training.data.exact_loader` gives.

    Batches should be fair samples of what is tested, and files often lie sorted by class: a test's samples are dealt in
    a random order, the same each time, where its loader is an ``exact_loader``. Any other loader of a test, and each of
    a prediction, keeps its order: shuffle there yourself, for the data set (``Subset(data, randperm)``).

    Args:
        prior: how many samples the running statistics count for; 0 for the test data alone.
        streaming: statistics of all samples since the test began, not of one batch.
        group: whose samples these are: "world", "node", a number of consecutive ranks, a ProcessGroup, or a
            DeviceMesh of one dimension.
        only: which layers, as for :func:`syncbn.convert`; names begin at the LightningModule.

    Raises:
        SettingError: before anything is done, what :func:`syncbn.adapt` refuses; where a module builds its layers in
            ``setup`` or ``configure_model``, once it has. When a test or prediction begins, on all ranks, that they
            do not have equally many batches and are to adapt together.
    """

    def __init__(
        self, prior: float = 16.0, streaming: bool = False, group: object = "world", only: Only = None
    ) -> None:
        self.prior, self.streaming, self.group, self.only = prior, streaming, group, only
        self._adaptation: Adaptation | None = None
        self._dealt: list[ExactSampler] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if any(batch_norms(pl_module)):
            self._try(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._try(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_batches(trainer.num_test_batches, pl_module.device)
        samplers = [getattr(loader, "sampler", None) for loader in tree_leaves(trainer.test_dataloaders)]
        self._dealt = [each for each in samplers if isinstance(each, ExactSampler) and each.shuffle_seed is None]
        for sampler in self._dealt:
            sampler.shuffle_seed = ORDER
        self._adapt(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._revert()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_batches(trainer.num_predict_batches, pl_module.device)
        self._adapt(pl_module)

    on_predict_end = on_test_end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._revert()

    def _try(self, pl_module: pl.LightningModule) -> None:
        """Finds out whether it can be done."""
        self._adapt(pl_module)
        self._revert()

    def _adapt(self, pl_module: pl.LightningModule) -> None:
        try:
            self._adaptation = adapt(
                pl_module, prior=self.prior, streaming=self.streaming, group=self.group, only=self.only
            )
        except (TypeError, ValueError) as error:
            raise AgreedError("AdaptStatistics", hint=str(error)) from error

    def _revert(self) -> None:
        if self._adaptation is not None:
            self._adaptation.revert()
        self._adaptation = None
        for sampler in self._dealt:
            sampler.shuffle_seed = None
        self._dealt = []

    def _check_batches(self, numbers: Sequence[float], device: torch.device) -> None:
        """Refuses ranks of which one would wait for the others without end: a forward pass is a message."""
        if self.group == 1 or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        mine = torch.tensor([float(n) for n in numbers], device=device)
        most, least = mine.clone(), mine.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        for high, low in zip(most.tolist(), least.tolist(), strict=True):
            if high != low:
                raise AgreedError(
                    "AdaptStatistics",
                    hint=f"ranks have {low:g} to {high:g} batches, and adapt together in each; use loaders that give "
                    "them equally many (syncbn.training.data.exact_loader), or group=1",
                )
