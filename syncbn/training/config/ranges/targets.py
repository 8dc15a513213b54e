"""The ranges of arguments of built-in networks, data sets, callbacks, optimizers and schedules, by their ``_target_``.

An argument of another target is that target's own: nothing is known of it here.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from syncbn.training.config.ranges.types import (
    Amount,
    Count,
    Flag,
    Group,
    Limit,
    Number,
    Positive,
    Share,
    Whole,
    hint,
)

Corruption = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "speckle_noise",
    "gaussian_blur",
    "contrast",
    "brightness",
    "shift",
    "scale",
]
KIND = hint(f"use one of {', '.join(get_args(Corruption))}")
Severity = Annotated[int, Field(strict=True, ge=1, le=5), hint("use a whole number from 1 to 5")]
Remainder = Annotated[Literal["drop", "pad", "uneven"], hint("use drop, pad or uneven")]
Mode = Annotated[Literal["max", "min"], hint("use max or min")]
Fraction = Annotated[float, Field(strict=True, gt=0, lt=1), hint("use a number above 0 and below 1")]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32), hint(f"use a number from 0 to {2**32 - 1}")]
Images = Annotated[
    Annotated[int, Field(strict=True, ge=1)] | None, hint("use a whole number, 1 or more, or null for all images")
]
Betas = Annotated[
    Annotated[list[Annotated[float, Field(strict=True, ge=0, lt=1)]], Field(min_length=2, max_length=2)],
    hint("use two numbers from 0 to below 1: [0.9, 0.999]"),
]


class _MLP(Group):
    in_features: Count = 64
    num_classes: Count = 10
    depth: Count = 4
    width: Count = 64
    activation: Annotated[Literal["relu", "sigmoid", "tanh"], hint("use relu, sigmoid or tanh")] = "relu"
    init: Annotated[Literal["he", "torch"], hint("use he or torch")] = "he"
    gain: Number = 1.0


class _ResNet(Group):
    in_channels: Count = 1
    num_classes: Count = 10
    width: Count = 16
    blocks: Annotated[
        Annotated[list[Annotated[int, Field(strict=True, ge=1)]], Field(min_length=1)],
        hint("use a list of whole numbers, 1 or more: [1, 1, 1]"),
    ] = Field(default_factory=lambda: [1, 1, 1])


class _DeepLab(Group):
    in_channels: Count = 1
    num_classes: Count = 11
    width: Count = 16
    dilations: Annotated[
        Annotated[list[Annotated[int, Field(strict=True, ge=1)]], Field(min_length=1)],
        hint("use a list of whole numbers, 1 or more: [2, 4]"),
    ] = Field(default_factory=lambda: [2, 4])


class _DigitScenes(Group):
    images: Count = 1024
    eval_images: Count = 256
    split_seed: Seed = 0
    shuffle: Flag = True
    seed: Seed = 0
    remainder: Remainder = "drop"


class _Digits(Group):
    val_fraction: Fraction = 0.15
    test_fraction: Fraction = 0.2
    split_seed: Seed = 0
    shuffle: Flag = True
    seed: Seed = 0
    shards: Annotated[
        Literal["labels", "brightness", "inversion"] | None, hint("use labels, brightness, inversion or null")
    ] = None
    num_shards: Annotated[
        Annotated[int, Field(strict=True, ge=2)] | None, hint("use a whole number, 2 or more, or null")
    ] = None
    remainder: Remainder = "drop"
    corruption: Annotated[Corruption | None, KIND] = None
    severity: Severity | None = None
    corrupt_train: Flag | None = None
    label_noise: Share | None = None
    outliers: Share | None = None
    outlier_scale: Number | None = None


class _ImageArchive(Group):
    train_images: Images = None
    test_images: Images = None


class _DigitViews(Group):
    strength: Amount = 1.0
    val_fraction: Fraction = 0.15
    test_fraction: Fraction = 0.2
    split_seed: Seed = 0
    shuffle: Flag = True
    seed: Seed = 0
    remainder: Remainder = "drop"


class _ImageNet(Group):
    num_classes: Count = 1000
    size: Count = 224
    resize: Count = 256
    shuffle: Flag = True
    seed: Seed = 0
    remainder: Remainder = "drop"


class _Classifier(Group):
    num_classes: Count = 10
    label_smoothing: Share = 0.0
    decay_norm: Flag = False


class _Segmentation(Group):
    num_classes: Count = 11
    ignore_index: Annotated[int, Field(strict=True), hint("use a whole number, such as 255")] = 255


class _SimCLR(Group):
    dim: Count = 64
    temperature: Positive = 0.2
    probe_labels: Count = 10
    decay_norm: Flag = False


class _MoCo(_SimCLR):
    queue: Count = 512
    momentum: Annotated[float, Field(strict=True, ge=0, lt=1), hint("use a number from 0 to below 1, such as 0.99")] = (
        0.99
    )


class _SGD(Group):
    nesterov: Flag = False
    dampening: Number = 0.0


class _Adam(Group):
    betas: Betas = Field(default_factory=lambda: [0.9, 0.999])
    eps: Amount = 1e-8


class _RMSprop(Group):
    alpha: Amount = 0.99
    eps: Amount = 1e-8


class _ConstantLR(Group):
    factor: Share = 1.0
    total_iters: Whole = 0


class _Cosine(Group):
    epochs: Limit = None


class _Steps(Group):
    milestones: Annotated[
        list[Annotated[int, Field(strict=True, ge=1)]], hint("use a list of epochs, 1 or more: [30, 60, 90]")
    ] = Field(default_factory=list)


class _ModelCheckpoint(Group):
    mode: Mode = "min"
    monitor: Annotated[str | None, hint("use the name of a metric that the module logs")] = None
    save_top_k: Annotated[
        int, Field(strict=True, ge=-1), hint("use a whole number, 0 (none) or more, or -1 for all")
    ] = 1
    enable_version_counter: Flag = True
    every_n_epochs: Whole | None = None
    every_n_train_steps: Whole | None = None


class _EveryNSteps(Group):
    every_n_steps: Count | None = None
    action: Annotated[Literal["fail", "stop"], hint("use fail or stop")] = "fail"


class _LeakMeter(Group):
    num_batches: Count = 20


class _LearningRateMonitor(Group):
    logging_interval: Annotated[Literal["step", "epoch"] | None, hint("use step, epoch or null")] = None


class _SegmentationExamples(Group):
    count: Count = 6
    picture: Flag = True


# At least 1 and not 2: before the folders of data=folder are counted, settings are checked with 1.
Classes = Annotated[
    Annotated[int, Field(strict=True, ge=1)], hint("use the number of classes: the module does not say it")
]


Thresholds = Annotated[
    Annotated[int, Field(strict=True, ge=2)] | list[float] | None,
    hint("use null for the exact value, a whole number of 2 or more, or a list of numbers"),
]


class _Multiclass(Group):
    num_classes: Classes
    top_k: Count = 1
    average: Annotated[
        Literal["micro", "macro", "weighted"], hint("use micro, macro or weighted, which are one number")
    ] = "macro"
    n_bins: Count = 15
    norm: Annotated[Literal["l1", "l2", "max"], hint("use l1, l2 or max")] = "l1"
    thresholds: Thresholds = None


class _MulticlassConfusionMatrix(Group):
    num_classes: Classes


class _Curve(Group):
    batch_sizes: list[Count] = Field(default_factory=list)
    priors: list[Amount] = Field(default_factory=list)
    severities: list[Severity] = Field(default_factory=list)
    images: Count = 1


class _CorruptionSuite(Group):
    kinds: Annotated[list[Corruption], KIND] = Field(default_factory=list)
    severities: list[Severity] = Field(default_factory=list)
    batch_size: Count = 1
    prior: Amount = 0
    curve: _Curve | None = None


TARGETS: dict[str, type[Group]] = {
    "syncbn.training.MLP": _MLP,
    "syncbn.training.ResNet": _ResNet,
    "syncbn.training.DeepLab": _DeepLab,
    "syncbn.training.Digits": _Digits,
    "syncbn.training.DigitScenes": _DigitScenes,
    "syncbn.training.CIFAR": _ImageArchive,
    "syncbn.training.CIFARMosaics": _ImageArchive,
    "syncbn.training.CIFARViews": _ImageArchive,
    "syncbn.training.MNIST": _ImageArchive,
    "syncbn.training.ImageNet": _ImageNet,
    "syncbn.training.Classifier": _Classifier,
    "syncbn.training.Segmentation": _Segmentation,
    "syncbn.training.SegmentationExamples": _SegmentationExamples,
    "syncbn.training.DigitViews": _DigitViews,
    "syncbn.training.SimCLR": _SimCLR,
    "syncbn.training.MoCo": _MoCo,
    "syncbn.training.LeakMeter": _LeakMeter,
    "torch.optim.SGD": _SGD,
    **{f"torch.optim.{name}": _Adam for name in ("Adam", "AdamW")},
    "torch.optim.RMSprop": _RMSprop,
    "torch.optim.lr_scheduler.ConstantLR": _ConstantLR,
    "syncbn.training.Cosine": _Cosine,
    "syncbn.training.Steps": _Steps,
    "lightning.pytorch.callbacks.ModelCheckpoint": _ModelCheckpoint,
    "lightning.pytorch.callbacks.LearningRateMonitor": _LearningRateMonitor,
    **{f"syncbn.training.{name}": _EveryNSteps for name in ("StopOnNonFinite", "StatisticsMonitor", "GradientMonitor")},
    "syncbn.training.CorruptionSuite": _CorruptionSuite,
    **{
        f"torchmetrics.classification.Multiclass{name}": _Multiclass
        for name in ("Accuracy", "F1Score", "AUROC", "CalibrationError")
    },
    "torchmetrics.classification.MulticlassConfusionMatrix": _MulticlassConfusionMatrix,
}


def of(cfg: DictConfig) -> Iterator[tuple[str, Any, type[Group]]]:
    """The parts of the settings with a built-in target: their names, their values, and the ranges of these."""
    # callbacks.checkpoint.dirpath refers to Hydra's own settings, which are not there outside a job.
    groups = [name for name in ("model", "data", "module", "optimizer", "scheduler", "corruptions") if name in cfg]
    callbacks = [f"callbacks.{name}" for name in cfg.get("callbacks") or {}]
    metrics = cfg.get("metrics")
    callbacks += [f"metrics.{name!s}" for name in metrics] if isinstance(metrics, DictConfig) else []
    for name in (*groups, *callbacks):
        node = OmegaConf.select(cfg, name)
        model = TARGETS.get(str(node.get("_target_"))) if isinstance(node, DictConfig) else None
        if model is not None and node is not None:
            yield name, {key: _value(node, str(key)) for key in model.model_fields if key in node}, model


def _value(node: DictConfig, key: str) -> Any:
    value = node[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
