"""What earlier attempts of a run left: whether there is anything to do, and the checkpoint to go on from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from syncbn.training import checkpoints, config, record, slurm
from syncbn.training.flat import COPIES, flat
from syncbn.training.schema import Config, SettingError

# What may differ between two attempts of one run without a word: where and how, but not what is trained.
HARMLESS = [
    "run",
    "ckpt_path",
    "resume",
    "timeouts",
    "cluster",
    "logger",
    "data.num_workers",
    *(f"ddp.{name}" for name in ("find_unused_parameters", "static_graph", "gradient_as_bucket_view", "bucket_cap_mb")),
    "callbacks.checkpoint.dirpath",
]
# Of callbacks those that look; others may change the weights.
HARMLESS += [f"callbacks.{name}" for name in ("learning_rate", "statistics", "finite._target_", "finite.every_n_steps")]
HARMLESS += [f"trainer.{name}" for name in ("log_every_n_steps", "profiler", "enable_progress_bar")]
# And what a finished run may be asked for again with, or go on with, that it did not begin with.
DONE = [*HARMLESS, "scheduler.epochs", "callbacks.checkpoint", "data.batch_size"]
DONE += [f"trainer.{name}" for name in ("max_epochs", "devices", "num_nodes", "accelerator")]
# And with what it may go on alone: where nothing is left to train, it would not have been done.
FREE = [*DONE, "callbacks.finite", "callbacks.gradients"]
# What a setting was before there was one of that name; in a group's file it is null, if not said here.
DEFAULTS = flat(OmegaConf.to_container(OmegaConf.structured(Config)))
DEFAULTS |= {"model.activation": "relu", "model.init": "he", "model.gain": 1.0}
DEFAULTS |= {"callbacks.finite.action": "fail"}
ENDED = {"failed": "failed", "interrupted": "was interrupted", "finished": "finished"}


def go_on(cfg: DictConfig, run_dir: Path, say: Callable[[str], None]) -> bool:
    """Sets ``cfg.ckpt_path`` to the newest sound checkpoint of this run, where it has one and no other was named.

    A checkpoint that is named counts where the run begins from it; the same command then goes on with the run.

    Args:
        cfg: settled settings.
        run_dir: of this run; there need be no such directory yet.
        say: takes lines for the user.

    Returns:
        Whether there is anything to do: a run that has finished with these settings has not.

    Raises:
        SettingError: the run has finished with other settings, or the checkpoint cannot be gone on from.
    """
    about = record.read(run_dir, "run")
    if cfg.get("mode") == "test" or about.get("tests"):
        return _test(cfg, run_dir, about, say)
    if cfg.ckpt_path is not None and about.get("begun_from") != begun_from(cfg):
        cfg.ckpt_path = str(_check(Path(cfg.ckpt_path), cfg, cfg.trainer.get("max_epochs"), say))
        return True
    if not about:
        return True
    file = run_dir / "config.yaml"
    before = OmegaConf.load(file) if file.exists() else cfg
    assert isinstance(before, DictConfig)
    changes = changes_of(cfg, before, FREE)
    if about["status"] == "finished":
        further = _goes_further(cfg, before)
        if others := changes if further else changes_of(cfg, before, DONE):
            raise SettingError(
                f"run.id={run_dir.name}: this run has finished with other settings ({', '.join(others)}); "
                "use another id"
            )
        if not further:
            return False
    _refuse_second_run(cfg, run_dir, changes)
    newest = checkpoints.newest(run_dir / "checkpoints", say)
    how = ENDED.get(about["status"], "was killed")  # nobody holds it: it had no time to say more
    what = f"goes on from {record.short(newest)}" if newest else "had no checkpoint and begins anew"
    say(f"this run {how} before; it {what}")
    if changes:
        say(f"with other settings than before: {', '.join(changes)}")
    if newest or cfg.ckpt_path is not None:
        cfg.ckpt_path = str(_check(newest or Path(cfg.ckpt_path), cfg, None, say))
    return True


def _test(cfg: DictConfig, run_dir: Path, about: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Whether a test is to be done; there is nothing in it to go on from."""
    if cfg.ckpt_path is not None:
        _load(Path(cfg.ckpt_path), "state_dict")
        cfg.ckpt_path = begun_from(cfg)
    if not about:
        return True
    file = run_dir / "config.yaml"
    before = OmegaConf.load(file) if file.exists() else cfg
    assert isinstance(before, DictConfig)
    if changes := changes_of(cfg, before, [name for name in HARMLESS if name != "ckpt_path"]):
        _refuse_second_run(cfg, run_dir, changes)
        raise SettingError(
            f"run.id={run_dir.name}: this run was made with other settings ({', '.join(changes)}); use another id"
        )
    if about["status"] == "finished":
        return False
    say(f"this run {ENDED.get(about['status'], 'was killed')} before; it begins anew")
    return True


def _refuse_second_run(cfg: DictConfig, run_dir: Path, changes: Sequence[str]) -> None:
    if changes and cfg.run.id is None and run_dir.name == f"slurm-{slurm.job()}":
        raise SettingError(
            f"run.id=null: this Slurm job has made a run with other settings before ({', '.join(changes)}); give each "
            "train.py of a job script a run.id"
        )


def begun_from(cfg: DictConfig) -> str | None:
    """The checkpoint that the user named, for the record."""
    return None if cfg.ckpt_path is None else str(Path(cfg.ckpt_path).resolve())


def _goes_further(cfg: DictConfig, earlier: DictConfig) -> bool:
    """Whether more epochs or steps are asked for than a run was made with; it may have ended before these, and well."""
    for name in ("max_epochs", "max_steps"):
        before, now = earlier.trainer.get(name), cfg.trainer.get(name)
        if None not in (before, now) and before != -1 and (now == -1 or now > before):  # -1 is no limit
            return True
    return False


def changes_of(cfg: DictConfig, earlier: DictConfig, free: Sequence[str]) -> list[str]:
    """Settings that are not as before, each as ``name=before -> now``, but those in ``free`` and what is in them.

    A setting that one of the two does not have yet has its default there.
    """
    before, now = (DEFAULTS | flat(OmegaConf.to_container(each, resolve=True)) for each in (earlier, cfg))
    skipped = tuple(f"{name}." for name in (*free, *COPIES))
    names = [name for name in sorted(before.keys() | now.keys()) if not f"{name}.".startswith(skipped)]
    return [f"{name}={before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]


def _check(path: Path, cfg: DictConfig, max_epochs: int | None, say: Callable[[str], None]) -> Path:
    """The whole path of a checkpoint that these settings can go on from."""
    checkpoint, done = _load(path, "loops", "fit_loop", "epoch_progress", "current", "processed")
    if max_epochs is not None and 0 < max_epochs <= done:
        raise SettingError(f"trainer.max_epochs={max_epochs}: ckpt_path={path} has {done} epochs already; use more")
    point, batch = checkpoint.get("resume", {}), cfg.data.global_batch_size
    if point.get("global_batch_size") not in (None, batch):
        raise SettingError(
            f"data.global_batch_size={batch}: {path} was trained with {point['global_batch_size']}, and goes on with "
            f"that alone; with {config.world_size(cfg)} devices say "
            f"data.global_batch_size={point['global_batch_size']}"
        )
    if not (point.get("epoch_is_over", True) or point.get("begins_anew")):
        _check_count(path, point.get("counted_in"), cfg)
    before, now = point.get("world_size"), config.world_size(cfg)
    if before not in (None, now):
        say(
            f"it was trained by {before} processes so far and goes on with {now}: weights, optimizer and the order of "
            "the data carry over exactly, random numbers (dropout) begin anew"
        )
    return path.resolve()


def _load(path: Path, *names: str) -> tuple[dict[str, Any], Any]:
    """A checkpoint, and what it has under these names, one within the other."""
    if not path.is_file():
        beside = sorted(str(p) for p in path.parent.glob("*.ckpt"))
        hint = f"there are {', '.join(beside)}" if beside else "a run keeps its own in outputs/RUN/checkpoints"
        raise SettingError(f"ckpt_path={path}: there is no such file; {hint}")
    try:
        checkpoint = part = checkpoints.load(path)
        for name in names:
            part = part[name]
    except Exception as error:
        others = [p for p in (checkpoints.newest(path.parent, lambda line: None),) if p not in (None, path)]
        hint = f"; a sound one is {others[0]}" if others else ""
        raise SettingError(
            f"ckpt_path={path}: no checkpoint of a training run can be read from it ({error}){hint}"
        ) from error
    return checkpoint, part


def _check_count(path: Path, before: dict[str, int | None] | None, cfg: DictConfig) -> None:
    """Refuses to go on in the middle of an epoch where the position would not be the same samples."""
    now = config.counted_in(cfg)
    if before not in (None, now):
        assert before is not None
        raise SettingError(
            f"{_counted(now)}: {path} lies in the middle of an epoch that was counted with {_counted(before)}; go on "
            "with that, or begin from a checkpoint of an epoch's end (ckpt_path=)"
        )


def _counted(of: dict[str, int | None]) -> str:
    return f"simulate={of['simulate'] or 'null'} and {of['samples']} samples at once"
