"""How the commands of an operator find a farm: by one of its doors (REST shim, config server), or by the URLs of NATS and Redis."""

import argparse
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from coordinator import tls
from coordinator.bootstrap import Doors, ask
from coordinator.bus import Bus
from coordinator.cluster_token import ENV
from coordinator.errors import ConfigError, Unavailable
from coordinator.store import Store
from coordinator.subjects import model_token


@dataclass(frozen=True, slots=True)
class FarmAccess:
    """Connected to one farm, for one model."""

    bus: Bus
    store: Store
    model: str


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8088", help="a REST shim or a config server of the farm (default: %(default)s)")
    parser.add_argument("--tls_ca", default="", help="CA of its certificate, for https")
    parser.add_argument("--nats_url", default="", help="ask NATS and Redis directly, without a shim")
    parser.add_argument("--redis_url", default="")
    parser.add_argument("--model_name", default="", help="with --nats_url; else the shim's (default: default_model_name)")


@contextlib.asynccontextmanager
async def reach(flags: argparse.Namespace, *, needs_model: bool = True) -> AsyncIterator[FarmAccess]:
    """`needs_model` False: for what is about all models; `model` may then be any of them, or "_". Raises ConfigError, Unavailable."""
    if bool(flags.nats_url) != bool(flags.redis_url):
        raise ConfigError("--nats_url and --redis_url go together: give both or neither")
    if flags.tls_ca:
        os.environ[tls.ENV] = flags.tls_ca
    found = ({"nats_url": flags.nats_url, "redis_url": flags.redis_url, "model_name": flags.model_name or "default_model_name"}
             if flags.nats_url else _ask_door(flags, needs_model))
    store = Store(found["redis_url"])
    try:
        async with await Bus.connect(found["nats_url"], name="tokenmill-cli") as bus:
            yield FarmAccess(bus, store, model_token(flags.model_name or found.get("model_name", "")))
    finally:
        await store.close()


def doors_of(url: str, flags: argparse.Namespace) -> Doors:
    """A door by its URL. Raises ConfigError for what is not one."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {url}: must be http://HOST:PORT or https://HOST:PORT")
    ca = (flags.tls_ca or os.environ.get(tls.ENV, "")) if parts.scheme == "https" else ""
    if parts.scheme == "https" and not ca:
        raise ConfigError(f"--url {url}: give --tls_ca, the CA of its certificate")
    return Doors(addresses=(parts.netloc,), flags="--url", token=os.environ.get(ENV, ""), api_key=os.environ.get("TOKENMILL_API_KEY", ""),
                 tls_ca=ca)


def _ask_door(flags: argparse.Namespace, needs_model: bool = True) -> dict[str, str]:
    doors = doors_of(flags.url, flags)
    try:
        found: dict[str, str] = ask(doors, doors.addresses[0], "/bootstrap?role=operator")
    except Unavailable as error:
        raise Unavailable(f"no REST shim or config server at {flags.url} ({error}); give --url, or --nats_url and --redis_url") from None
    if needs_model and not (flags.model_name or found.get("model_name")):
        raise ConfigError(f"{flags.url} serves no model yet, or several: give --model_name")
    return found
