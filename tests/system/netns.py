"""Two nodes on one machine: network namespaces with an address each, joined by a bridge. Needs root and `ip`."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

PREFIX = "tmt"


@dataclass(frozen=True)
class Node:
    """`run` stands before a command that is to run there."""

    address: str
    run: tuple[str, ...]
    namespace: str
    wire: str

    def plug(self, *, is_in: bool) -> None:
        """Out: nothing arrives any more, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", self.wire, "up" if is_in else "down")


def why_not() -> str:
    """Why there can be no namespaces here; "" if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if shutil.which("ip") is None:
        return "there is no ip command"
    probe = subprocess.run(["ip", "netns", "add", f"{PREFIX}-probe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", f"{PREFIX}-probe"], capture_output=True)
    return f"no network namespaces: {probe.stderr.strip()}" if probe.returncode else ""


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Joined by one wire, each on 10.213.77.0/24."""
    names = [f"{PREFIX}{os.getpid() % 10000}-{index}" for index in range(2)]
    wires = [f"{PREFIX}{os.getpid() % 10000}w{index}" for index in range(2)]
    nodes = [Node(address=f"10.213.77.{index + 1}", run=("ip", "netns", "exec", names[index]), namespace=names[index], wire=wires[index])
             for index in range(2)]
    with contextlib.ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        _ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
        for name, wire, node in zip(names, wires, nodes, strict=True):
            _ip("link", "set", wire, "netns", name)
            _ip("-n", name, "addr", "add", f"{node.address}/24", "dev", wire)
            _ip("-n", name, "link", "set", wire, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield nodes[0], nodes[1]


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)
