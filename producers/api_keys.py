"""API keys at rest: one JSON file with the SHA-256 of each key, whose it is and what it may do. The key is shown once, when it is made.

    {"keys": [{"key_id": "3f2a9c01", "sha256": "…", "name": "ci", "tenant": "ci", "klass": "normal", "max_jobs": 8, …}]}

A key is `tm-<key id>-<256 random bits>`: too much to guess, so a plain hash is enough. The file may be changed while shims run.
"""

import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from coordinator.errors import ConfigError
from coordinator.messages import JobClass
from coordinator.store import AdmissionLimits

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0     # how soon a revoked key is refused by a running shim
_KEY = re.compile(r"tm-([0-9a-f]{8})-[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """
    tenant              whose lane and limits its jobs have
    klass               class of its jobs; it may ask for a lower one, not for a higher one
    max_jobs            open jobs of its tenant, over all shims; 0: no bound. So is max_open_tokens
    tokens_per_minute   prompt and max_new_tokens of what its tenant submits in one minute; 0: no bound
    is_trusted          may speak for other tenants (X-Tenant), see their jobs, and ask /bootstrap for the queue's address
    """

    key_id: str
    sha256: str
    name: str
    tenant: str
    klass: JobClass = "normal"
    max_jobs: int = 0
    max_open_tokens: int = 0
    tokens_per_minute: int = 0
    is_trusted: bool = False
    created: str = ""


_KEYS = TypeAdapter(list[ApiKey])


def read_keys(path: Path) -> list[ApiKey]:
    """Raises ConfigError naming the file."""
    try:
        content = orjson.loads(path.read_bytes())
        return _KEYS.validate_python(content["keys"])
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; `tokenmill keys create --api_keys_file {path} --name NAME` makes one") from None
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise ConfigError(f"{path}: not a file of API keys: {' '.join(str(error).split())[:300]}") from None


def create_key(path: Path, name: str, *, tenant: str = "", **rights: Any) -> tuple[str, ApiKey]:
    """(the key, shown only now; what was written of it). Raises ConfigError."""
    key_id = secrets.token_hex(4)
    secret = f"tm-{key_id}-{secrets.token_urlsafe(32)}"
    key = ApiKey(key_id=key_id, sha256=_digest(secret), name=name, tenant=tenant or f"key-{key_id}",
                 created=datetime.now(UTC).isoformat(timespec="seconds"), **rights)
    with _locked(path):
        _write(path, [*(read_keys(path) if path.exists() else []), key])
    return secret, key


def revoke_key(path: Path, key_id: str) -> bool:
    """Forget a key; False if there is none of this id. Running shims refuse it within LOOK_AGAIN_S. Raises ConfigError."""
    with _locked(path):
        keys = read_keys(path)
        kept = [key for key in keys if key.key_id != key_id]
        _write(path, kept)
    return len(kept) != len(keys)


class KeyRing:
    """The keys of one file, read again when it changes. A file that cannot be read any more leaves the last keys in force."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError."""
        self._path = path
        self._stamp = self._stamp_now()
        self._next_look_s = 0.0
        self._take(read_keys(path))

    def find(self, presented: str) -> ApiKey | None:
        """Whose key this is."""
        self._look()
        match = _KEY.fullmatch(presented)
        key = self._by_id.get(match[1]) if match else None
        return key if key is not None and hmac.compare_digest(key.sha256, _digest(presented)) else None

    def limits_of(self, tenant: str, farm: AdmissionLimits) -> AdmissionLimits:
        """The farm's limits with those of the tenant's keys in place; of several keys the most generous."""
        keys = self._by_tenant.get(tenant)
        if not keys:
            return farm
        return replace(farm, max_tenant_jobs=_widest([key.max_jobs for key in keys]) or farm.max_tenant_jobs,
                       max_tenant_tokens=_widest([key.max_open_tokens for key in keys]) or farm.max_tenant_tokens,
                       max_tenant_tokens_per_minute=_widest([key.tokens_per_minute for key in keys]))

    def _look(self) -> None:
        now = time.monotonic()
        if now < self._next_look_s:
            return
        self._next_look_s = now + LOOK_AGAIN_S
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        try:
            self._take(read_keys(self._path))
            self._stamp = stamp
        except ConfigError as error:
            log.error("the API keys stay as they were: %s", error)

    def _take(self, keys: list[ApiKey]) -> None:
        self._by_id = {key.key_id: key for key in keys}
        self._by_tenant: dict[str, list[ApiKey]] = {}
        for key in keys:
            self._by_tenant.setdefault(key.tenant, []).append(key)

    def _stamp_now(self) -> tuple[int, int, int]:
        with contextlib.suppress(OSError):
            stat = self._path.stat()
            return stat.st_mtime_ns, stat.st_ino, stat.st_size
        return (0, 0, 0)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _widest(bounds: list[int]) -> int:
    return 0 if 0 in bounds else max(bounds)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two commands at once do not lose each other's change."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _write(path: Path, keys: list[ApiKey]) -> None:
    """Whole or not at all, and for the owner's eyes only."""
    body = orjson.dumps({"keys": [asdict(key) for key in keys]}, option=orjson.OPT_INDENT_2)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as draft:  # mode 0600
        draft.write(body + b"\n")
        draft.flush()
        os.fsync(draft.fileno())
    os.replace(draft.name, path)
