"""Ask a config server or a pd_master where the queue is: waits for one that answers, tells once what it waits for."""

import json
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coordinator.errors import ConfigError, Unavailable
from coordinator.queue_record import QueueUrls

RETRY_S = 0.5
TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """Where to ask, in turn, and what to show there. `flags` names what gave the addresses, for messages."""

    addresses: tuple[str, ...]          # host:port
    flags: str
    token: str = ""                     # the cluster token, else
    api_key: str = ""                   # a trusted API key
    tls_ca: str = ""                    # a file of CAs: doors are then asked by https

    def url(self, address: str, path: str) -> str:
        return f"{'https' if self.tls_ca else 'http'}://{address}{path}"


def wait_for_queue(doors: Doors, role: str) -> QueueUrls:
    """The URLs for one role. Waits until a door answers; raises ConfigError when one refuses."""
    body = _wait(doors, f"/bootstrap?role={role}")
    return QueueUrls(nats_url=body["nats_url"], redis_url=body["redis_url"])


def wait_for_record(doors: Doors) -> dict[str, Any]:
    """All that another config server knows of the queue."""
    record: dict[str, Any] = _wait(doors, "/bootstrap?role=config_server")["record"]
    return record


def ask(doors: Doors, address: str, path: str) -> dict[str, Any]:
    """One answer. Raises ConfigError when the door refuses, Unavailable when it cannot be asked or is something else."""
    url = doors.url(address, path)
    secret = doors.token or doors.api_key
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {secret}"} if secret else {})
    context = ssl.create_default_context(cafile=doors.tls_ca) if doors.tls_ca else None
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as reply:
            body: dict[str, Any] = json.load(reply)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise ConfigError(f"{url} wants this farm's cluster token (--cluster_token_file or TOKENMILL_CLUSTER_TOKEN); a pd_master that "
                              "has API keys also takes a trusted one (TOKENMILL_API_KEY; tokenmill keys create --trusted)") from None
        raise Unavailable(f"{url} answered {error.code}") from None
    except (OSError, ValueError) as error:
        raise Unavailable(f"{url}: {getattr(error, 'reason', error)}") from None
    if not isinstance(body, dict) or not ("nats_url" in body or "record" in body):
        raise Unavailable(f"{url} is not a door of a tokenmill farm")
    return body


def _wait(doors: Doors, path: str) -> dict[str, Any]:
    told = False
    while True:
        body, why = _first_answer([lambda address=a: ask(doors, address, path) for a in doors.addresses])  # type: ignore[misc]
        if body is not None:
            return body
        if not told:
            print(f"waiting for {doors.flags}: {'; '.join(why)}", file=sys.stderr, flush=True)
            told = True
        time.sleep(RETRY_S)


def _first_answer(questions: list[Callable[[], dict[str, Any]]]) -> tuple[dict[str, Any] | None, list[str]]:
    """The first answer, or why there was none. A door that refuses is final only if no other one answers."""
    why: list[str] = []
    refusal: ConfigError | None = None
    for question in questions:
        try:
            return question(), why
        except Unavailable as error:
            why.append(str(error))
        except ConfigError as error:
            refusal = error
    if refusal is not None:
        raise refusal
    return None, why


def addresses(hosts: str, ports: tuple[int, ...]) -> tuple[str, ...]:
    """`a,b:7000` with ports (60088,) as host:port each."""
    found = []
    for host in (part.strip() for part in hosts.split(",") if part.strip()):
        name, colon, port = host.rpartition(":")
        if colon and port.isdigit() and (":" not in name or name.endswith("]")):
            found.append(host)
        else:
            found += [f"[{host}]:{p}" if ":" in host else f"{host}:{p}" for p in ports]
    return tuple(found)
