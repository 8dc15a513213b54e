"""Training with Lightning: the parts of ``train.py``, each of which can be used on its own.

Names are imported on first use. Lightning takes seconds to import, and a mistyped setting is to be reported before.
"""

from importlib import import_module
from typing import Any

HOME = {  # the module of each name, within this package
    "AdaptStatistics": "evaluation.adapt_statistics",
    "MLP": "models.networks",
    "ResNet": "models.networks",
    "CheckDirectories": "launch.check_directories",
    "CIFAR": "data.image_archives",
    "CIFARMosaics": "data.segmentation.mosaics",
    "CIFARViews": "data.contrastive.cifar_views",
    "Classifier": "models.classifier",
    "CorruptionSuite": "evaluation.corruption_suite",
    "Cosine": "models.lr_schedules",
    "EvaluationMetrics": "metrics.evaluation_metrics",
    "EMA": "optimization.weight_average",
    "OneCycle": "models.lr_schedules",
    "SWA": "optimization.weight_average",
    "Steps": "models.lr_schedules",
    "lightning_config": "models.lr_schedules",
    "parameter_groups": "models.parameter_groups",
    "DeepLab": "models.segmentation.deeplab",
    "Digits": "data.digits",
    "DigitScenes": "data.segmentation.digit_scenes",
    "DigitViews": "data.contrastive.digit_views",
    "ExactSampler": "data.samplers",
    "GradientMonitor": "callbacks.gradient_monitor",
    "ImageFolder": "data.image_folder",
    "ImageNet": "data.imagenet",
    "LeakMeter": "callbacks.leak_meter",
    "MNIST": "data.image_archives",
    "MoCo": "models.contrastive.moco",
    "NonFiniteError": "callbacks.non_finite",
    "PoolRunningStatistics": "norm.pooled_statistics",
    "PreciseStatistics": "evaluation.precise_statistics",
    "Segmentation": "models.segmentation.segmentation",
    "SegmentationExamples": "plots.segmentation_examples",
    "SettingError": "errors",
    "ShufflePlugin": "norm.shuffle_plugin",
    "SimCLR": "models.contrastive.simclr",
    "StepProfiler": "metrics.step_profiler",
    "StatisticsMonitor": "callbacks.statistics_monitor",
    "StopOnNonFinite": "callbacks.non_finite",
    "SyncBatchNormPlugin": "norm.plugin",
    "TimeToTarget": "callbacks.time_to_target",
    "first_non_finite_parameter": "callbacks.non_finite",
    "measure_leak": "evaluation.measure_leak",
    "main": "launch.main",
    "precise_statistics": "evaluation.precise_statistics",  # re-exports syncbn.nn's function
    "timm_network": "models.libraries",
    "torchvision_network": "models.libraries",
}

__all__ = list(HOME)


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOME[name]}"), name)
