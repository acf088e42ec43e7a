"""A batch as OpenAI's Batch API knows it: its statuses and how one may follow another, its counts, its object. No I/O.

    validating ──► in_progress ──► finalizing ──► completed
        │ │            │ │             └────────► expired      past its window: what is answered is kept
        │ └──► failed ◄┘ │
        └──► cancelling ◄┘ ──► cancelled
"""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.batch_store import LAST_STATUSES

WINDOW_S = 24 * 3600.0
STATUSES = ("validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
COMES_FROM: dict[str, tuple[str, ...]] = {
    "in_progress": ("validating",), "finalizing": ("in_progress",), "completed": ("finalizing",), "expired": ("finalizing",),
    "failed": ("validating", "in_progress"), "cancelling": ("validating", "in_progress"), "cancelled": ("cancelling",)}
COUNTERS = ("completed", "failed", "input_tokens", "output_tokens")
_STAMPS = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at")


def new_batch_id(idempotency_key: str = "") -> str:
    """The same key names the same batch."""
    return "batch_" + (hashlib.sha256(idempotency_key.encode()).hexdigest()[:32] if idempotency_key else uuid.uuid4().hex)


def asked_name(batch_id: str) -> str:
    """The blob of what was asked: with it a batch can be begun again."""
    return f"{batch_id}.asked"


def done_name(batch_id: str) -> str:
    """The blob of how it ended: with it, it never is."""
    return f"{batch_id}.done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a client asked for; frozen with the batch."""

    endpoint: str
    input_file_id: str
    tenant: str
    metadata: dict[str, str]

    def to_record(self) -> dict[str, str]:
        return {"endpoint": self.endpoint, "input_file_id": self.input_file_id, "tenant": self.tenant,
                "metadata": json.dumps(self.metadata)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch at one moment."""

    id: str
    status: str
    asked: Asked
    created_ms: int
    expires_ms: int
    stamps: dict[str, int]
    total: int
    counters: dict[str, int]
    output_file_id: str
    error_file_id: str
    errors: list[dict[str, Any]]
    is_adopted: bool        # Redis had lost it

    @property
    def is_over(self) -> bool:
        return self.status in LAST_STATUSES

    @classmethod
    def from_record(cls, record: Mapping[str, str]) -> "Batch":
        return cls(
            id=record["id"], status=record["status"], created_ms=int(record["created_ms"]), expires_ms=int(record["expires_ms"]),
            asked=Asked(endpoint=record["endpoint"], input_file_id=record["input_file_id"], tenant=record["tenant"],
                        metadata=json.loads(record["metadata"])),
            stamps={name: int(record[name]) for name in _STAMPS if name in record}, total=int(record.get("total", 0)),
            counters={name: int(record.get(name, 0)) for name in COUNTERS}, output_file_id=record.get("output_file_id", ""),
            error_file_id=record.get("error_file_id", ""), errors=json.loads(record.get("errors", "[]")),
            is_adopted=record.get("is_adopted") == "1")

    def to_object(self) -> dict[str, Any]:
        """OpenAI's Batch object. `usage` grows while the batch runs."""
        counters = self.counters
        return {
            "id": self.id, "object": "batch", "endpoint": self.asked.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.asked.input_file_id, "completion_window": "24h", "status": self.status,
            "output_file_id": self.output_file_id or None, "error_file_id": self.error_file_id or None,
            "created_at": self.created_ms // 1000, "expires_at": self.expires_ms // 1000,
            **{name: self.stamps.get(name) for name in _STAMPS},
            "request_counts": {"total": self.total, "completed": counters["completed"], "failed": counters["failed"]},
            "usage": {"input_tokens": counters["input_tokens"], "output_tokens": counters["output_tokens"],
                      "total_tokens": counters["input_tokens"] + counters["output_tokens"],
                      "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}},
            "metadata": self.asked.metadata or None,
        }
