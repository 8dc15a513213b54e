"""A run's name and directory, made once for all of its processes, and held by one of them at a time."""

import fcntl
import os
import secrets
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from time import strftime
from typing import Any

from syncbn.training import slurm
from syncbn.training.files import unlinked
from syncbn.training.schema import AgreedError, SettingError

START = 600.0  # seconds between the first rank and the last: imports from a slow network disk take a minute
_held: dict[Path, int] = {}  # open files, whose locks end with this process, however it ends


def run_dir(parent: str, run_id: str | None, ckpt_path: str | None, mode: str = "train") -> str:
    """The directory of a run: the one that ``ckpt_path`` lies in, where it goes on from there, else by its id."""
    if mode == "train" and ckpt_path is not None and Path(ckpt_path).is_file():
        earlier = run_of(Path(ckpt_path))
        if earlier is not None:
            return str(earlier)
    return str(Path(parent) / (new_id() if run_id is None else str(run_id)))


def run_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in; of a symbolic link outside of all runs, that of its target."""
    places = (*Path(os.path.normpath(checkpoint.absolute())).parents, *real(checkpoint).parents)
    found = next((d for d in places if (d / "run.json").exists()), None)
    return None if found is None else real(found)


def real(path: Path) -> Path:
    """``path`` without symbolic links. ``Path.resolve`` does this too, and raises where links lead in a circle."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # a NUL, which no file has in its name
        return path.absolute()


@cache
def new_id() -> str:
    """That of the Slurm job, which a requeue keeps, else date, time and a few letters: ``20260131-235959-3f9c``.

    An interactive allocation runs many things, so there it is date and time too.
    """
    if slurm.job() and not slurm.is_interactive():
        return f"slurm-{slurm.job()}"
    return shared("run_id", lambda: f"{strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}", lasting=True)


def sweep_dir(parent: str) -> str:
    """The directory of a sweep: that of the job array, whose tasks share it, else date and time."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return str(Path(parent) / (f"slurm-{array}" if array else strftime("%Y%m%d-%H%M%S")))


def launcher() -> str | None:
    """Who started this process as a rank: torchrun, srun, or nobody: then it starts ranks itself."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "srun" if slurm.is_task() else None


def rank() -> int:
    """This process's rank; 0 where nobody started it as one."""
    return int(os.environ.get("RANK", os.environ["SLURM_PROCID"] if slurm.is_task() else "0"))


def host() -> str:
    """The machine that this process runs on; under srun by the name that Slurm has for it."""
    return (os.environ.get("SLURMD_NODENAME") if slurm.is_task() else None) or socket.gethostname()


def shared(key: str, make: Callable[[], str], *, lasting: bool = False) -> str:
    """What rank 0 makes of it, on all ranks that compose a configuration of their own: those of torchrun and srun.

    It goes through the launcher's store, as there is no process group yet.

    Args:
        key: what it is.
        make: called on rank 0.
        lasting: made once, also where torchrun starts the ranks anew (``--max-restarts``), so that they go on.

    Raises:
        AgreedError: on all ranks, where ``make`` raises a SettingError.
    """
    if launcher() is None:
        return make()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise SettingError("run.id=null: this torchrun keeps no store to agree through; give the run an id")
    store = connect(START)
    name = f"syncbn/{key}" if lasting else of_this_attempt(key)
    if os.environ["RANK"] == "0" and not (lasting and store.check([name])):
        try:
            store.set(name, f"ok {make()}")
        except AgreedError as error:
            store.set(name, f"no {error}")
            raise
        except SettingError as error:
            store.set(name, f"no {error}")
            raise AgreedError(str(error)) from error
    word, said = store.get(name).decode().split(" ", 1)
    if word == "no":
        raise AgreedError(said)
    return str(said)


def gathered(key: str, mine: str, timeout: float) -> list[str]:
    """What each rank says, on all ranks; through the launcher's store too.

    Args:
        key: what it is about.
        mine: what this rank says.
        timeout: seconds to wait for the slowest.

    Raises:
        SettingError: a rank said nothing in time.
    """
    store, name, world = connect(timeout), of_this_attempt(key), int(os.environ["WORLD_SIZE"])
    store.set(f"{name}/{os.environ['RANK']}", mine)
    said = []
    for rank in range(world):
        try:
            said.append(str(store.get(f"{name}/{rank}").decode()))
        except RuntimeError as error:
            raise SettingError(f"launcher: of {world} ranks, rank {rank} has not come within {timeout:g} s") from error
    return said


def connect(timeout: float) -> Any:
    """The launcher's store, by a connection of its own.

    Args:
        timeout: seconds to wait for it, and for what it does not have yet.
    """
    if launcher() == "srun":
        slurm.join()
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not by name

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))


def of_this_attempt(key: str) -> str:
    """Its name in the store, another each time that torchrun starts the ranks anew."""
    return f"syncbn/{key}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def hold(run_dir: Path) -> None:
    """Takes the run directory for this process, until its end, a sudden one too.

    Raises:
        SettingError: another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = os.open(unlinked(run_dir / ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(file, 200).decode() or "another process"
        os.close(file)
        raise SettingError(f"run.id={run_dir.name}: {holder} is at this run already; wait for it, or stop it") from None
    except OSError:  # a file system without locks
        os.close(file)
        return
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _held[run_dir] = file


def release(run_dir: Path) -> None:
    """Lets others have the run directory."""
    if run_dir in _held:
        os.close(_held.pop(run_dir))
