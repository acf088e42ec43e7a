"""Names and settings of every stream, subject and consumer (DESIGN: streams). One place, used by servers, docs and tests alike."""

import zlib

JOBS, HANDOFF, OUT, RESULTS, DLQ, ROSTER = "JOBS", "HANDOFF", "OUT", "RESULTS", "DLQ", "ROSTER"
ANY_LANE = "any"
BACKGROUND_LANE = "background"   # handles of the last class: taken when no other waits
LOCAL_LANE = "local"             # short prompts, prefilled by whichever decode worker has room
HOST_LANE = "h-"                 # so begins a lane of HANDOFF for one host
WORKER_LANE = "w-"               # a lane of one worker's own begins so
NUM_TENANT_LANES = 8             # jobs of a tenant queue in one of these, and workers take from them in turn
ACK_WAIT_S = 5.0                 # as long as a lease: so is a message back whose receiver died before it claimed
MAX_ACK_PENDING = 1_000_000      # nats-server's default of 1,000 stalls silently
MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
OUT_MAX_AGE_S = 3600.0
RESULTS_MAX_AGE_S = 24 * 3600.0
DLQ_MAX_AGE_S = 7 * 24 * 3600.0
ROSTER_MAX_AGE_S = 24 * 3600.0
DEFAULT_MAX_QUEUED = 10_000      # jobs per class, waiting or running, before the producer gets 429


def model_token(model: str) -> str:
    """A model's name as one subject token: what is not a letter, digit, '-' or '_' becomes '_'."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in model) or "_"


def tenant_lane(tenant: str) -> str:
    """Where a tenant's jobs queue: beside, not behind, those of others. Jobs without a tenant go to `any`."""
    return f"t{zlib.crc32(tenant.encode()) % NUM_TENANT_LANES}" if tenant else ANY_LANE


def job_lanes() -> list[str]:
    """All lanes that any worker serves."""
    return [ANY_LANE, *(f"t{i}" for i in range(NUM_TENANT_LANES))]


def host_lane(host: str) -> str:
    """Handles for decode workers of one host."""
    return f"{HOST_LANE}{model_token(host)}"


def worker_lane(worker: str) -> str:
    """Jobs for which this worker has something in its prefix cache."""
    return f"{WORKER_LANE}{worker}"


def relief(model: str) -> str:
    """Calls for help: a lane whose worker does not get to its jobs. One worker of the queue group `relief` gets each call."""
    return f"relief.{model}"


def jobs(model: str, klass: str, lane: str = ANY_LANE) -> str:
    return f"jobs.{model}.{klass}.{lane}"


def jobs_parts(subject: str) -> tuple[str, str, str]:
    """(model, class, lane) of a job's subject; empty strings for any other."""
    prefix, *parts = subject.split(".")
    return (parts[0], parts[1], parts[2]) if prefix == "jobs" and len(parts) == 3 else ("", "", "")


def jobs_consumer(model: str, klass: str, lane: str = ANY_LANE) -> str:
    return f"jobs-{model}-{klass}-{lane}"


def handoff_lanes() -> list[str]:
    """All lanes of handles that any decode worker serves, best first."""
    return [ANY_LANE, BACKGROUND_LANE]


def handoff(model: str, lane: str = ANY_LANE) -> str:
    return f"handoff.{model}.{lane}"


def handoff_consumer(model: str, lane: str = ANY_LANE) -> str:
    return f"handoff-{model}-{lane}"


def chain(origin: str, worker: str, incarnation: int) -> str:
    """The subject that only this incarnation appends to, for this producer's jobs."""
    return f"out.{origin}.{worker}.{incarnation}"


def chains(origin: str) -> str:
    """Every chain that carries answers of this producer."""
    return f"out.{origin}.>"


def chain_parts(subject: str) -> tuple[str, str, int]:
    """(origin, worker, incarnation) of a chain's subject. Raises ValueError on any other subject."""
    prefix, origin, worker, incarnation = subject.split(".")
    if prefix != "out":
        raise ValueError(f"not a chain: {subject}")
    return origin, worker, int(incarnation)


def live(origin: str) -> str:
    """What a producer subscribes to: the server republishes every stored frame there."""
    return f"live.{origin}.>"


def result(job_id: str) -> str:
    return f"results.{job_id}"


def dead_letter(model: str) -> str:
    return f"dlq.{model}"


def roster(worker: str, incarnation: int) -> str:
    return f"roster.{worker}.{incarnation}"


def cancel(job_id: str) -> str:
    return f"cancel.{job_id}"


def ask(model: str) -> str:
    """Requests for one whole answer; the shims take them in turn."""
    return f"ask.{model}"


def kv(worker: str, incarnation: int) -> str:
    return f"kv.{worker}.{incarnation}"


def control(worker: str) -> str:
    """Orders to one worker, whatever its incarnation."""
    return f"control.{worker}"
