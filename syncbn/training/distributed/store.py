"""The launcher's store: what ranks share before there is a process group."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from syncbn.training.distributed import environment, slurm
from syncbn.training.errors import AgreedError, SettingError

START = 600.0  # seconds between the first rank and the last: imports from a slow network disk take a minute


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
    if environment.launcher() is None:
        return make()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise SettingError("run.id", None, "this torchrun has no store, so ranks cannot agree on an id; set run.id")
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
            raise error.agreed() from error
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
            raise SettingError(
                "launcher", hint=f"of {world} ranks, rank {rank} has not come within {timeout:g} s"
            ) from error
    return said


def connect(timeout: float) -> Any:
    """The launcher's store, by a connection of its own.

    Args:
        timeout: seconds to wait for it, and for what it does not have yet.
    """
    if environment.launcher() == "srun":
        slurm.join()
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not by name

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))


def of_this_attempt(key: str) -> str:
    """Its name in the store, another each time that torchrun starts the ranks anew."""
    return f"syncbn/{key}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
