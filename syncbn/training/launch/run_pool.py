"""Several runs of one program at once, each with ranks of its own: the cells of a study."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from syncbn.training.checkpoint import continue_run
from syncbn.training.config.plan import Plan
from syncbn.training.distributed.rank_processes import Ranks, Requests
from syncbn.training.distributed.signals import Interrupted
from syncbn.training.errors import SettingError
from syncbn.training.launch import outcome
from syncbn.training.launch.job import close_wandb, rank
from syncbn.training.launch.outcome import Outcome
from syncbn.training.run_directory import lock, record, symlinks

GO_ON = "the same command goes on with it"


class Run(NamedTuple):
    """One run.

    Attributes:
        plan: what it does.
        overrides: for the record.
    """

    plan: Plan
    overrides: list[str]

    @property
    def directory(self) -> Path:
        """The run directory; a run that is in it already is resumed."""
        return self.plan.run_dir


def run_all(
    runs: Sequence[Run], slots: int, requests: Requests, ended: Callable[[Run, Outcome], None]
) -> dict[Path, Outcome]:
    """Does all of ``runs``, in order, as many at once as there is room for; those that have finished before are left.

    One that fails, or cannot begin, does not stop the others. Once this process is asked to stop, those that are under
    way stop with a checkpoint and no other begins.

    Args:
        runs: of one machine.
        slots: processes at once. A run of more waits until it is alone.
        requests: within its context, what this process is asked.
        ended: called when one has ended, at once for one that had before.

    Returns:
        How each that was begun has ended, by directory.
    """
    waiting, outcomes = list(runs), {}
    live: list[tuple[Run, Ranks]] = []
    try:
        while waiting or live:
            if requests.seen:
                waiting = []
            while waiting and (not live or _processes(live) + waiting[0].plan.devices <= slots):
                run = waiting.pop(0)
                begun = _begin(run, None if live else requests)
                if isinstance(begun, Ranks):
                    live.append((run, begun))
                else:
                    outcomes[run.directory] = begun
                    ended(run, begun)
            wait([sentinel for _, ranks in live for sentinel in ranks.sentinels()], timeout=0.1)
            for run, ranks in list(live):
                if not ranks.live(requests, run.plan.cfg.timeouts.stop):
                    live.remove((run, ranks))
                    outcomes[run.directory] = _end(run, ranks, requests)
                    ended(run, outcomes[run.directory])
    finally:
        for run, ranks in live:  # something was raised here
            _end(run, ranks, requests)
    return outcomes


def _processes(live: list[tuple[Run, Ranks]]) -> int:
    return sum(run.plan.devices for run, _ in live)


def _begin(run: Run, requests: Requests | None) -> Ranks | Outcome:
    """Takes the run directory, writes the beginning of its record and starts the ranks; how the run has ended, where it
    has finished before or cannot begin.

    Args:
        run: to begin.
        requests: what interrupts the start; None where a start takes no time, as another run has begun before.
    """
    began, held, end = False, False, Outcome("finished")
    try:
        lock.hold(run.directory)
        held = True
        plan = continue_run.continued(run.plan, lambda line: None, run.overrides)
        if plan is not None:
            began = True
            symlinks.detach(run.directory)
            record.begin(plan, run.directory.name, run.overrides, continue_run.begun_from(run.plan))
            logs = run.directory / "ranks"
            return Ranks(plan.devices, rank, (run.directory,), logs, silent=True, signals=requests)
        record.mend(run.plan, run.directory.name, run.overrides)
    except (Exception, Interrupted) as error:
        said = " ".join(str(error).split())
        end = Outcome("failed", said if isinstance(error, SettingError) else f"{type(error).__name__}: {said}", 1)
        if isinstance(error, Interrupted):
            end = Outcome("interrupted", f"{said}; {GO_ON}", 128 + error.signum)
        with suppress(OSError):  # the disk may be full
            if began and record.read(run.directory, "run").get("status") == "running":
                record.end(run.directory, end.status)
                record.take_back(run.directory, refused=False)
    if held:
        lock.release(run.directory)
    return end


def _end(run: Run, ranks: Ranks, requests: Requests) -> Outcome:
    status, refused = "failed", False
    try:
        ranks.close()
        end = outcome.of(ranks.ends(), requests.seen, run.directory, GO_ON)
        status, refused = end.status, end.refused
        return end
    finally:
        with suppress(OSError):  # the disk may be full
            record.end(run.directory, status)
        if status != "finished":
            close_wandb(run.directory, requests)
            with suppress(OSError):
                record.take_back(run.directory, refused=refused)
        lock.release(run.directory)
