"""Decides what a command does with an existing run: resume it, refuse it, or report that it has finished.

An *attempt* is one execution of a run's command. A run that was interrupted and resumed has two.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from syncbn.training.checkpoint import files
from syncbn.training.checkpoint.usable_checkpoint import (
    WEIGHTS,
    check_usable,
    epochs_done,
    load_checkpoint,
    missing_parts,
    refuse_less_training,
)
from syncbn.training.config.compare import DONE, FREE, HARMLESS, changes_of
from syncbn.training.config.plan import Plan
from syncbn.training.distributed import slurm
from syncbn.training.errors import SettingError
from syncbn.training.os_errors import explain
from syncbn.training.read_file import DamagedError, read_bytes
from syncbn.training.run_directory import paths, record
from syncbn.training.run_directory.paths import real, run_of

# Settings that a new run may change when it continues the training of another run. All that affects training is equal.
CONTINUED = [*FREE, "callbacks", "simulate", "mode", "test", "precise_batches", "fit", "target", "adapt", "corruptions"]
CONTINUED += ["study", "find_lr", "early_stopping", "init_from"]
ENDED = {"failed": "failed", "interrupted": "was interrupted", "finished": "finished"}


def continued(
    plan: Plan,
    report: Callable[[str], None],
    overrides: Sequence[str] | None = None,
    *,
    named: bool = True,
) -> Plan | None:
    """Makes the plan of this attempt, with the checkpoint that it starts from. Changes no file.

    A run that has begun resumes from its newest intact checkpoint. A new run starts from the checkpoint of
    ``ckpt_path``, if it is set: with equal settings it continues that training, otherwise it takes the weights only.
    If ``ckpt_path`` is a checkpoint of this run itself, the first command with it resumes from that checkpoint. The
    same command, repeated, resumes from the newest one.

    Args:
        plan: of the settings; the run directory need not exist yet.
        report: called with lines for the user.
        overrides: of the command line; None if they are unknown.
        named: the user has named this run, by ``run.id`` or its directory; otherwise it was found by ``ckpt_path``.

    Returns:
        None if there is nothing to do: the run has finished with these settings.

    Raises:
        SettingError: the run has finished with other settings, has started from another checkpoint, or has files that
            are damaged beyond recovery; or the checkpoint cannot be continued from. The run is unchanged.
    """
    about = _recovered(plan.run_dir, report)
    attempt = _Attempt(plan, about, report, overrides, named)
    if plan.cfg.get("mode") == "test" or about.get("tests"):
        return attempt.test()
    attempt.refuse_other_start()
    if not about:
        return plan if plan.checkpoint is None else _new_run_from(plan, report)
    if attempt.is_finished:
        attempt.refuse_other_settings_when_finished()
        if not attempt.has_more_to_do():
            return None
    attempt.refuse_other_settings()
    return attempt.resumed()


@dataclass
class _Attempt:
    """An attempt of a run, and the record and settings of the earlier ones.

    Attributes:
        about: the contents of ``run.json``; empty if the run has not begun.
        newest: the newest intact checkpoint of the run; None before the search, and if there is none.
    """

    plan: Plan
    about: dict[str, Any]
    report: Callable[[str], None]
    overrides: Sequence[str] | None
    named: bool
    newest: Path | None = None

    def __post_init__(self) -> None:
        checkpoint, run_dir = self.plan.checkpoint, self.plan.run_dir
        self.is_finished = self.about.get("status") == "finished"
        self.from_this_run = checkpoint is not None and run_of(Path(checkpoint)) == run_dir.resolve()
        self.from_another_start = checkpoint is not None and self.about.get("begun_from") != begun_from(self.plan)

    def refuse_other_start(self) -> None:
        """Refuses a ``ckpt_path`` other than the checkpoint that this run began from."""
        run_dir, about = self.plan.run_dir, self.about
        self.newest = files.newest(run_dir / "checkpoints", self.report) if about and not self.is_finished else None
        if self.from_another_start and not self.from_this_run and (self.is_finished or self.newest):
            since = f"from {about['begun_from']}" if about.get("begun_from") else "without a checkpoint"
            hint = f"this run exists and began {since}, not from ckpt_path={self.plan.checkpoint}; "
            raise self._refusal(f"{hint}use another id, or leave ckpt_path out")

    def refuse_other_settings_when_finished(self) -> None:
        """Refuses changed settings, except longer training and settings that do not affect the result."""
        others = self.changes if self._trains_longer() else changes_of(self.plan.cfg, self.before, DONE)
        if others:
            reason = f"has finished with other settings ({', '.join(others)}); use another id{self._new_run_hint()}"
            if self.named:
                raise self._refusal(f"this run {reason}")
            raise SettingError("ckpt_path", self.plan.checkpoint, f"run {self.plan.run_dir.name} {reason}")

    def has_more_to_do(self) -> bool:
        """Whether a finished run is to train longer, or its results are damaged and have to be measured again."""
        run_dir, wrong = self.plan.run_dir, record.damage(self.plan.run_dir, "result")
        longer = self._trains_longer()
        if not (longer or wrong):
            return False
        self.newest = files.newest(run_dir / "checkpoints", self.report)
        if not longer and self.newest is None:
            hint = f"{wrong}, and no intact checkpoint is left to test; "
            raise self._refusal(f"{hint}to train it again remove {paths.short(run_dir)}, or use another id")
        if not longer:
            self.report(f"{wrong}: the run is tested again, and its results are rewritten")
        return True

    def refuse_other_settings(self) -> None:
        """Refuses changed settings in a run that was found by ``ckpt_path``, and a second run in one Slurm job."""
        name, restore = self.plan.run_dir.name, self.plan.restore
        if self.changes and not self.named:
            hint = f"run {name} has other settings ({', '.join(self.changes)}); use another id{self._new_run_hint()}"
            raise SettingError("ckpt_path", self.plan.checkpoint, hint)
        if self.from_another_start and self.from_this_run and restore == "weights":
            hint = f"{name} continues with its whole state{self._new_run_hint()}"
            raise SettingError("ckpt_restore", restore, hint)
        self._refuse_second_run()

    def resumed(self) -> Plan:
        """The plan that resumes from the newest checkpoint, or starts over if there is none."""
        plan, newest = self.plan, self.newest
        if self.from_another_start and self.from_this_run:
            newest = Path(str(plan.checkpoint))
            if missing := missing_parts(load_checkpoint(newest)):
                hint = f"it has no {', '.join(missing)}, so no training can be continued from it; "
                raise SettingError("ckpt_path", newest, f"{hint}run.id=NAME begins another run with its weights")
        # The status is "running", but no process holds the lock: the earlier attempt was killed.
        how = ENDED.get(self.about["status"], "was killed")
        what = f"resumes from {paths.short(newest)}" if newest else "had no checkpoint and starts over"
        self.report(f"this run {how} before; it {what}")
        if self.changes:
            self.report(f"settings that changed since the last attempt: {', '.join(self.changes)}")
        if newest is not None:
            path = check_usable(newest, plan, self.report)
            refuse_less_training(path, plan.cfg, self.before, plan.run_dir)
            return plan.starting_from(path, "all")
        return plan if plan.checkpoint is None else _new_run_from(plan, self.report)

    def test(self) -> Plan | None:
        """The plan of a run that only tests (``mode=test``); None if it has finished. A test is never resumed."""
        plan, run_dir = self.plan, self.plan.run_dir
        if plan.checkpoint is not None:
            if WEIGHTS not in load_checkpoint(Path(plan.checkpoint)):
                raise SettingError("ckpt_path", plan.checkpoint, "it has no state_dict, so there is no network to test")
            plan = plan.starting_from(begun_from(plan), plan.restore)
        if not self.about:
            return plan
        free = [name for name in HARMLESS if name != "ckpt_path"]
        if changes := changes_of(plan.settings(), self.before, free):
            self.changes = changes
            self._refuse_second_run()
            raise self._refusal(f"this run was made with other settings ({', '.join(changes)}); use another id")
        if wrong := record.damage(run_dir, "result"):
            self.report(f"{wrong}: the test is repeated, and that file is rewritten")
            return plan
        if self.is_finished:
            return None
        self.report(f"this run {ENDED.get(self.about['status'], 'was killed')} before; it starts over")
        return plan

    @cached_property
    def changes(self) -> list[str]:
        """The settings that this attempt changes."""
        return changes_of(self.plan.cfg, self.before, FREE)

    @cached_property
    def before(self) -> DictConfig:
        """The settings of the earlier attempts; if they are lost, the current settings, which is reported.

        Raises:
            SettingError: the settings of a finished run are lost, and the command line differs from the recorded one.
        """
        run_dir, earlier = self.plan.run_dir, self.about.get("overrides")
        try:
            before = record.settings(run_dir)
            wrong = f"{paths.short(run_dir / 'config.yaml')} is missing"
        except DamagedError as error:
            before, wrong = None, str(error)
        if before is not None:
            return before
        known = self.overrides is not None
        if self.is_finished and known and _training_overrides(earlier) != _training_overrides(self.overrides):
            typed = " ".join(map(str, earlier)) if isinstance(earlier, list) else "unknown"
            hint = f"{wrong}, so settings cannot be compared; use those of the run ({typed}), or another id"
            raise self._refusal(hint)
        self.report(f"{wrong}: settings are not compared, and config.yaml is rewritten with the current settings")
        return self.plan.cfg

    def _trains_longer(self) -> bool:
        """Whether ``max_epochs`` or ``max_steps`` is higher than before.

        The settings are compared, not the epochs done: early stopping may have ended the run before its limit.
        """
        for name in ("max_epochs", "max_steps"):
            before, now = self.before.trainer.get(name), self.plan.cfg.trainer.get(name)
            if None not in (before, now) and before != -1 and (now == -1 or now > before):  # -1 is no limit
                return True
        return False

    def _refuse_second_run(self) -> None:
        """Refuses a second run with changed settings in one Slurm job, where the job's id names both runs."""
        if self.changes and self.plan.cfg.run.id is None and self.plan.run_dir.name == f"slurm-{slurm.job()}":
            hint = f"this Slurm job has made a run with other settings before ({', '.join(self.changes)}); "
            raise SettingError("run.id", None, f"{hint}give each train.py of a job script a run.id")

    def _new_run_hint(self) -> str:
        """How to begin another run from ``ckpt_path``; empty if it is not set."""
        return "" if self.plan.checkpoint is None else " (run.id=NAME begins another run from that checkpoint)"

    def _refusal(self, hint: str) -> SettingError:
        return SettingError("run.id", self.plan.run_dir.name, hint)


def _recovered(run_dir: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """The contents of ``run.json``, recovered if it is damaged; empty if the run has not begun.

    Raises:
        SettingError: the system cannot read the file, for example because of its permissions. Nothing is recovered
            then, since the file may be intact.
    """
    path = run_dir / "run.json"
    try:
        read_bytes(path)
    except (FileNotFoundError, DamagedError):
        pass
    except OSError as error:
        raise SettingError("run.id", run_dir.name, explain(error, path)) from error
    return record.recovered(run_dir, report)


def _training_overrides(overrides: object) -> set[str] | None:
    """The overrides that affect the result; None if this is not a list of overrides, as in a damaged record."""
    if not isinstance(overrides, list | tuple):
        return None
    harmless = tuple(f"{name}." for name in HARMLESS)
    typed = {str(each).lstrip("+") for each in overrides}
    return {each for each in typed if not f"{each.partition('=')[0]}.".startswith(harmless)}


def begun_from(plan: Plan) -> str | None:
    """The absolute path of ``ckpt_path`` without symbolic links, for ``run.json``; None if it is not set."""
    return None if plan.checkpoint is None else str(real(Path(plan.checkpoint)))


def _new_run_from(plan: Plan, report: Callable[[str], None]) -> Plan:
    """Decides what a new run takes from ``ckpt_path``: the whole training state or the weights only.

    Raises:
        SettingError: the checkpoint cannot be read or has no weights; or ``ckpt_restore=all`` is not possible.
    """
    path = Path(str(plan.checkpoint))
    if plan.cfg.get("init_from") is not None:
        hint = f"a new run begins with the weights of ckpt_path={paths.short(path)} already; set one of the two"
        raise SettingError("init_from", plan.cfg.get("init_from"), hint)
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint.get(WEIGHTS), dict):
        hint = "it has no state_dict; use a checkpoint of Lightning, or a file that "
        hint += 'torch.save({"state_dict": module.state_dict()}, path) wrote, module being the LightningModule'
        raise SettingError("ckpt_path", path, hint)
    missing, others = missing_parts(checkpoint), _other_settings(plan, path)
    if plan.restore == "all" and missing:
        hint = f"{path} has no {', '.join(missing)}, so no training can be continued from it; use ckpt_restore=weights"
        raise SettingError("ckpt_restore", "all", hint)
    if plan.restore == "weights" or (plan.restore is None and (missing or others)):
        why = f", as settings differ: {', '.join(others)}" if others else ""
        why = f", as it has no {', '.join(missing)}" if missing else why
        report(f"this run begins with the weights of {paths.short(path)}, at epoch 1{why}")
        return plan.starting_from(path.resolve(), "weights")
    path = check_usable(path, plan, report)
    done, most = epochs_done(checkpoint) or 0, plan.cfg.trainer.get("max_epochs")
    if most is not None and 0 < most <= done:
        hint = f"ckpt_path={path} has {done} epochs already; use more, or ckpt_restore=weights to begin at epoch 1"
        raise SettingError("trainer.max_epochs", most, hint)
    report(f"this run continues the training of {paths.short(path)}: weights, optimizer, epoch")
    return plan.starting_from(path, "all")


def _other_settings(plan: Plan, path: Path) -> list[str]:
    """The changed settings because of which this run cannot continue the training of the checkpoint's run."""
    if (run_dir := run_of(path)) is not None:
        with suppress(DamagedError):
            before = record.settings(run_dir)
            return [] if before is None else changes_of(plan.cfg, before, CONTINUED)
    return []
