"""Checks the type and range of each setting with pydantic models. The ``validate`` modules check combinations.

Groups accept further settings (``trainer`` all arguments of ``lightning.Trainer``), so the models only name settings
that have a range. ``schema.py`` has the types by which Hydra converts the values of the command line before this check.
"""

from typing import Annotated, Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from syncbn.training.config.ranges import targets
from syncbn.training.config.ranges.types import (
    Amount,
    Auto,
    Batches,
    Count,
    Duration,
    Flag,
    Globs,
    Group,
    Inner,
    Limit,
    OrFlag,
    Positive,
    Seconds,
    Share,
    TrainingBatches,
    Whole,
    hint,
)
from syncbn.training.errors import SettingError

LARGEST_BUCKET = 1_000_000  # MiB; torch counts bytes in 64 bits
COMPILE_MODES = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
NORMS = Literal["sync", "local", "local_mean", "ghost", "none", "group_norm", "torch_sync", "shuffle"]


# The first six are shown; the others are Lightning's earlier names for some of them.
PRECISIONS = Literal[
    "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", "32", "64", "16", "bf16", 32, 64, 16
]
SHOWN = [str(each) for each in get_args(PRECISIONS)[:6]]


class _Trainer(Group):
    accelerator: Annotated[Literal["auto", "cpu", "gpu", "cuda"], hint("use auto, cpu or gpu")]
    devices: Auto
    num_nodes: Auto
    max_epochs: Annotated[
        Literal[-1] | Annotated[int, Field(strict=True, ge=1)] | None,
        hint("use a whole number, 1 or more, or -1 for no limit"),
    ] = None
    gradient_clip_val: Annotated[
        Annotated[float, Field(strict=True, gt=0)] | None, hint("use a number above 0, or null for no clipping")
    ] = None
    gradient_clip_algorithm: Annotated[
        Literal["norm", "value"] | None, hint("use norm (of all gradients together) or value (of each number)")
    ] = None
    accumulate_grad_batches: Count | None = None
    precision: Annotated[PRECISIONS | None, hint(f"use one of {', '.join(SHOWN)}")] = None
    check_val_every_n_epoch: Count | None = None
    log_every_n_steps: Count | None = None
    num_sanity_val_steps: Annotated[
        Annotated[int, Field(strict=True, ge=-1)] | None,
        hint("use a whole number, 0 (none) or more, or -1 for all batches"),
    ] = None
    min_epochs: Count | None = None
    max_steps: Limit = None
    min_steps: Count | None = None
    max_time: Annotated[Duration | None, hint("use days:hours:minutes:seconds, such as 00:12:00:00, or null")] = None
    limit_train_batches: TrainingBatches = None
    limit_val_batches: Batches = None
    limit_test_batches: Batches = None
    limit_predict_batches: Batches = None
    val_check_interval: Annotated[
        Annotated[int, Field(strict=True, ge=1)] | Annotated[float, Field(strict=True, gt=0, le=1)] | Duration | None,
        hint("use a whole number of batches, 1 or more, a share of an epoch up to 1.0, or null for its end"),
    ] = None
    profiler: Annotated[  # the table of Lightning's "simple" is a log line of a level that the ranks do not print
        dict[str, Any] | Literal["pytorch", "xla"] | None,
        hint("use debug=profile, which writes the profile into the run directory, or null"),
    ] = None
    deterministic: Annotated[
        Annotated[bool, Field(strict=True)] | Literal["warn"] | None, hint("use true, false or warn")
    ] = None
    benchmark: OrFlag = None
    detect_anomaly: OrFlag = None
    inference_mode: OrFlag = None
    enable_progress_bar: OrFlag = None
    enable_model_summary: OrFlag = None
    use_distributed_sampler: OrFlag = None


class _Data(Group):
    num_workers: Whole = 0
    batch_size: Count | None = None
    global_batch_size: Count | None = None


class _Optimizer(Group):
    lr: Amount = 0.0
    momentum: Amount = 0.0
    weight_decay: Amount = 0.0
    lr_batch: Count | None = None
    layer_decay: Annotated[
        Annotated[float, Field(strict=True, gt=0, le=1)] | None, hint("use a number above 0 and at most 1, or null")
    ] = None
    lr_scale: Annotated[
        dict[str, Annotated[float, Field(strict=True, gt=0)]] | None,
        hint("use globs on the names of parameters with factors above 0, such as {*layer1*: 0.1}"),
    ] = None


class _Scheduler(Group):
    warmup_epochs: Amount = 0
    warmup_steps: Annotated[int, Field(strict=True, ge=0), hint("use a whole number, 0 or more")] = 0
    warmup_lr: Amount = 0.0
    interval: Annotated[Literal["epoch", "step"], hint("use epoch or step")] = "epoch"
    final: Share = 0.0
    gamma: Positive = 0.1
    pct_start: Annotated[float, Field(strict=True, gt=0, lt=1), hint("use a number above 0 and below 1")] = 0.3
    div_factor: Positive = 25.0
    final_div_factor: Positive = 1e4
    base_momentum: Share = 0.85
    max_momentum: Share = 0.95


class _Averaging(Group):
    ema: Inner | None = None
    every_n_steps: Count = 1
    swa_from: Annotated[
        Annotated[float, Field(gt=0)] | None,
        hint("use an epoch, 1 or more, or a share of the epochs below 1, or null"),
    ] = None
    swa_lr: Positive | None = None
    bn_batches: Annotated[
        Annotated[int, Field(ge=0)] | None,
        hint("use a whole number, 0 (average the running statistics) or more, or null"),
    ] = None


class _EarlyStopping(Group):
    patience: Count | None = None
    min_delta: Amount = 0.0
    mode: Annotated[Literal["min", "max"] | None, hint("use max, min or null")] = None


class _FindLR(Group):
    min: Positive = 1e-6
    max: Positive = 10.0
    steps: Annotated[int, Field(ge=20), hint("use a whole number, 20 or more")] = 100


class _Norm(Group):
    name: Annotated[NORMS, hint(f"use one of {', '.join(NORMS.__args__)}")]


class _Sync(Group):
    group: Any
    batch_size: Count | None
    ghost_batch: Count | None


class _Ghost(Group):
    batch_size: Count


class _GroupNorm(Group):
    num_groups: Count
    min_channels: Count


class _Shuffle(Group):
    part: Annotated[str, Field(pattern=r"^\w+(\.\w+)*$"), hint("use the dotted name of a submodule, such as network")]


# Settings that mean something else in a class of the user's, which may have any argument of these names.
_BUILT_IN = {"data": {"num_workers"}, "scheduler": set(_Scheduler.model_fields)}
_NORMS: dict[str, type[Group]] = {"sync": _Sync, "ghost": _Ghost, "group_norm": _GroupNorm, "shuffle": _Shuffle}


class _DDP(Group):
    bucket_cap_mb: Annotated[
        Annotated[float, Field(gt=0, le=LARGEST_BUCKET)] | None,
        hint(f"use a number above 0 and up to {LARGEST_BUCKET}, in MiB, or null"),
    ] = None
    comm_hook: Annotated[Literal["fp16", "bf16", "powersgd"] | None, hint("use null, fp16, bf16 or powersgd")] = None
    comm_wrapper: Annotated[Literal["fp16", "bf16"] | None, hint("use null, fp16 or bf16")] = None
    powersgd_rank: Count = 1
    powersgd_start: Annotated[
        int, Field(ge=2), hint("use 2 or more, since DDP rebuilds its buckets in the first step")
    ] = 1000


class _Resume(Group):
    every_n_steps: Count | None = None
    every_n_minutes: Positive | None = None
    keep: Count = 2


class _Timeouts(Group):
    collective: Seconds = 600
    stop: Seconds = 120


Words = Annotated[str | int | float, hint("use a name")]
Model = Annotated[Literal["best", False], hint("use best or false")]


class _TensorBoard(Group):
    pictures: Flag = True


class _MLflow(Group):
    tracking_uri: Annotated[
        Annotated[str, Field(pattern=r"^[a-z][a-z0-9+]*:")],
        hint("use a database or a server, such as sqlite:///outputs/mlflow.db or http://HOST:5000"),
    ]
    experiment: Words = "syncbn"
    group: Words | None = None
    tags: Annotated[dict[str, str | int | float | bool | None], hint("use names with values: {name: value}")] = Field(
        default_factory=dict
    )
    pictures: Flag = True
    log_model: Model = False


class _Logger(Group):
    mode: Annotated[Literal["offline", "online", "disabled"], hint("use one of offline, online, disabled")] = "offline"
    project: Words = "syncbn"
    entity: Words | None = None
    group: Words | None = None
    tags: Annotated[list[str | int | float | bool], hint("use a list: [a, b]")] = Field(default_factory=list)
    init_timeout: Amount = 60
    finish_timeout: Amount = 60
    pictures: Flag = True
    log_model: Model = False
    tensorboard: _TensorBoard | None = None
    mlflow: _MLflow | None = None


class _Adapt(BaseModel):
    model_config = ConfigDict(extra="forbid")
    prior: Amount = 0.0
    streaming: Flag = False
    group: Any = "world"
    only: Any = None
    name: Any = None


class _Settings(Group):
    trainer: _Trainer
    data: _Data
    norm: _Norm
    optimizer: _Optimizer
    scheduler: _Scheduler | None = None
    averaging: _Averaging | None = None
    early_stopping: _EarlyStopping | None = None
    find_lr: _FindLR | None = None
    ddp: _DDP
    resume: _Resume
    timeouts: _Timeouts
    logger: _Logger | None = None
    adapt: _Adapt | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32), hint(f"use a number from 0 to {2**32 - 1}")] = 0
    simulate: Count | None = None
    ckpt_restore: Annotated[Literal["all", "weights"] | None, hint("use all, weights or null")] = None
    freeze: Globs = None
    checkpoint_activations: Globs = None
    compile_mode: Annotated[COMPILE_MODES | None, hint(f"use null or one of {', '.join(COMPILE_MODES.__args__)}")] = (
        None
    )
    mode: Annotated[Literal["train", "test", "find_lr"], hint("use train, test or find_lr")] = "train"
    precise_batches: Annotated[int, Field(ge=0), hint("use a whole number, 0 (not at all) or more")] = 0
    target: Annotated[
        Annotated[float, Field(gt=0, le=1)] | None, hint("use an accuracy above 0 and at most 1, or null")
    ] = None


def check(cfg: DictConfig) -> None:
    """Checks each setting on its own, without the others. Interpolations are resolved for the check only.

    Raises:
        SettingError: for the first setting with a wrong type or out of its range.
    """
    try:
        values = {name: _known(name, plain(cfg.get(name))) for name in _Settings.model_fields if name in cfg}
        arguments = list(targets.of(cfg))
    except OmegaConfBaseException as error:
        raise unresolved(error) from error
    _validate(_Settings, values)
    for name, node, model in arguments:
        _validate(model, node, f"{name}.")
    norm = values["norm"]["name"]
    if norm in _NORMS:
        _validate(_NORMS[norm], values["norm"], "norm.", f"norm.name={norm} needs it, and it is missing")


def _known(name: str, value: Any) -> Any:
    """A group without the settings whose ranges are those of our and torch's classes, if its class is another."""
    if not isinstance(value, dict) or str(value.get("_target_")).startswith(("syncbn.", "torch.")):
        return value
    return {key: each for key, each in value.items() if key not in _BUILT_IN.get(name, ())}


def plain(value: Any) -> Any:
    """A setting with its interpolations resolved; a group as a dict."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _validate(model: type[BaseModel], values: Any, prefix: str = "", missing: str = "it is missing") -> None:
    try:
        model.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        setting = prefix + ".".join(map(str, found["loc"]))
        if found["type"] == "missing":
            raise SettingError(setting, hint=missing) from None
        if found["type"] == "extra_forbidden":  # only adapt refuses further settings
            names = ", ".join(name for name in _Adapt.model_fields if name != "name")
            raise SettingError(setting, hint=f"there is no such setting; use {names}") from None
        raise SettingError(setting, found["input"], found["msg"]) from None


def unresolved(error: OmegaConfBaseException) -> SettingError:
    """The error of a setting whose interpolation cannot be resolved."""
    return SettingError(error.full_key or "settings", hint=str(error).splitlines()[0])
