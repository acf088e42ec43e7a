"""The answers of a batch as they come: in the order of the input, or as completed; from its parts while it runs, then from its files."""

from collections.abc import AsyncIterator
from typing import Any

import orjson

from producers.batch_client import BatchClient
from producers.batch_lines import index_of


class Results:
    """Asked again and again while the batch runs; each answer is given once. `seen` are those that are not wanted again."""

    def __init__(self, client: BatchClient, batch_id: str, *, is_ordered: bool, seen: set[int] | None = None) -> None:
        self._client, self._batch_id, self._is_ordered = client, batch_id, is_ordered
        self._seen = seen if seen is not None else set()
        self._parts_done: set[int] = set()

    async def arrived(self) -> AsyncIterator[dict[str, Any]]:
        """What is answered by now and was not given before."""
        for number in sorted(set(await self._client.parts(self._batch_id)) - self._parts_done):
            if self._is_ordered and number != len(self._parts_done):
                return
            rows = await self._client.part(self._batch_id, number)
            if rows is None:
                return
            self._parts_done.add(number)
            for row in rows:
                if self._is_new(row):
                    yield row

    async def rest(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """All that is left, once the batch is over."""
        good, bad = self._file(batch["output_file_id"]), self._file(batch["error_file_id"])
        first_good, first_bad = await anext(good, None), await anext(bad, None)
        while first_good is not None or first_bad is not None:
            if first_bad is None or (first_good is not None and index_of(first_good) < index_of(first_bad)):
                assert first_good is not None
                row, first_good = first_good, await anext(good, None)
            else:
                row, first_bad = first_bad, await anext(bad, None)
            if self._is_new(row):
                yield row

    async def _file(self, file_id: str | None) -> AsyncIterator[dict[str, Any]]:
        async for line in self._client.lines(file_id):
            yield orjson.loads(line)

    def _is_new(self, row: dict[str, Any]) -> bool:
        index = index_of(row)
        is_new = index not in self._seen
        self._seen.add(index)
        return is_new
