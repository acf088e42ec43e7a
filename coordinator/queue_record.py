"""Where a farm's own queue is, and its passwords: `queue.json` in the state directory, readable by its owner only.

Written by the keeper (queue_keeper.py) once the servers answer; read by whoever starts beside it, and handed out by /bootstrap, per role.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from coordinator import queue_users
from coordinator.cluster_token import is_loopback
from coordinator.errors import ConfigError

FILE = "queue.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueUrls:
    """What one process needs to join."""

    nats_url: str
    redis_url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRecord:
    """`pid` is the keeper's. `host` is the address that both servers are bound to; ports stay the same over restarts.

    With `given` the queue is somebody else's, and its URLs are handed out as they are. `is_here`: on the machine that hands this out.
    """

    host: str = "127.0.0.1"
    nats_port: int = 0
    redis_port: int = 0
    pid: int = 0
    passwords: dict[str, str] = field(default_factory=dict)   # by role; empty: no users, everybody may do everything
    nats_scheme: str = "nats"
    given: dict[str, str] = field(default_factory=dict)       # nats_url, redis_url
    is_here: bool = True

    def urls(self, role: str, seen_as: str = "") -> QueueUrls:
        """URLs for one role. `seen_as`: how the asker names this machine, used where the queue listens on more than loopback."""
        if self.given:
            return QueueUrls(**self.given)
        host = seen_as if seen_as and self.is_here and not is_loopback(self.host) else self.host
        if host in ("0.0.0.0", "::", ""):
            host = "127.0.0.1"
        host = f"[{host}]" if ":" in host else host
        user = f"{role}:{quote(self.passwords[role], safe='')}@" if self.passwords else ""
        return QueueUrls(nats_url=f"{self.nats_scheme}://{user}{host}:{self.nats_port}",
                         redis_url="" if role == "client" else f"redis://{user}{host}:{self.redis_port}")

    def write(self, path: Path) -> None:
        """All or nothing, and never readable by others."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(asdict(self), file)
        draft.replace(path)

    @classmethod
    def from_map(cls, body: Any) -> "QueueRecord":
        """Raises ConfigError for what is not a record."""
        try:
            return cls(**body)
        except TypeError as error:
            raise ConfigError(f"not a record of a queue: {error}") from None


def read_record(path: Path) -> QueueRecord | None:
    """None when there is none. Raises ConfigError for one that cannot be read."""
    try:
        return QueueRecord.from_map(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): remove it, and the queue gets new ports and passwords") from None


def passwords_for(record: QueueRecord | None, has_token: bool) -> dict[str, str]:
    """Those of the last run, so that who joined then joins again; new ones with the first token; none without a token."""
    if not has_token:
        return {}
    known = record.passwords if record is not None else {}
    return known if set(known) == set(queue_users.ROLES) else queue_users.new_passwords()
