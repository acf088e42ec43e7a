"""Settings of the REST shim, and the flags that map onto them. Nothing else reads flags."""

import argparse
import os
from dataclasses import dataclass, fields
from typing import Any, Literal

from coordinator.cluster_token import is_loopback
from coordinator.messages import CLASSES, JobClass
from coordinator.subjects import DEFAULT_MAX_QUEUED


@dataclass(frozen=True, slots=True, kw_only=True)
class RestSettings:
    """What one REST shim needs. Names are those of the flags."""

    nats_url: str
    redis_url: str
    model_dir: str
    model_name: str = "default_model_name"
    host: str = "127.0.0.1"
    port: int = 8000
    max_req_total_len: int = 16384             # tokens of one request, prompt and output
    max_body_bytes: int = 4 * 1024 * 1024
    api_keys_file: str = ""                    # made by `tokenmill keys`; empty: no keys are asked for
    cors_origins: str = ""                     # separated by commas, or *; empty: no browser of another origin may read answers
    insecure: bool = False                     # an address that is not loopback, without keys
    max_queued: int = DEFAULT_MAX_QUEUED       # jobs per class before clients get 429
    job_class: JobClass = "normal"
    submit_timeout_s: float = 5.0              # how long a request rides out a broker that is away, before 503
    max_queued_tokens: int = 8_000_000         # open tokens per class before clients get 429
    max_tenant_jobs: int = 0                   # open jobs of one tenant; 0: no bound
    max_tenant_tokens: int = 0                 # open tokens of one tenant; 0: no bound
    resume_grace_s: float = 15.0               # a job with a client's own id goes on so long after its client has gone
    shutdown_grace_s: float = 10.0             # after SIGTERM, for answers that are being sent
    prefix_affinity: str = "off"               # on: prompts go to workers that have their beginning cached, where that pays
    disagg_min_tokens: int = 0                 # shorter prompts are prefilled by decode workers; 0: none
    files_dir: str = ""                        # where files and batches are kept; "": there are none
    batch_window: int = 512                    # lines of batches that one shim has open at once
    queue_record: str = ""                     # file with the queue's passwords by role, for /bootstrap; "": all get the URLs above
    cluster_token: str = ""                    # opens /bootstrap
    planner: Literal["off", "advise", "act"] = "off"
    ttft_objective: float = 2.0                # seconds, p90: what the planner plans for
    tpot_objective: float = 0.1
    tls_cert: str = ""
    tls_key: str = ""
    access_log: bool = False
    log_level: str = "warning"


_HELP = {
    "nats_url": "where the queue is",
    "redis_url": "where Redis or Valkey is",
    "model_dir": "folder with config.json and the tokenizer; no weights are read",
    "model_name": "name of the model; names the queue too",
    "host": "address to bind",
    "port": "port to bind; 0 picks a free one",
    "max_req_total_len": "most tokens of one request, prompt and output",
    "max_body_bytes": "largest request body",
    "api_keys_file": "file of API keys (tokenmill keys); without it no key is asked for",
    "cors_origins": "origins whose pages may ask here, separated by commas, or *",
    "insecure": "allow a bind address that is not loopback without API keys",
    "max_queued": "jobs per class, waiting or running, before clients get 429",
    "max_queued_tokens": "open tokens (prompt and max_new_tokens, queued and running) per class before clients get 429; 0: no bound",
    "max_tenant_jobs": "open jobs of one tenant before it gets 429; 0: no bound",
    "max_tenant_tokens": "open tokens of one tenant before it gets 429; 0: no bound",
    "resume_grace_s": "seconds a job with a client's own id goes on after its client has gone",
    "job_class": "class of the jobs that come in here",
    "submit_timeout_s": "seconds that a request rides out a broker that is away, before 503",
    "shutdown_grace_s": "seconds that running answers get after SIGTERM",
    "prefix_affinity": "on: prompts go to workers that have their beginning in their prefix cache, where that saves more than it costs",
    "disagg_min_tokens": "prompts with fewer tokens to compute are prefilled by a decode worker; 0: none",
    "files_dir": "folder for uploaded files and batches, the same one for all shims; without it there are no batches",
    "batch_window": "lines of batches whose jobs this shim has open at once",
    "queue_record": "file that says where the queue is and has its passwords by role, for /bootstrap",
    "cluster_token": "secret that opens /bootstrap (better: TOKENMILL_CLUSTER_TOKEN)",
    "planner": "propose (advise) or order (act) that workers change their roles",
    "ttft_objective": "planner: seconds to the first token, p90",
    "tpot_objective": "planner: seconds per token after it, p90",
    "tls_cert": "certificate: this door then speaks https",
    "tls_key": "its key",
    "access_log": "one line per request",
    "log_level": "debug, info, warning or error",
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "planner": ("off", "advise", "act"), "prefix_affinity": ("on", "off"), "job_class": CLASSES,
    "log_level": ("debug", "info", "warning", "error")}
_FROM_ENVIRONMENT = {"nats_url": "TOKENMILL_NATS_URL", "redis_url": "TOKENMILL_REDIS_URL", "cluster_token": "TOKENMILL_CLUSTER_TOKEN"}
_REQUIRED = ("nats_url", "redis_url", "model_dir")


def parse(argv: list[str] | None) -> RestSettings:
    """Exits with status 2 on flags that cannot be parsed."""
    parser = argparse.ArgumentParser(prog="producers.rest", description="REST door of a tokenmill farm.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(RestSettings):
        options: dict[str, Any] = {"help": _HELP[f.name]}
        if f.name in _FROM_ENVIRONMENT and os.environ.get(_FROM_ENVIRONMENT[f.name]):
            options["default"] = os.environ[_FROM_ENVIRONMENT[f.name]]
        elif f.name in _REQUIRED:
            options["required"] = True
        elif isinstance(f.default, bool):
            options["action"] = "store_true"
        else:
            options |= {"default": f.default, "type": type(f.default), "choices": _CHOICES.get(f.name)}
        parser.add_argument(f"--{f.name}", *([f"--{f.name.replace('_', '-')}"] if "_" in f.name else []), **options)
    settings = RestSettings(**vars(parser.parse_args(argv)))
    if not (settings.api_keys_file or settings.insecure or is_loopback(settings.host)):
        parser.error(f"--host {settings.host}: not a loopback address: give --api_keys_file (tokenmill keys create), or say --insecure")
    return settings
