"""A callback that saves the first test images with their true and their predicted masks."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from syncbn.training.errors import SettingError
from syncbn.training.plots import figure, masks

FILE, PICTURE = "examples.npz", "examples.png"


class SegmentationExamples(pl.Callback):
    """Saves the first images of the first test: ``examples.npz``, and ``examples.png``.

    It needs a ``test_step`` that returns the predicted classes of the pixels as ``{"preds": (N, H, W), ...}``, as the
    built-in Segmentation does, and batches of images and masks. Otherwise nothing is saved. The images are those of
    rank 0.

    Args:
        count: number of images.
        directory: of the files; None for ``trainer.log_dir``.
        picture: whether to draw the picture.

    Raises:
        SettingError: ``count`` below 1.
    """

    def __init__(self, count: int = 6, directory: str | Path | None = None, *, picture: bool = True) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise SettingError("callbacks.examples.count", count, "use a whole number, 1 or more")
        self.count, self.directory, self.picture = count, directory, picture
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []
        self._saved = False

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        predicted = outputs.get("preds") if isinstance(outputs, dict) else None
        if self._saved or not isinstance(predicted, Tensor) or predicted.dim() != 3 or not trainer.is_global_zero:
            return
        left = self.count - sum(len(images) for images, _, _ in self._found)
        if left > 0:
            self._found.append((batch[0][:left].float().cpu(), batch[1][:left].cpu(), predicted[:left].cpu()))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # trainer.log_dir broadcasts rank 0's directory, so all ranks have to read it (Lightning 2.6).
        directory = trainer.log_dir if self.directory is None else self.directory
        if not self._found:
            return
        images, truth, predicted = (torch.cat(each) for each in zip(*self._found, strict=True))
        self._found, self._saved = [], True
        rows = {masks.TRUTH: truth.byte().numpy(), "prediction": predicted.byte().numpy()}
        path = Path(directory or trainer.default_root_dir)
        path.mkdir(parents=True, exist_ok=True)
        pixels = masks.as_pixels(images.numpy())
        masks.write(path / FILE, pixels, rows)
        if self.picture:
            figure.attempt(PICTURE, lambda: _draw(path / PICTURE, pixels, rows))


def _draw(path: Path, images: Any, rows: dict[str, Any]) -> None:
    with figure.style():
        figure.save(masks.draw(images, rows, f"test of {path.parent.name}: the first {len(images)} images"), path)
