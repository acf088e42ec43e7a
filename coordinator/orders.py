"""Orders of an operator or the planner to one worker: leave, or work under another role. A request on `control.<worker>`, answered at once.

The answer says that the order was taken; that it was carried out shows in the registry (state, role, a new incarnation).
"""

from dataclasses import dataclass
from typing import Literal

from coordinator import subjects
from coordinator.bus import Bus, NobodyListens
from coordinator.errors import ConfigError, MalformedMessage, Unavailable
from coordinator.messages import check_id, decode_map, encode_map

ROLES = ("prefill", "decode", "both")
ANSWER_S = 3.0

Kind = Literal["drain", "set_role"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """drain: take nothing new, end what runs, leave. set_role: the same, then live on as `role` with the weights that are loaded."""

    kind: Kind
    role: str = ""

    def encode(self) -> bytes:
        return encode_map({"kind": self.kind, "role": self.role})

    @classmethod
    def decode(cls, data: bytes) -> "Order":
        """Raises MalformedMessage."""
        body = decode_map(data)
        kind, role = body.get("kind"), body.get("role", "")
        if set(body) - {"kind", "role"} or kind not in ("drain", "set_role"):
            raise MalformedMessage(f"not an order: {body!r:.100}")
        if (role not in ROLES) if kind == "set_role" else role:
            raise MalformedMessage(f"role must be one of {', '.join(ROLES)}, got {role!r:.40}")
        return cls(kind=kind, role=role)


async def give(bus: Bus, worker: str, order: Order) -> str:
    """What the worker said. Raises ConfigError when it refuses or is not there, Unavailable when it does not answer."""
    subject = subjects.control(check_id("worker", worker))
    try:
        answer = decode_map(await bus.request(subject, order.encode(), ANSWER_S))
    except NobodyListens:
        raise ConfigError(f"no worker {worker} listens: `tokenmill status` shows who is there") from None
    except MalformedMessage as error:
        raise Unavailable(f"worker {worker} answered something else: {error}") from None
    if "refused" in answer:
        raise ConfigError(f"worker {worker}: {answer['refused']}")
    return str(answer.get("taken", ""))
