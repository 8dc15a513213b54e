"""A run's name and directory, made once for all of its processes, and held by one of them at a time."""

import errno
import fcntl
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from time import strftime
from typing import Any

from syncbn.training.atomic_write import unlinked
from syncbn.training.config.schema import AgreedError, SettingError
from syncbn.training.console import printable
from syncbn.training.distributed import slurm

# What a directory, W&B, a glob and Hydra's command line all take. File servers for Windows drop a dot at the end.
# Letters that the locale lacks come as surrogates (PEP 383).
RUN_ID = r"[\w\udc80-\udcff]([\w\udc80-\udcff.+@ -]*[\w\udc80-\udcff+@-])?"
LONGEST = 255  # bytes in one name, on nearly every file system
START = 600.0  # seconds between the first rank and the last: imports from a slow network disk take a minute
_held: dict[Path, int] = {}  # open files, whose locks end with this process, however it ends


def run_dir(parent: str, run_id: str | None, ckpt_path: str | None, mode: str = "train") -> str:
    """The directory of a run: by its id; without one the run that ``ckpt_path`` lies in, else a new one.

    So ``ckpt_path`` alone continues a run, and with ``run.id`` it is where another run begins.
    """
    if run_id is not None:
        return str(Path(parent) / str(run_id))
    if mode == "train" and ckpt_path is not None and is_file(Path(ckpt_path)):
        earlier = run_of(Path(ckpt_path))
        if earlier is not None:
            return str(earlier)
    return str(Path(parent) / new_id())


def check_id(run_id: str | None) -> None:
    """Raises:
    SettingError: no directory, or no W&B run, may have this name.
    """
    if run_id is not None and not re.fullmatch(RUN_ID, run_id):
        raise SettingError(
            f"run.id={printable(run_id)}: use letters, digits, any of -_.+@, and blanks between them; "
            "no dot last, a letter or digit first"
        )
    if run_id is not None and len(os.fsencode(run_id)) > LONGEST:
        raise SettingError(f"run.id={run_id[:20]}...: the name is too long; use at most {LONGEST} bytes")


def run_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in, also one without ``run.json``.

    Of a symbolic link outside of all runs it is that of the target.
    """
    for path in (Path(os.path.normpath(checkpoint.absolute())), real(checkpoint)):
        found = next((d for d in path.parents if (d / "run.json").exists() or _is_run(d, path)), None)
        if found is not None:
            return real(found)
    return None


def real(path: Path) -> Path:
    """``path`` without symbolic links. ``Path.resolve`` does this too, and raises where links lead in a circle."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # a NUL, which no file has in its name
        return path.absolute()


def _is_run(directory: Path, checkpoint: Path) -> bool:
    return checkpoint.parent == directory / "checkpoints" and (directory / "config.yaml").exists()


def is_file(path: Path) -> bool:
    """Whether there is such a file; no for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def is_link(path: Path) -> bool:
    """Likewise for a symbolic link."""
    try:
        return path.is_symlink()
    except (OSError, ValueError):
        return False


def is_directory(path: Path) -> bool:
    """Likewise for a directory."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


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
        OSError: there can be no such directory.
    """
    patience = 5
    while True:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = _open_lock(run_dir)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(file, run_dir / ".lock"):
                break
        except BlockingIOError:
            if not patience:
                holder = os.read(file, 200).decode(errors="replace") or "another process"
                os.close(file)
                raise SettingError(
                    f"run.id={run_dir.name}: {printable(holder)} is at this run already; wait for it, or stop it"
                ) from None
            time.sleep(0.05)  # it may be nothing but a check (is_held), which is over at once
        except OSError:  # a file system without locks
            os.close(file)
            return
        patience -= 1
        os.close(file)  # also where another has removed it, with a directory that it had made in vain
    with suppress(OSError):  # no space left, or read-only; the lock holds all the same
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _held[run_dir] = file


def release(run_dir: Path) -> None:
    """Lets others have the run directory. One that holds nothing but the lock loses that too."""
    if run_dir not in _held:
        return
    file = _held.pop(run_dir)
    with suppress(OSError):
        if [path.name for path in run_dir.iterdir()] == [".lock"]:
            (run_dir / ".lock").unlink()
        os.truncate(file, 0)
    os.close(file)


def is_held(run_dir: Path) -> bool | None:
    """Whether a process is at this run; None where no lock tells: in a copy, or on a file system without locks."""
    try:
        file = os.open(run_dir / ".lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(file)
    return False


def _open_lock(run_dir: Path) -> int:
    path = run_dir / ".lock"
    try:
        return os.open(unlinked(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not path.exists():
            raise
        # A run that has finished is shown from a read-only directory too.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _is_same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
