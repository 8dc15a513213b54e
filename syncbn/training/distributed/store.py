"""Shares values between ranks through the launcher's store (torch's TCPStore), before there is a process group."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from syncbn.training.distributed import environment, slurm
from syncbn.training.errors import AgreedError, SettingError

START = 600.0  # seconds to wait for the last rank to start: imports from a slow network disk take a minute


def shared(key: str, make: Callable[[], str], *, lasting: bool = False) -> str:
    """Calls ``make`` on rank 0 and returns its result on all ranks, under torchrun and srun.

    In any other process this returns ``make()``.

    Args:
        key: name of the value in the store.
        make: called on rank 0.
        lasting: keep the value when torchrun restarts the ranks (``--max-restarts``), so that they resume the same run.

    Raises:
        AgreedError: on all ranks, if ``make`` raises a SettingError.
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
    status, value = store.get(name).decode().split(" ", 1)
    if status == "no":
        raise AgreedError(value)
    return str(value)


def gathered(key: str, mine: str, timeout: float) -> list[str]:
    """Gathers one value of each rank, by rank, on all ranks, through the launcher's store.

    Raises:
        SettingError: a rank did not report within ``timeout`` seconds.
    """
    store, name, world = connect(timeout), of_this_attempt(key), int(os.environ["WORLD_SIZE"])
    store.set(f"{name}/{os.environ['RANK']}", mine)
    values = []
    for rank in range(world):
        try:
            values.append(str(store.get(f"{name}/{rank}").decode()))
        except RuntimeError as error:
            raise SettingError(
                "launcher", hint=f"rank {rank} of {world} did not report within {timeout:g} s"
            ) from error
    return values


def connect(timeout: float) -> Any:
    """Opens a new connection to the launcher's store; it waits ``timeout`` seconds for it, and for missing keys."""
    if environment.launcher() == "srun":
        slurm.join()
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not by name

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))


def of_this_attempt(key: str) -> str:
    """The name of a key in the store, with torchrun's count of restarts: a restarted rank must not read old values."""
    return f"syncbn/{key}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
