"""Who may do what at the farm's own NATS and Valkey, once a cluster token is set: one user per role, with a password of its own.

    master      REST shims and config servers: submit and cancel jobs, read answers, lead watcher and planner
    worker      prefill, decode and both: pull jobs, extend chains, hand over, write final records
    client      programs that speak NATS themselves (docs/wire.md): submit, cancel, ask, read answers; no Redis
    operator    the commands of an operator: all of it, streams and records included

A worker cannot empty a stream (but for HANDOFF, of handles that are void), a master cannot write tokens into an answer, and neither reads
what the other was told (inboxes carry the user's name). Who owns which job is guarded by the protocol, not by these walls.
"""

import secrets
from typing import Any

from coordinator import subjects

ROLES = ("master", "worker", "client", "operator")
ROLE_OF_MODE = {"normal": "operator", "pd_master": "master", "config_server": "master", "prefill": "worker", "decode": "worker"}
REPLY_EXPIRES = "3700s"        # a question may wait as long as a job may take
_SHARED = ["cancel.>", "control.>", "jobs.>", "relief.>", "$JS.ACK.>", "$JS.API.>"]    # a worker's jobs.>: what goes to another lane
_PUBLISH = {
    "master": [*_SHARED, "ask.>"],
    "worker": [*_SHARED, "out.>", "results.>", "handoff.>", "dlq.>", "roster.>", "kv.>"],
    "client": ["jobs.>", "cancel.*", "ask.*", "$JS.API.DIRECT.GET.RESULTS", "$JS.API.DIRECT.GET.RESULTS.>", "$JS.API.DIRECT.GET.OUT",
               "$JS.API.DIRECT.GET.OUT.>"],
}
_SUBSCRIBE = {"master": ["live.>", "results.>", "ask.>", "control.>"], "worker": ["cancel.>", "kv.>", "control.>", "relief.>"],
              "client": ["live.>", "results.*"]}
# A void handle may be deleted by whoever made it, and by the watcher: a job does not hang on its handle.
_KEPT_STREAMS = (subjects.JOBS, subjects.OUT, subjects.RESULTS, subjects.DLQ, subjects.ROSTER)
_DENIED = ["$JS.API.STREAM.DELETE.>", "$JS.API.STREAM.RESTORE.>",
           *(f"$JS.API.STREAM.{action}.{stream}" for action in ("PURGE", "MSG.DELETE") for stream in _KEPT_STREAMS)]


def new_passwords() -> dict[str, str]:
    return {role: secrets.token_urlsafe(24) for role in ROLES}


def inbox_of(user: str) -> str:
    """The prefix of a user's inboxes. Clients have NATS' own, so that any library works as it is; so has everybody without a user."""
    return f"_INBOX_{user}" if user in ("master", "worker", "operator") else "_INBOX"


def nats_authorization(passwords: dict[str, str]) -> dict[str, Any]:
    """The `authorization` block of nats.conf."""
    return {"users": [{"user": role, "password": passwords[role], **_nats_permissions(role)} for role in ROLES]}


def _nats_permissions(role: str) -> dict[str, Any]:
    if role == "operator":
        return {}
    inbox = f"{inbox_of(role)}.>"
    return {"permissions": {
        "publish": {"allow": [*_PUBLISH[role], inbox], "deny": _DENIED},
        "subscribe": {"allow": [*_SUBSCRIBE[role], inbox]},
        "allow_responses": {"max": 16, "expires": REPLY_EXPIRES}}}


def valkey_lines(passwords: dict[str, str]) -> list[str]:
    """Lines of valkey.conf: nobody without a password, and of the dangerous commands only INFO, which every script asks for the run id."""
    rules = "~{tokenmill}:* &* +@all -@admin -@dangerous +info"
    return ["user default off", f"user operator on >{passwords['operator']} ~* &* +@all",
            *(f"user {role} on >{passwords[role]} {rules}" for role in ("master", "worker"))]
