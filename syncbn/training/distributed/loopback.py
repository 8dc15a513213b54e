"""Where a run on one machine listens: on the loopback interface alone.

torch's store and gloo ask nobody for a password. On all interfaces anybody on the network could read and write the keys
and the gradients of a run.
"""

import os
import socket
from typing import Any

LOCALHOST = "127.0.0.1"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def start_store(address: str = LOCALHOST, port: int = 0) -> Any:
    """A ``TCPStore`` in this process. It listens on ``address`` only if that is :data:`LOCALHOST`, else everywhere.

    Args:
        address: where ranks find it.
        port: 0 for a free one.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not by name

    options: dict[str, Any] = {"is_master": True, "wait_for_workers": False}
    if address == LOCALHOST:
        # TCPStore binds to all interfaces whatever its address, unless it is given a socket (torch 2.13, TCPStore.cpp).
        listener = socket.create_server((address, port), backlog=2048)
        port, options["master_listen_fd"] = listener.getsockname()[1], listener.detach()
    return TCPStore(address, port, **options)


def within_machine() -> dict[str, str]:
    """Environment variables for ranks that are all on this machine: gloo and NCCL listen on the loopback interface.

    By default both take the interface that the host's name leads to. What the user has set stays.
    """
    names = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback is None:
        return {}
    return {variable: loopback for variable in INTERFACES if variable not in os.environ}
