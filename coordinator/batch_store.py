"""What Redis knows of batches: their status and counts, and which shim leads each. Says nothing of lines or answers: those are blobs.

    {tokenmill}:batch:<id>    hash   id, status, epoch, leader, leader_until, created_ms, expires_ms, <status>_at, counters, what was asked
    {tokenmill}:batches       zset   batch id by time of creation
    {tokenmill}:batches_open  set    ids of the batches that are not over
"""

from collections.abc import Mapping

from coordinator.store import Store

LEADER_S = 5.0
RECORD_TTL_S = 30 * 24 * 3600
BATCHES, OPEN = "batches", "batches_open"
LAST_STATUSES = frozenset({"completed", "failed", "expired", "cancelled"})


class BatchStore:
    """Every method raises Unavailable when Redis does not answer. A record is a map of strings."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def create(self, batch_id: str, asked: Mapping[str, str], window_s: float, created_ms: int = 0) -> bool:
        """False: there is one of this id."""
        flat = [part for pair in asked.items() for part in pair]
        return bool(await self._store.script("batch_create", [_batch(batch_id), BATCHES, OPEN], batch_id, created_ms,
                                             int(window_s * 1000), RECORD_TTL_S, *flat))

    async def lead(self, batch_id: str, name: str, leader_s: float = LEADER_S) -> int:
        """Become the leader of a batch that nobody leads: the epoch of this leadership, 0 while somebody else has it."""
        return int(await self._store.script("batch_lead", [_batch(batch_id)], name, int(leader_s * 1000)))

    async def leave(self, batch_id: str, epoch: int) -> None:
        await self._store.script("batch_leave", [_batch(batch_id)], epoch)

    async def beat(self, batch_id: str, epoch: int, counters: Mapping[str, int], leader_s: float = LEADER_S) -> str:
        """Go on leading, and say how far it is: the batch's status; "" when somebody else leads now."""
        flat = [part for pair in counters.items() for part in pair]
        return _text(await self._store.script("batch_beat", [_batch(batch_id)], epoch, int(leader_s * 1000), *flat))

    async def move(self, batch_id: str, came_from: tuple[str, ...], to: str, *, epoch: int | None = None,
                   **fields: str | int) -> str:
        """To status `to`, if it has one of `came_from`: the status that stands then; "" when it is gone or somebody else leads now."""
        flat = [part for pair in fields.items() for part in pair]
        return _text(await self._store.script(
            "batch_move", [_batch(batch_id), OPEN], batch_id, "" if epoch is None else epoch, " ".join(came_from), to,
            int(to in LAST_STATUSES), *flat))

    async def get(self, batch_id: str) -> dict[str, str]:
        """{} when there is none."""
        return await self._store.hash(_batch(batch_id))

    async def page(self, after: str, limit: int) -> list[str]:
        """Ids, newest first, those older than `after` (all: "")."""
        return [_text(batch_id) for batch_id in await self._store.script("batch_list", [BATCHES, OPEN], after, limit)]

    async def open_ids(self) -> list[str]:
        return sorted(_text(batch_id) for batch_id in await self._store.script("batch_open", [OPEN]))


def _batch(batch_id: str) -> str:
    return f"batch:{batch_id}"


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
