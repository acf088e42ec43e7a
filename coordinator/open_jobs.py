"""Open jobs, as Redis knows them: admitted by a shim and not over, or owned by a worker (jobs that were published straight to NATS too).

A job that went straight to NATS and that no worker has yet is known to the queue only.
"""

from dataclasses import dataclass
from typing import Any

from coordinator.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenJob:
    """`age_s` since it was admitted; with `klass` "" it was published past the shims, and neither is known."""

    job_id: str
    state: str                # queued, or running (a worker owns it)
    owner: str
    epoch: int
    klass: str
    tenant: str
    tokens: int               # prompt and max_new_tokens
    age_s: float
    is_cancelled: bool


async def open_jobs(store: Store) -> list[OpenJob]:
    """Oldest first. Raises Unavailable."""
    rows = await store.script("open_jobs", ["open", "workers"])
    return sorted((_job([_text(part) for part in row]) for row in rows), key=lambda job: (-job.age_s, job.job_id))


def _job(row: list[str]) -> OpenJob:
    job_id, entry, state, owner, epoch, _, cancelled, now_ms = row
    klass, tokens, admitted_ms, tenant = entry.split(" ", 3) if entry else ("", "0", now_ms, "-")
    return OpenJob(job_id=job_id, state="running" if state == "owned" else "queued", owner=owner, epoch=int(epoch), klass=klass,
                   tenant="" if tenant == "-" else tenant, tokens=int(tokens), age_s=(int(now_ms) - int(admitted_ms)) / 1000,
                   is_cancelled=cancelled == "1")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
