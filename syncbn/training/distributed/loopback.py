"""Makes a run on one machine listen on the loopback interface only.

torch's store and gloo have no authentication. If they listened on all interfaces, any host on the network could read
and write the keys and the gradients of a run.
"""

import os
import socket
from typing import Any

LOCALHOST = "127.0.0.1"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def start_store(address: str = LOCALHOST, port: int = 0) -> Any:
    """Starts a ``TCPStore`` server in this process, to which ranks connect by ``address``; port 0 is a free one.

    It listens on the loopback interface if ``address`` is :data:`LOCALHOST`, and otherwise on all interfaces.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not by name

    options: dict[str, Any] = {"is_master": True, "wait_for_workers": False}
    if address == LOCALHOST:
        # TCPStore binds to all interfaces whatever its address, unless it is given a socket (torch 2.13, TCPStore.cpp).
        listener = socket.create_server((address, port), backlog=2048)
        port, options["master_listen_fd"] = listener.getsockname()[1], listener.detach()
    return TCPStore(address, port, **options)


def within_machine() -> dict[str, str]:
    """Environment variables that make gloo and NCCL listen on the loopback interface, for ranks on one machine.

    By default both use the interface that the host name resolves to. Variables that the user has set are not changed.
    """
    names = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback is None:
        return {}
    return {variable: loopback for variable in INTERFACES if variable not in os.environ}
