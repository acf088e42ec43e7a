"""Every error that a user of tokenmill can meet.

    TokenmillError
    ├── InvalidField          a job or a request says something that cannot be honoured (field, reason)
    ├── MalformedMessage      bytes from a wire that are not one of our messages
    ├── UnknownJob            no job of this id is queued, running or remembered
    ├── QueueFull             the job's class is at its bound; retry later (retry_after_s)
    ├── PayloadTooLarge       a message or a body over its limit (size, limit)
    ├── ReadElsewhere         a newer reader follows this job: the older one ends (job_id)
    ├── Unavailable           NATS or Redis cannot be reached in time
    ├── Fenced                another worker took over: this incarnation must stop (subject)
    ├── LayoutMismatch        a KV handle was made by a worker with another model or cache layout
    ├── Unreachable           a KV handle's pages: no way of transfer leads from here to the worker that holds them (worker, reason)
    ├── JobFailed             a job ended otherwise than with its whole answer (job_id, reason, error)
    ├── PagesExhausted        a sequence can never fit the KV pool (needed, free)
    └── ConfigError           a flag, a file or the environment is wrong: nothing was started
        └── FarmMismatch      this worker's model or cache layout is not the farm's (worker, differences)
"""


class TokenmillError(Exception):
    """Root of all errors raised on purpose."""


class InvalidField(TokenmillError):
    """A field of a job cannot be honoured. `field` is the name that the user wrote."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class MalformedMessage(TokenmillError):
    """Bytes that do not decode to the message they should be."""


class UnknownJob(TokenmillError):
    """Nothing is known of a job: it never was, or its record has aged out."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id} is not known")
        self.job_id = job_id


class QueueFull(TokenmillError):
    """The queue of the job's class is full: nothing was accepted."""

    def __init__(self, subject: str, retry_after_s: float = 1.0) -> None:
        super().__init__(f"the queue {subject} is full; retry after {retry_after_s:g} s")
        self.subject = subject
        self.retry_after_s = retry_after_s


class PayloadTooLarge(TokenmillError):
    """A message or a request body is larger than its limit."""

    def __init__(self, size: int, limit: int, what: str = "message", setting: str = "max_payload of NATS") -> None:
        super().__init__(f"{what} of {size} bytes is over the limit of {limit} bytes ({setting})")
        self.size = size
        self.limit = limit


class Unavailable(TokenmillError):
    """NATS or Redis did not answer in time; the state of the request is unknown or unchanged."""


class ReadElsewhere(TokenmillError):
    """Somebody else began to read a job that was being read: the newest reader gets it."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id} is read by another request now: ask again")
        self.job_id = job_id


class Fenced(TokenmillError):
    """A tombstone stands on this incarnation's chain: another worker owns its jobs now."""

    def __init__(self, subject: str) -> None:
        super().__init__(f"{subject} was fenced: this incarnation lost its jobs")
        self.subject = subject


class LayoutMismatch(TokenmillError):
    """A KV handle's layout differs from ours: using it would give wrong answers."""

    def __init__(self, field: str, ours: object, theirs: object) -> None:
        super().__init__(f"KV layout differs in {field}: ours {ours!r}, theirs {theirs!r}")
        self.field = field
        self.ours = ours
        self.theirs = theirs


class Unreachable(TokenmillError):
    """No way of transfer leads to the pages of a KV handle: another worker may have one."""

    def __init__(self, worker: str, reason: str) -> None:
        super().__init__(f"KV pages of {worker} cannot be fetched: {reason}")
        self.worker = worker
        self.reason = reason


class JobFailed(TokenmillError):
    """The job is over without its whole answer: cancelled, expired or failed."""

    def __init__(self, job_id: str, reason: str, error: str = "") -> None:
        super().__init__(f"job {job_id} ended as {reason}" + (f": {error}" if error else ""))
        self.job_id = job_id
        self.reason = reason
        self.error = error


class PagesExhausted(TokenmillError):
    """A sequence needs more KV pages than the whole pool has."""

    def __init__(self, needed: int, total: int) -> None:
        super().__init__(f"needs {needed} KV pages, the pool has {total}: lower max_new_tokens or raise --max_total_token_num")
        self.needed = needed
        self.total = total


class ConfigError(TokenmillError):
    """Wrong configuration; the message names the key and the value."""


class FarmMismatch(ConfigError):
    """A worker that would join others of its model with other weights, dtype or pages. `differences`: field -> (its value, theirs)."""

    def __init__(self, worker: str, model: str, other: str, differences: dict[str, tuple[object, object]]) -> None:
        said = "; ".join(f"{name} here {mine!r}, there {theirs!r}" for name, (mine, theirs) in differences.items())
        super().__init__(f"{worker} cannot join the farm as a worker of {model!r}: it differs from {other} in {said}. Give both the same "
                         "--model_dir, --data_type and --page_size, or this one a --model_name of its own")
        self.worker = worker
        self.differences = differences
