"""What earlier attempts of a run left: whether there is anything to do, and the checkpoint to go on from."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from syncbn.training.checkpoint import files
from syncbn.training.checkpoint.usable_checkpoint import (
    WEIGHTS,
    check_usable,
    epochs_done,
    lacking_parts,
    load_checkpoint,
    refuse_less_training,
    whole_checkpoint,
)
from syncbn.training.config.compare import DONE, FREE, HARMLESS, changes_of
from syncbn.training.distributed import slurm
from syncbn.training.errors import SettingError
from syncbn.training.os_errors import explain
from syncbn.training.read_file import DamagedError, read_bytes
from syncbn.training.run_directory import paths, record
from syncbn.training.run_directory.paths import real, run_of

# And what a new run may have otherwise than the one whose training it continues: what is trained, and how, is the same.
CONTINUED = [*FREE, "callbacks", "simulate", "mode", "test", "precise_batches", "fit", "target", "adapt", "corruptions"]
CONTINUED += ["study"]
ENDED = {"failed": "failed", "interrupted": "was interrupted", "finished": "finished"}


def go_on(
    cfg: DictConfig,
    run_dir: Path,
    say: Callable[[str], None],
    overrides: Sequence[str] | None = None,
    *,
    named: bool = True,
) -> bool:
    """Sets ``cfg.ckpt_path`` and ``cfg.ckpt_restore``: where this attempt begins. Changes no file.

    A run that has begun continues from its newest sound checkpoint. A new one begins from the checkpoint that was
    named, if one was: it continues that training where the settings are the same, and else takes the weights alone. A
    named checkpoint of this run itself counts once; the same command then goes on with the run.

    Args:
        cfg: settled settings.
        run_dir: of this run; there need be no such directory yet.
        say: takes lines for the user.
        overrides: what the user has said; None where nobody knows.
        named: the user has named this run, by ``run.id`` or its directory; else ``cfg.ckpt_path`` alone leads here.

    Returns:
        Whether there is anything to do: a run that has finished with these settings has not.

    Raises:
        SettingError: the run has finished with other settings, has begun otherwise, or has files that are damaged
            beyond recovery; or the checkpoint cannot be continued from. The run is as it was.
    """
    about = _recovered(run_dir, say)
    if cfg.get("mode") == "test" or about.get("tests"):
        return _test(cfg, run_dir, about, say, overrides)
    here = _lies_in(cfg.ckpt_path, run_dir)
    other = cfg.ckpt_path is not None and about.get("begun_from") != begun_from(cfg)  # than the run began from
    finished = about.get("status") == "finished"
    newest = files.newest(run_dir / "checkpoints", say) if about and not finished else None
    if other and not here and (finished or newest):
        since = f"from {about['begun_from']}" if about.get("begun_from") else "without a checkpoint"
        raise SettingError(
            f"run.id={run_dir.name}: this run exists and began {since}, not from ckpt_path={cfg.ckpt_path}; "
            "use another id, or leave ckpt_path out"
        )
    if not about:
        if cfg.ckpt_path is not None:
            _begin_from(cfg, say)
        return True
    before = _before(cfg, run_dir, about, overrides, say)
    changes = changes_of(cfg, before, FREE)
    if finished:
        further = _goes_further(cfg, before)
        if others := changes if further else changes_of(cfg, before, DONE):
            which = f"run.id={run_dir.name}: this run" if named else f"ckpt_path={cfg.ckpt_path}: run {run_dir.name}"
            raise SettingError(
                f"{which} has finished with other settings ({', '.join(others)}); use another id{_to_begin(cfg)}"
            )
        wrong = record.damage(run_dir, "result")
        if not (further or wrong):
            return False
        newest = files.newest(run_dir / "checkpoints", say)
        if wrong and not further:
            _test_again(run_dir, wrong, newest, say)
    if changes and not named:
        raise SettingError(
            f"ckpt_path={cfg.ckpt_path}: run {run_dir.name} has other settings ({', '.join(changes)}); use another id"
            f"{_to_begin(cfg)}"
        )
    if other and here and cfg.get("ckpt_restore") == "weights":
        raise SettingError(f"ckpt_restore=weights: {run_dir.name} continues with its whole state{_to_begin(cfg)}")
    _refuse_second_run(cfg, run_dir, changes)
    if other and here:
        newest = whole_checkpoint(Path(cfg.ckpt_path))
    how = ENDED.get(about["status"], "was killed")  # nobody holds it: it had no time to say more
    what = f"goes on from {paths.short(newest)}" if newest else "had no checkpoint and begins anew"
    say(f"this run {how} before; it {what}")
    if changes:
        say(f"with other settings than before: {', '.join(changes)}")
    if newest is not None:
        path = check_usable(newest, cfg, say)
        refuse_less_training(path, cfg, before, run_dir)
        cfg.ckpt_path, cfg.ckpt_restore = str(path), "all"
    elif cfg.ckpt_path is not None:
        _begin_from(cfg, say)
    return True


def _test_again(run_dir: Path, wrong: str, newest: Path | None, say: Callable[[str], None]) -> None:
    """For a run that has finished and whose results are damaged: what is trained is there still."""
    if newest is None:
        raise SettingError(
            f"run.id={run_dir.name}: {wrong}, and no sound checkpoint is left to test; to train it again "
            f"remove {paths.short(run_dir)}, or use another id"
        )
    say(f"{wrong}: the run is tested again, and its results are written again")


def _recovered(run_dir: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The record of this run, empty where none has begun.

    Raises:
        SettingError: there is one, and it cannot be read, which is no damage.
    """
    path = run_dir / "run.json"
    try:
        read_bytes(path)
    except (FileNotFoundError, DamagedError):
        pass
    except OSError as error:
        raise SettingError(f"run.id={run_dir.name}: {explain(error, path)}") from error
    return record.recovered(run_dir, say)


def _before(
    cfg: DictConfig, run_dir: Path, about: dict[str, Any], overrides: Sequence[str] | None, say: Callable[[str], None]
) -> DictConfig:
    """The settings that the run was made with; today's where they are lost, which is said.

    Raises:
        SettingError: they are lost, the run has finished, and whether it was made with today's is not known.
    """
    try:
        before = record.settings(run_dir)
        wrong = f"{paths.short(run_dir / 'config.yaml')} is missing"
    except DamagedError as error:
        before, wrong = None, str(error)
    if before is not None:
        return before
    earlier = about.get("overrides")
    if about["status"] == "finished" and overrides is not None and _that_matter(earlier) != _that_matter(overrides):
        said = " ".join(map(str, earlier)) if isinstance(earlier, list) else "unknown"
        raise SettingError(
            f"run.id={run_dir.name}: {wrong}, so settings cannot be compared; use those of the run ({said}), "
            "or another id"
        )
    say(f"{wrong}: settings are not compared, and config.yaml is written again from today's")
    return cfg


def _that_matter(overrides: object) -> set[str] | None:
    """Overrides that say what is trained; None where these are none."""
    if not isinstance(overrides, list | tuple):
        return None
    harmless = tuple(f"{name}." for name in HARMLESS)
    said = {str(each).lstrip("+") for each in overrides}
    return {each for each in said if not f"{each.partition('=')[0]}.".startswith(harmless)}


def _lies_in(ckpt_path: str | None, run_dir: Path) -> bool:
    return ckpt_path is not None and run_of(Path(ckpt_path)) == run_dir.resolve()


def _to_begin(cfg: DictConfig) -> str:
    """What a refusal adds where the user named a checkpoint: another run may begin from it."""
    return "" if cfg.ckpt_path is None else " (run.id=NAME begins another run from that checkpoint)"


def _begin_from(cfg: DictConfig, say: Callable[[str], None]) -> None:
    """Decides what a new run takes from the checkpoint that the user named: all of the training, or the weights alone.

    Raises:
        SettingError: it cannot be read, or has no weights; or ``ckpt_restore=all`` is asked for and not possible.
    """
    path = Path(cfg.ckpt_path)
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint.get(WEIGHTS), dict):
        raise SettingError(
            f"ckpt_path={path}: it has no state_dict; use a checkpoint of Lightning, or a file that "
            'torch.save({"state_dict": module.state_dict()}, path) wrote, module being the LightningModule'
        )
    lacks = lacking_parts(checkpoint)
    others: list[str] = []
    if (run_dir := run_of(path)) is not None:
        with suppress(DamagedError):
            before = record.settings(run_dir)
            others = [] if before is None else changes_of(cfg, before, CONTINUED)
    if cfg.get("ckpt_restore") == "all" and lacks:
        raise SettingError(
            f"ckpt_restore=all: {path} has no {', '.join(lacks)}, so no training can be continued from it; use "
            "ckpt_restore=weights"
        )
    if cfg.get("ckpt_restore") == "weights" or (cfg.get("ckpt_restore") is None and (lacks or others)):
        why = f", as settings differ: {', '.join(others)}" if others else ""
        why = f", as it has no {', '.join(lacks)}" if lacks else why
        say(f"this run begins with the weights of {paths.short(path)}, at epoch 1{why}")
        cfg.ckpt_path, cfg.ckpt_restore = str(path.resolve()), "weights"
        return
    path = check_usable(path, cfg, say)
    if (most := cfg.trainer.get("max_epochs")) is not None and 0 < most <= (epochs_done(checkpoint) or 0):
        raise SettingError(
            f"trainer.max_epochs={most}: ckpt_path={path} has {epochs_done(checkpoint)} epochs already; use more, or "
            "ckpt_restore=weights to begin at epoch 1"
        )
    say(f"this run continues the training of {paths.short(path)}: weights, optimizer, epoch")
    cfg.ckpt_path, cfg.ckpt_restore = str(path), "all"


def _test(
    cfg: DictConfig,
    run_dir: Path,
    about: dict[str, Any],
    say: Callable[[str], None],
    overrides: Sequence[str] | None = None,
) -> bool:
    """Whether a test is to be done; there is nothing in it to go on from."""
    if cfg.ckpt_path is not None:
        if WEIGHTS not in load_checkpoint(Path(cfg.ckpt_path)):
            raise SettingError(f"ckpt_path={cfg.ckpt_path}: it has no state_dict, so there is no network to test")
        cfg.ckpt_path = begun_from(cfg)
    if not about:
        return True
    before = _before(cfg, run_dir, about, overrides, say)
    if changes := changes_of(cfg, before, [name for name in HARMLESS if name != "ckpt_path"]):
        _refuse_second_run(cfg, run_dir, changes)
        raise SettingError(
            f"run.id={run_dir.name}: this run was made with other settings ({', '.join(changes)}); use another id"
        )
    if wrong := record.damage(run_dir, "result"):
        say(f"{wrong}: the test is made again, and that file is written again")
        return True
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
    return None if cfg.ckpt_path is None else str(real(Path(cfg.ckpt_path)))


def _goes_further(cfg: DictConfig, earlier: DictConfig) -> bool:
    """Whether more epochs or steps are asked for than a run was made with; it may have ended before these, and well."""
    for name in ("max_epochs", "max_steps"):
        before, now = earlier.trainer.get(name), cfg.trainer.get(name)
        if None not in (before, now) and before != -1 and (now == -1 or now > before):  # -1 is no limit
            return True
    return False
