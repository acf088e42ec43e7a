"""How the commands of an operator find a farm: by one of its REST shims, or by the URLs of NATS and Redis."""

import argparse
import contextlib
import json
import os
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass

from coordinator.bus import Bus
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
    parser.add_argument("--url", default="http://127.0.0.1:8088", help="a REST shim of the farm (default: %(default)s)")
    parser.add_argument("--nats_url", default="", help="ask NATS and Redis directly, without a shim")
    parser.add_argument("--redis_url", default="")
    parser.add_argument("--model_name", default="", help="with --nats_url; else the shim's (default: default_model_name)")


@contextlib.asynccontextmanager
async def reach(flags: argparse.Namespace) -> AsyncIterator[FarmAccess]:
    """Raises ConfigError, Unavailable."""
    if bool(flags.nats_url) != bool(flags.redis_url):
        raise ConfigError("--nats_url and --redis_url go together: give both or neither")
    found = ({"nats_url": flags.nats_url, "redis_url": flags.redis_url, "model_name": flags.model_name or "default_model_name"}
             if flags.nats_url else _ask_shim(flags.url))
    store = Store(found["redis_url"])
    try:
        async with await Bus.connect(found["nats_url"], name="tokenmill-cli") as bus:
            yield FarmAccess(bus, store, model_token(flags.model_name or found["model_name"]))
    finally:
        await store.close()


def with_key(url: str) -> urllib.request.Request:
    """A request that shows the operator's API key, if the environment has one."""
    key = os.environ.get("TOKENMILL_API_KEY", "")
    return urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})


def _ask_shim(url: str) -> dict[str, str]:
    try:
        with urllib.request.urlopen(with_key(f"{url}/bootstrap"), timeout=3.0) as reply:
            body: dict[str, str] = json.load(reply)
            return body
    except (OSError, ValueError) as error:
        raise Unavailable(f"no REST shim at {url} ({error}); give --url, or --nats_url and --redis_url") from None
