"""Settings of what is measured beside the training: which tests there are, and which do not go together."""

from omegaconf import DictConfig, OmegaConf

from syncbn.nn.comm import groups
from syncbn.training.errors import SettingError

ADAPT = ("name", "prior", "streaming", "group", "only")


def check(cfg: DictConfig, ranks: int) -> None:
    """Refuses what cannot be measured, or would hide something else.

    Args:
        cfg: of a run.
        ranks: processes of it.

    Raises:
        SettingError: at the first setting that cannot work.
    """
    _check_precise(cfg)
    _check_corruptions(cfg)
    _check_fit(cfg)
    _check_target(cfg)
    _check_mode(cfg)
    _check_adapt(cfg, ranks)


def target_monitor(cfg: DictConfig) -> str:
    """The accuracy of the validation that ``target`` is one of."""
    return str(OmegaConf.select(cfg, "callbacks.checkpoint.monitor") or "val/acc")


def _check_precise(cfg: DictConfig) -> None:
    batches = cfg.precise_batches
    if batches < 0:
        raise SettingError(f"precise_batches={batches}: use a whole number, 0 (not at all) or more")
    if batches and not cfg.test:
        raise SettingError(f"precise_batches={batches}: test=false leaves no test to repeat; use test=true")
    if batches and cfg.norm.name in ("none", "group_norm"):
        raise SettingError(
            f"precise_batches={batches}: norm={cfg.norm.name} leaves no batch norm to measure; use norm=sync or local, "
            "or precise_batches=0"
        )


def _check_corruptions(cfg: DictConfig) -> None:
    if not cfg.corruptions:
        return
    if not cfg.test:
        raise SettingError("corruptions: test=false leaves no test to repeat; use test=true, or corruptions=null")
    if cfg.data.get("corruption") is not None:
        raise SettingError(
            f"corruptions: data.corruption={cfg.data.corruption} has corrupted the images of the test before; use "
            "data.corruption=null, or corruptions=null"
        )


def _check_fit(cfg: DictConfig) -> None:
    if cfg.fit and not cfg.test:
        raise SettingError("fit=true: test=false leaves no test to compare with; use test=true")


def _check_target(cfg: DictConfig) -> None:
    if cfg.target is None:
        return
    if not 0 < cfg.target <= 1:
        raise SettingError(f"target={cfg.target}: use an accuracy above 0 and at most 1, or null")
    if OmegaConf.select(cfg, "callbacks.checkpoint.mode") == "min":
        raise SettingError(
            f"target={cfg.target}: callbacks.checkpoint.monitor={target_monitor(cfg)} is better the lower it is "
            "(callbacks.checkpoint.mode=min), and no accuracy; use target=null"
        )


def _check_mode(cfg: DictConfig) -> None:
    mode = cfg.get("mode", "train")
    if mode not in ("train", "test"):
        raise SettingError(f"mode={mode}: use train or test")
    if mode == "train":
        return
    if cfg.ckpt_path is None:
        raise SettingError(
            "ckpt_path=null: mode=test tests a checkpoint; say which: ckpt_path=outputs/RUN/checkpoints/best.ckpt"
        )
    if not cfg.test:
        raise SettingError("test=false: mode=test leaves nothing else to do; use test=true")
    if cfg.target is not None:
        raise SettingError(f"target={cfg.target}: mode=test trains nothing that could reach it; use target=null")


def _check_adapt(cfg: DictConfig, ranks: int) -> None:
    if cfg.get("adapt") is None:
        return
    for name in cfg.adapt:
        if name not in ADAPT:
            raise SettingError(f"adapt.{name}: there is no such setting; use {', '.join(ADAPT[1:])}")
    prior = cfg.adapt.get("prior", 0.0)
    if not isinstance(prior, int | float) or isinstance(prior, bool) or not prior >= 0:
        raise SettingError(f"adapt.prior={prior}: use a number, 0 or more")
    if not isinstance(cfg.adapt.get("streaming", False), bool):
        raise SettingError(f"adapt.streaming={cfg.adapt.streaming}: use true or false")
    if not cfg.test:
        raise SettingError("adapt: test=false leaves no test to adapt in; use test=true, or adapt=null")
    if cfg.norm.name in ("none", "group_norm"):
        raise SettingError(
            f"adapt: norm={cfg.norm.name} leaves no batch norm to adapt; use norm=sync or local, or adapt=null"
        )
    if cfg.corruptions:
        raise SettingError(
            "adapt: corruptions adapts by itself, also by corruptions.prior; use adapt=null, or no suite"
        )
    for name, value, without in (("precise_batches", cfg.precise_batches, 0), ("fit", cfg.fit, "false")):
        if value:
            raise SettingError(
                f"adapt: {name}={str(value).lower()} repeats the test with other statistics or images, which adapting "
                f"would hide; use {name}={without}, or adapt=null"
            )
    try:
        spec = groups.parse(cfg.adapt.get("group", "world"))
        if isinstance(spec, int):
            groups.check_divides(spec, ranks)
    except (TypeError, ValueError) as error:
        raise SettingError(f"adapt.{error}") from None
