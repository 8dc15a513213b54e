"""Checks the type and range of each setting with pydantic models. The ``validate`` modules check combinations.

Groups accept further settings (``trainer`` all arguments of ``lightning.Trainer``), so the models only name settings
that have a range. ``schema.py`` has the types by which Hydra converts the values of the command line before this check.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from syncbn.training.errors import SettingError

LONGEST_TIMEOUT = 2_000_000  # seconds, 23 days; torch counts milliseconds in 32 bits
LARGEST_BUCKET = 1_000_000  # MiB; torch counts bytes in 64 bits
COMPILE_MODES = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
NORMS = Literal["sync", "local", "local_mean", "ghost", "none", "group_norm", "torch_sync"]


def _hint(words: str) -> WrapValidator:
    """Replaces pydantic's message with a hint that names valid values."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("setting", "{hint}", {"hint": words}) from None

    return WrapValidator(validate)


Count = Annotated[int, Field(strict=True, ge=1), _hint("use a whole number, 1 or more")]
Auto = Annotated[
    Literal["auto"] | Annotated[int, Field(strict=True, ge=1)], _hint("use a whole number, 1 or more, or auto")
]
Amount = Annotated[float, Field(strict=True, ge=0), _hint("use a number, 0 or more")]
Positive = Annotated[float, Field(strict=True, gt=0), _hint("use a number above 0")]
Flag = Annotated[bool, Field(strict=True), _hint("use true or false")]
Seconds = Annotated[
    float,
    Field(strict=True, gt=0, le=LONGEST_TIMEOUT),
    _hint(f"use a number above 0 and up to {LONGEST_TIMEOUT}, in seconds"),
]
Globs = Annotated[
    str | list[Annotated[str, Field(strict=True)]] | None,
    _hint('use names with *, as a list: ["network.stem*"], or null'),
]


class _Group(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Trainer(_Group):
    accelerator: Annotated[Literal["auto", "cpu", "gpu", "cuda"], _hint("use auto, cpu or gpu")] = "auto"
    devices: Auto = "auto"
    num_nodes: Auto = "auto"
    max_epochs: Annotated[
        Literal[-1] | Annotated[int, Field(strict=True, ge=1)] | None,
        _hint("use a whole number, 1 or more, or -1 for no limit"),
    ] = None


class _Data(_Group):
    batch_size: Count | None = None
    global_batch_size: Count | None = None


class _Optimizer(_Group):
    lr: Amount = 0.0
    momentum: Amount = 0.0
    weight_decay: Amount = 0.0


class _Norm(_Group):
    name: Annotated[NORMS, _hint(f"use one of {', '.join(NORMS.__args__)}")]


class _Sync(_Group):
    group: Any
    batch_size: Count | None
    ghost_batch: Count | None


class _Ghost(_Group):
    batch_size: Count


class _GroupNorm(_Group):
    num_groups: Count
    min_channels: Count


_NORMS: dict[str, type[_Group]] = {"sync": _Sync, "ghost": _Ghost, "group_norm": _GroupNorm}


class _DDP(_Group):
    bucket_cap_mb: Annotated[
        Annotated[float, Field(gt=0, le=LARGEST_BUCKET)] | None,
        _hint(f"use a number above 0 and up to {LARGEST_BUCKET}, in MiB, or null"),
    ] = None
    comm_hook: Annotated[Literal["fp16", "bf16", "powersgd"] | None, _hint("use null, fp16, bf16 or powersgd")] = None
    comm_wrapper: Annotated[Literal["fp16", "bf16"] | None, _hint("use null, fp16 or bf16")] = None
    powersgd_rank: Count = 1
    powersgd_start: Annotated[
        int, Field(ge=2), _hint("use 2 or more, since DDP rebuilds its buckets in the first step")
    ] = 1000


class _Resume(_Group):
    every_n_steps: Count | None = None
    every_n_minutes: Positive | None = None
    keep: Count = 2


class _Timeouts(_Group):
    collective: Seconds = 600
    stop: Seconds = 120


class _Adapt(BaseModel):
    model_config = ConfigDict(extra="forbid")
    prior: Amount = 0.0
    streaming: Flag = False
    group: Any = "world"
    only: Any = None
    name: Any = None


class _Settings(_Group):
    trainer: _Trainer
    data: _Data
    norm: _Norm
    optimizer: _Optimizer
    ddp: _DDP
    resume: _Resume
    timeouts: _Timeouts
    adapt: _Adapt | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32), _hint(f"use a number from 0 to {2**32 - 1}")] = 0
    simulate: Count | None = None
    ckpt_restore: Annotated[Literal["all", "weights"] | None, _hint("use all, weights or null")] = None
    freeze: Globs = None
    checkpoint_activations: Globs = None
    compile_mode: Annotated[COMPILE_MODES | None, _hint(f"use null or one of {', '.join(COMPILE_MODES.__args__)}")] = (
        None
    )
    mode: Annotated[Literal["train", "test"], _hint("use train or test")] = "train"
    precise_batches: Annotated[int, Field(ge=0), _hint("use a whole number, 0 (not at all) or more")] = 0
    target: Annotated[
        Annotated[float, Field(gt=0, le=1)] | None, _hint("use an accuracy above 0 and at most 1, or null")
    ] = None


def check(cfg: DictConfig) -> None:
    """Checks each setting on its own, without the others. Interpolations are resolved for the check only.

    Raises:
        SettingError: for the first setting with a wrong type or out of its range.
    """
    try:
        values = {name: plain(cfg.get(name)) for name in _Settings.model_fields if name in cfg}
    except OmegaConfBaseException as error:
        raise unresolved(error) from error
    _validate(_Settings, values)
    norm = values["norm"]["name"]
    if norm in _NORMS:
        _validate(_NORMS[norm], values["norm"], "norm.", f"norm.name={norm} needs it, and it is missing")


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
