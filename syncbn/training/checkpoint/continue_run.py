"""What earlier attempts of a run left: whether there is anything to do, and the checkpoint to resume from."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
from syncbn.training.config.plan import Plan
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


def continued(
    plan: Plan,
    say: Callable[[str], None],
    overrides: Sequence[str] | None = None,
    *,
    named: bool = True,
) -> Plan | None:
    """The plan of this attempt, with the checkpoint that it starts from. Changes no file.

    A run that has begun continues from its newest sound checkpoint. A new one begins from the checkpoint that was
    named, if one was: it continues that training where the settings are the same, and else takes the weights alone. A
    named checkpoint of this run itself counts once; the same command then resumes the run.

    Args:
        plan: of the settings; there need be no run directory yet.
        say: takes lines for the user.
        overrides: of the command line; None where these are unknown.
        named: the user has named this run, by ``run.id`` or its directory; else ``ckpt_path`` alone leads here.

    Returns:
        None if there is nothing to do: the run has finished with these settings.

    Raises:
        SettingError: the run has finished with other settings, has begun otherwise, or has files that are damaged
            beyond recovery; or the checkpoint cannot be continued from. The run is as it was.
    """
    about = _recovered(plan.run_dir, say)
    attempt = _Attempt(plan, about, say, overrides, named)
    if plan.cfg.get("mode") == "test" or about.get("tests"):
        return attempt.test()
    attempt.refuse_another_start()
    if not about:
        return plan if plan.checkpoint is None else _started(plan, say)
    if attempt.is_finished:
        attempt.refuse_other_settings_when_finished()
        if not attempt.has_more_to_do():
            return None
    attempt.refuse_other_settings()
    return attempt.resumed()


@dataclass
class _Attempt:
    """A further attempt of a run, and what is known of the earlier ones.

    Attributes:
        plan: of this attempt.
        about: the record of the run; empty where it has not begun.
        say: takes lines for the user.
        overrides: of the command line.
        named: the user has named this run.
        newest: the newest sound checkpoint of the run; None while it has not been looked for, and where there is none.
        before: the settings that the run was made with.
        changes: what this attempt has otherwise.
    """

    plan: Plan
    about: dict[str, Any]
    say: Callable[[str], None]
    overrides: Sequence[str] | None
    named: bool
    newest: Path | None = None
    before: DictConfig = field(init=False)
    changes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        checkpoint, run_dir = self.plan.checkpoint, self.plan.run_dir
        self.is_finished = self.about.get("status") == "finished"
        self.from_this_run = checkpoint is not None and run_of(Path(checkpoint)) == run_dir.resolve()
        self.from_another_start = checkpoint is not None and self.about.get("begun_from") != begun_from(self.plan)

    def refuse_another_start(self) -> None:
        """Refuses a checkpoint other than the one that this run began from."""
        run_dir, about = self.plan.run_dir, self.about
        self.newest = files.newest(run_dir / "checkpoints", self.say) if about and not self.is_finished else None
        if self.from_another_start and not self.from_this_run and (self.is_finished or self.newest):
            since = f"from {about['begun_from']}" if about.get("begun_from") else "without a checkpoint"
            raise self._refusal(
                f"this run exists and began {since}, not from ckpt_path={self.plan.checkpoint}; use another id, or "
                "leave ckpt_path out"
            )

    def refuse_other_settings_when_finished(self) -> None:
        """Refuses changes, except more training and what is compared without a word."""
        self._compare()
        others = self.changes if self._trains_longer() else changes_of(self.plan.cfg, self.before, DONE)
        if others:
            said = f"has finished with other settings ({', '.join(others)}); use another id{self._to_begin()}"
            if self.named:
                raise self._refusal(f"this run {said}")
            raise SettingError("ckpt_path", self.plan.checkpoint, f"run {self.plan.run_dir.name} {said}")

    def has_more_to_do(self) -> bool:
        """Whether a finished run trains longer now, or has lost its results."""
        run_dir, wrong = self.plan.run_dir, record.damage(self.plan.run_dir, "result")
        longer = self._trains_longer()
        if not (longer or wrong):
            return False
        self.newest = files.newest(run_dir / "checkpoints", self.say)
        if not longer and self.newest is None:
            raise self._refusal(
                f"{wrong}, and no sound checkpoint is left to test; to train it again remove {paths.short(run_dir)}, "
                "or use another id"
            )
        if not longer:
            self.say(f"{wrong}: the run is tested again, and its results are written again")
        return True

    def refuse_other_settings(self) -> None:
        """Refuses changes where ``ckpt_path`` alone leads to this run, and a second run in one Slurm job."""
        self._compare()
        run_dir, restore = self.plan.run_dir, self.plan.restore
        if self.changes and not self.named:
            raise SettingError(
                "ckpt_path",
                self.plan.checkpoint,
                f"run {run_dir.name} has other settings ({', '.join(self.changes)}); use another id{self._to_begin()}",
            )
        if self.from_another_start and self.from_this_run and restore == "weights":
            raise SettingError(
                "ckpt_restore", restore, f"{run_dir.name} continues with its whole state{self._to_begin()}"
            )
        self._refuse_second_run()

    def resumed(self) -> Plan:
        """The plan that resumes from the newest checkpoint, or begins anew where there is none."""
        plan, newest = self.plan, self.newest
        if self.from_another_start and self.from_this_run:
            newest = whole_checkpoint(Path(str(plan.checkpoint)))
        how = ENDED.get(self.about["status"], "was killed")  # nobody holds it: it had no time to say more
        what = f"goes on from {paths.short(newest)}" if newest else "had no checkpoint and begins anew"
        self.say(f"this run {how} before; it {what}")
        if self.changes:
            self.say(f"with other settings than before: {', '.join(self.changes)}")
        if newest is not None:
            path = check_usable(newest, plan, self.say)
            refuse_less_training(path, plan.cfg, self.before, plan.run_dir)
            return plan.starting_from(path, "all")
        return plan if plan.checkpoint is None else _started(plan, self.say)

    def test(self) -> Plan | None:
        """The plan of a test, which begins anew each time."""
        plan, run_dir = self.plan, self.plan.run_dir
        if plan.checkpoint is not None:
            if WEIGHTS not in load_checkpoint(Path(plan.checkpoint)):
                raise SettingError("ckpt_path", plan.checkpoint, "it has no state_dict, so there is no network to test")
            plan = plan.starting_from(begun_from(plan), plan.restore)
        if not self.about:
            return plan
        self.before = self._settings_before()
        free = [name for name in HARMLESS if name != "ckpt_path"]
        if changes := changes_of(plan.settings(), self.before, free):
            self.changes = changes
            self._refuse_second_run()
            raise self._refusal(f"this run was made with other settings ({', '.join(changes)}); use another id")
        if wrong := record.damage(run_dir, "result"):
            self.say(f"{wrong}: the test is made again, and that file is written again")
            return plan
        if self.is_finished:
            return None
        self.say(f"this run {ENDED.get(self.about['status'], 'was killed')} before; it begins anew")
        return plan

    def _compare(self) -> None:
        if not hasattr(self, "before"):
            self.before = self._settings_before()
            self.changes = changes_of(self.plan.cfg, self.before, FREE)

    def _settings_before(self) -> DictConfig:
        """The settings that the run was made with; today's where these are lost, which is reported.

        Raises:
            SettingError: they are lost, the run has finished, and whether it was made with today's is not known.
        """
        run_dir, earlier = self.plan.run_dir, self.about.get("overrides")
        try:
            before = record.settings(run_dir)
            wrong = f"{paths.short(run_dir / 'config.yaml')} is missing"
        except DamagedError as error:
            before, wrong = None, str(error)
        if before is not None:
            return before
        if self.is_finished and self.overrides is not None and _that_matter(earlier) != _that_matter(self.overrides):
            said = " ".join(map(str, earlier)) if isinstance(earlier, list) else "unknown"
            raise self._refusal(
                f"{wrong}, so settings cannot be compared; use those of the run ({said}), or another id"
            )
        self.say(f"{wrong}: settings are not compared, and config.yaml is written again from today's")
        return self.plan.cfg

    def _trains_longer(self) -> bool:
        """Whether more epochs or steps are set than the run was made with; it may have ended before these, and well."""
        for name in ("max_epochs", "max_steps"):
            before, now = self.before.trainer.get(name), self.plan.cfg.trainer.get(name)
            if None not in (before, now) and before != -1 and (now == -1 or now > before):  # -1 is no limit
                return True
        return False

    def _refuse_second_run(self) -> None:
        if self.changes and self.plan.cfg.run.id is None and self.plan.run_dir.name == f"slurm-{slurm.job()}":
            raise SettingError(
                "run.id",
                None,
                f"this Slurm job has made a run with other settings before ({', '.join(self.changes)}); give each "
                "train.py of a job script a run.id",
            )

    def _to_begin(self) -> str:
        """What a refusal adds where the user named a checkpoint: another run may begin from it."""
        return "" if self.plan.checkpoint is None else " (run.id=NAME begins another run from that checkpoint)"

    def _refusal(self, hint: str) -> SettingError:
        return SettingError("run.id", self.plan.run_dir.name, hint)


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
        raise SettingError("run.id", run_dir.name, explain(error, path)) from error
    return record.recovered(run_dir, say)


def _that_matter(overrides: object) -> set[str] | None:
    """Overrides that say what is trained; None where these are none."""
    if not isinstance(overrides, list | tuple):
        return None
    harmless = tuple(f"{name}." for name in HARMLESS)
    said = {str(each).lstrip("+") for each in overrides}
    return {each for each in said if not f"{each.partition('=')[0]}.".startswith(harmless)}


def begun_from(plan: Plan) -> str | None:
    """The checkpoint that the user named, for the record."""
    return None if plan.checkpoint is None else str(real(Path(plan.checkpoint)))


def _started(plan: Plan, say: Callable[[str], None]) -> Plan:
    """Decides what a new run takes from the checkpoint that the user named: all of the training, or the weights alone.

    Raises:
        SettingError: it cannot be read, or has no weights; or ``ckpt_restore=all`` is set and not possible.
    """
    path = Path(str(plan.checkpoint))
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint.get(WEIGHTS), dict):
        raise SettingError(
            "ckpt_path",
            path,
            "it has no state_dict; use a checkpoint of Lightning, or a file that "
            'torch.save({"state_dict": module.state_dict()}, path) wrote, module being the LightningModule',
        )
    lacks, others = lacking_parts(checkpoint), _other_settings(plan, path)
    if plan.restore == "all" and lacks:
        raise SettingError(
            "ckpt_restore",
            "all",
            f"{path} has no {', '.join(lacks)}, so no training can be continued from it; use ckpt_restore=weights",
        )
    if plan.restore == "weights" or (plan.restore is None and (lacks or others)):
        why = f", as settings differ: {', '.join(others)}" if others else ""
        why = f", as it has no {', '.join(lacks)}" if lacks else why
        say(f"this run begins with the weights of {paths.short(path)}, at epoch 1{why}")
        return plan.starting_from(path.resolve(), "weights")
    path = check_usable(path, plan, say)
    if (most := plan.cfg.trainer.get("max_epochs")) is not None and 0 < most <= (epochs_done(checkpoint) or 0):
        raise SettingError(
            "trainer.max_epochs",
            most,
            f"ckpt_path={path} has {epochs_done(checkpoint)} epochs already; use more, or ckpt_restore=weights to "
            "begin at epoch 1",
        )
    say(f"this run continues the training of {paths.short(path)}: weights, optimizer, epoch")
    return plan.starting_from(path, "all")


def _other_settings(plan: Plan, path: Path) -> list[str]:
    """What this run has otherwise than the run of the checkpoint, by which its training would not be continued."""
    if (run_dir := run_of(path)) is not None:
        with suppress(DamagedError):
            before = record.settings(run_dir)
            return [] if before is None else changes_of(plan.cfg, before, CONTINUED)
    return []
