"""Which host this is, for those who want to share memory: two processes of one identity can open each other's, if they may.

A name would not do: containers of one machine may have different ones, and machines cloned from one image the same.
"""

import functools
import os
import socket
from pathlib import Path


@functools.cache
def host_identity() -> str:
    """The machine since it was booted, and the namespaces in which process ids and shared memory mean something."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return ":".join([boot, *(str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in ("pid", "ipc"))])
    except OSError:  # no Linux, or no /proc: then nothing is mapped across processes either
        return f"{socket.gethostname()}:{os.getpid()}"


def address_towards(host: str, port: int) -> str:
    """The address of this machine from which `host` is reached: where those who share that network can reach us. "" if it is not."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing: picks the route
            address: str = probe.getsockname()[0]
            return address
    except OSError:
        return ""
