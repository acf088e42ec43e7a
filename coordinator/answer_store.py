"""What Redis keeps of answers that can be asked for by id: how they are to be shown. The answers themselves are final records.

    {tokenmill}:answer:<id>   string   set once, forgotten with the final records (a day)
"""

from coordinator.store import Store

ANSWER_TTL_S = 24 * 3600


class AnswerStore:
    """Every method raises Unavailable when Redis does not answer."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def keep(self, request_id: str, shape: bytes) -> None:
        """The first one stands: a request that is repeated has one shape."""
        await self._store.script("answer_keep", [_answer(request_id)], shape, ANSWER_TTL_S)

    async def get(self, request_id: str) -> bytes | None:
        kept = await self._store.script("answer_get", [_answer(request_id)])
        return None if not kept else bytes(kept)

    async def forget(self, request_id: str) -> bool:
        return bool(await self._store.script("answer_forget", [_answer(request_id)]))


def _answer(request_id: str) -> str:
    return f"answer:{request_id}"
