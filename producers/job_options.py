"""What a request says of its job beside the prompt and the sampling: HTTP headers, the same for every API."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from coordinator.errors import InvalidField
from coordinator.messages import CLASSES, JobClass, check_id

MAX_TENANT_CHARS = 128
LONGEST_TIMEOUT_S = 3600.0     # frames of a job are kept that long


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """
    job_id       `X-Job-Id` or `Idempotency-Key`: the client's own name for the job. The same name twice is one job, also over several
                 shims; its stream carries ids to go on from, and losing the connection does not cancel it at once
    next_index   from `Last-Event-ID`: the first token that the client has not seen
    klass        `X-Job-Class`
    timeout_s    `X-Timeout-S`: the job ends as `expired` when it is not over by then
    tenant       `X-Tenant`: whose limits and whose lane
    """

    job_id: str | None
    next_index: int
    klass: JobClass
    timeout_s: float | None
    tenant: str

    @property
    def is_resumable(self) -> bool:
        return self.job_id is not None


def read_options(headers: Mapping[str, str], default_class: JobClass) -> JobOptions:
    """Raises InvalidField naming the header."""
    job_id = headers.get("x-job-id", headers.get("idempotency-key"))
    klass = headers.get("x-job-class", default_class)
    if klass not in CLASSES:
        raise InvalidField("X-Job-Class", f"must be one of {', '.join(CLASSES)}, got {klass!r:.40}")
    tenant = headers.get("x-tenant", "")
    if len(tenant) > MAX_TENANT_CHARS or not tenant.isprintable():
        raise InvalidField("X-Tenant", f"must be at most {MAX_TENANT_CHARS} printable characters")
    return JobOptions(
        job_id=check_id("X-Job-Id", job_id) if job_id is not None else None, next_index=_next_index(headers.get("last-event-id")),
        klass=cast(JobClass, klass), timeout_s=_timeout(headers.get("x-timeout-s")), tenant=tenant)


def _next_index(last_event_id: str | None) -> int:
    if last_event_id is None or last_event_id == "":
        return 0
    if not last_event_id.isascii() or not last_event_id.isdigit() or len(last_event_id) > 9:
        raise InvalidField("Last-Event-ID", f"must be the index of a token, got {last_event_id!r:.40}")
    return int(last_event_id) + 1


def _timeout(given: str | None) -> float | None:
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0.0 < seconds <= LONGEST_TIMEOUT_S:
        raise InvalidField("X-Timeout-S", f"must be seconds above 0 and at most {LONGEST_TIMEOUT_S:g}, got {given!r:.40}")
    return seconds
