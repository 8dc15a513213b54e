"""Training with Lightning: everything that ``train.py`` is made of, each part usable alone.

Names are imported on first use, since Lightning takes seconds to import and a mistyped setting should not cost them.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "AdaptStatistics": "adapt",
    "MLP": "models",
    "ResNet": "models",
    "Classifier": "classifier",
    "CorruptionSuite": "robustness",
    "Cosine": "schedules",
    "Digits": "data",
    "ExactSampler": "data",
    "GradientMonitor": "gradients",
    "ImageNet": "imagenet",
    "NonFiniteError": "finite",
    "PoolRunningStatistics": "norms",
    "PreciseStatistics": "precise",
    "SettingError": "schema",
    "StatisticsMonitor": "monitor",
    "StopOnNonFinite": "finite",
    "SyncBatchNormPlugin": "plugin",
    "TimeToTarget": "target",
    "first_non_finite_parameter": "finite",
    "main": "launch",
    "precise_statistics": "precise",
}

__all__ = [
    "MLP",
    "AdaptStatistics",
    "Classifier",
    "CorruptionSuite",
    "Cosine",
    "Digits",
    "ExactSampler",
    "GradientMonitor",
    "ImageNet",
    "NonFiniteError",
    "PoolRunningStatistics",
    "PreciseStatistics",
    "ResNet",
    "SettingError",
    "StatisticsMonitor",
    "StopOnNonFinite",
    "SyncBatchNormPlugin",
    "TimeToTarget",
    "first_non_finite_parameter",
    "main",
    "precise_statistics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
