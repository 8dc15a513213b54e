"""Batch norm's statistics from the test data, for as long as Lightning tests or predicts."""

import lightning.pytorch as pl

from syncbn.nn.adaptation import Adaptation, adapt
from syncbn.nn.conversion import Only
from syncbn.training.schema import AgreedError


class AdaptStatistics(pl.Callback):
    """Adapts batch norm layers (:func:`syncbn.adapt`) in tests and predictions; in validation they are as ever.

    What is tested is what the checkpoint holds, with other statistics: these stay as they are, and nothing of it is
    left afterwards. Ranks are to have equally many batches, which :func:`syncbn.training.data.exact_loader` gives.

    Args:
        prior: how many samples the running statistics count for; 0 for the test data alone.
        streaming: statistics of all samples since the test began, not of one batch.
        group: whose samples these are: "world", "node", a number of consecutive ranks, or a ProcessGroup.
        only: which layers, as for :func:`syncbn.convert`; names begin at the LightningModule.

    Raises:
        SettingError: before anything is done, what :func:`syncbn.adapt` refuses.
    """

    def __init__(
        self, prior: float = 16.0, streaming: bool = False, group: object = "world", only: Only = None
    ) -> None:
        self.prior, self.streaming, self.group, self.only = prior, streaming, group, only
        self._adaptation: Adaptation | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._adapt(pl_module)
        self._revert()  # it was to find out whether that can be done

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._adapt(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._revert()

    on_predict_start, on_predict_end = on_test_start, on_test_end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._revert()

    def _adapt(self, pl_module: pl.LightningModule) -> None:
        try:
            self._adaptation = adapt(
                pl_module, prior=self.prior, streaming=self.streaming, group=self.group, only=self.only
            )
        except (TypeError, ValueError) as error:
            raise AgreedError(f"AdaptStatistics: {error}") from error

    def _revert(self) -> None:
        if self._adaptation is not None:
            self._adaptation.revert()
        self._adaptation = None
