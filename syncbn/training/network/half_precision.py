"""Half precision of all weights (``bf16-true``, ``16-true``), with batch norm in float32."""

from typing import Any

from lightning.pytorch.plugins import HalfPrecision
from torch import nn

from syncbn.nn.torch_internals import BatchNormBase

PRECISIONS = ("bf16-true", "16-true")


class HalfPrecisionButBatchNorm(HalfPrecision):
    """Lightning's HalfPrecision, which leaves the batch norm layers' parameters and statistics as they are.

    bfloat16 has 8 bits: a running statistic that moves by a tenth of a small difference would not move at all. Torch's
    kernels and ours take float32 parameters with inputs in half precision, as they do under autocast.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        layers = [each for each in module.modules() if isinstance(each, BatchNormBase)]
        parameters = [(each, each.data) for layer in layers for each in layer.parameters(recurse=False)]
        buffers = [(layer, dict(layer.named_buffers(recurse=False))) for layer in layers]
        super().convert_module(module)
        for parameter, data in parameters:
            parameter.data = data
        for layer, before in buffers:
            for name, buffer in before.items():
                setattr(layer, name, buffer)
        return module


def plugins(settings: dict[str, Any]) -> list[HalfPrecision]:
    """The plugin for ``trainer.precision``, taken out of the Trainer's arguments; none for other precisions."""
    if settings.get("precision") not in PRECISIONS:
        return []
    return [HalfPrecisionButBatchNorm(settings.pop("precision"))]
