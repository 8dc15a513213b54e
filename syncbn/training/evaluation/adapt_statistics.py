"""A callback that adapts batch norm statistics to the test data while Lightning tests or predicts."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from syncbn.nn.adaptation import Adaptation, adapt
from syncbn.nn.conversion.convert import Only, batch_norms
from syncbn.nn.torch_internals import tree_leaves
from syncbn.training.data.samplers import ExactSampler
from syncbn.training.errors import AgreedError

ORDER_SEED = 0  # seed of the order of a test's samples


class AdaptStatistics(pl.Callback):
    """Adapts batch norm layers (:func:`syncbn.adapt`) in tests and predictions, not in validations.

    The test uses the weights of the checkpoint with other statistics. The running statistics are not changed, and the
    layers are restored afterwards. All ranks need the same number of batches, as with
    :func:`syncbn.training.data.exact_loader`.

    Batches should be random samples of the test data, but files are often sorted by class. Therefore an
    ``exact_loader`` of a test gets a random order, the same each time. Any other loader of a test, and every loader of
    a prediction, keeps its order; shuffle the data set yourself there (``Subset(data, randperm)``).

    Args:
        prior: number of samples that the running statistics count as; 0 to use the test data only.
        streaming: use statistics of all samples since the test began, instead of one batch.
        group: the ranks that share these statistics: "world", "node", a number of consecutive ranks, a ProcessGroup, or
            a one-dimensional DeviceMesh.
        only: selects layers, as for :func:`syncbn.convert`; names begin at the LightningModule.

    Raises:
        AgreedError: at the start of the run, if :func:`syncbn.adapt` raises for this model (after ``setup`` and
            ``configure_model``, if the module builds its layers there); when a test or prediction begins, if ranks that
            adapt together have different numbers of batches. Raised on all ranks.
    """

    def __init__(
        self, prior: float = 16.0, streaming: bool = False, group: object = "world", only: Only = None
    ) -> None:
        self.prior, self.streaming, self.group, self.only = prior, streaming, group, only
        self._adaptation: Adaptation | None = None
        self._shuffled: list[ExactSampler] = []  # samplers that the current test has given a random order

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if any(batch_norms(pl_module)):
            self._dry_run(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._dry_run(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_batches(trainer.num_test_batches, pl_module.device)
        samplers = [getattr(loader, "sampler", None) for loader in tree_leaves(trainer.test_dataloaders)]
        self._shuffled = [each for each in samplers if isinstance(each, ExactSampler) and each.shuffle_seed is None]
        for sampler in self._shuffled:
            sampler.shuffle_seed = ORDER_SEED
        self._adapt(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._revert()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_batches(trainer.num_predict_batches, pl_module.device)
        self._adapt(pl_module)

    on_predict_end = on_test_end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._revert()

    def _dry_run(self, pl_module: pl.LightningModule) -> None:
        """Adapt and revert, so that an unsuitable model or setting raises before training."""
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
        for sampler in self._shuffled:
            sampler.shuffle_seed = None
        self._shuffled = []

    def _check_batches(self, numbers: Sequence[float], device: torch.device) -> None:
        """Check that all ranks have the same number of batches: adapting calls a collective in each forward pass."""
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
                    hint=f"ranks have {low:g} to {high:g} batches, but adapt together in each; use loaders with the "
                    "same number on each rank (syncbn.training.data.exact_loader), or group=1",
                )
