"""OpenAI's files over a blob store: what is uploaded for batches, and what they answer. Content and description are two blobs.

A file is there once its description is: a half uploaded one never is.
"""

import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, Literal

import orjson

from coordinator.errors import TokenmillError
from producers.file_store import FileStore, NoBlob, once, whole

Purpose = Literal["batch", "batch_output"]
_DESCRIPTION = ".json"


class UnknownFile(TokenmillError):
    """No file of this id; or it is somebody else's."""

    def __init__(self, file_id: str) -> None:
        super().__init__(f"No such File object: {file_id:.200}")


def new_file_id() -> str:
    return f"file-{uuid.uuid4().hex}"


class Files:
    """Files belong to tenants: to others they do not exist."""

    def __init__(self, store: FileStore) -> None:
        self.store = store

    async def save(self, file_id: str, chunks: AsyncIterable[bytes], *, filename: str, purpose: Purpose, tenant: str) -> dict[str, Any]:
        """Store a file, unless it was stored before. OpenAI's File object."""
        size = await self.store.put(file_id, chunks)
        description = {"id": file_id, "object": "file", "bytes": size, "created_at": int(time.time()), "filename": filename,
                       "purpose": purpose, "status": "processed", "tenant": tenant}
        await self.store.put(file_id + _DESCRIPTION, once(orjson.dumps(description)))
        return _shown(description)

    async def describe(self, file_id: str, tenant: str) -> dict[str, Any]:
        """Raises UnknownFile."""
        return _shown(await self._find(file_id, tenant))

    async def page(self, tenant: str, *, after: str, limit: int, purpose: str, is_newest_first: bool) -> tuple[list[dict[str, Any]], bool]:
        """(File objects, whether there are more)."""
        found = []
        for name in await self.store.names("file-"):
            if name.endswith(_DESCRIPTION):
                description = orjson.loads(await whole(self.store, name))
                if description["tenant"] == tenant and purpose in ("", description["purpose"]):
                    found.append(_shown(description))
        found.sort(key=lambda file: (file["created_at"], file["id"]), reverse=is_newest_first)
        ids = [file["id"] for file in found]
        start = ids.index(after) + 1 if after in ids else len(ids) if after else 0
        return found[start:start + limit], len(found) > start + limit

    async def content(self, file_id: str, tenant: str) -> AsyncIterator[bytes]:
        """Raises UnknownFile."""
        await self._find(file_id, tenant)
        return self.store.get(file_id)

    async def delete(self, file_id: str, tenant: str) -> None:
        """Raises UnknownFile."""
        await self._find(file_id, tenant)
        await self.store.delete(file_id + _DESCRIPTION)
        await self.store.delete(file_id)

    async def _find(self, file_id: str, tenant: str) -> dict[str, Any]:
        if not file_id.startswith("file-") or file_id.endswith(_DESCRIPTION):
            raise UnknownFile(file_id)
        try:
            description: dict[str, Any] = orjson.loads(await whole(self.store, file_id + _DESCRIPTION))
        except NoBlob:
            raise UnknownFile(file_id) from None
        if description["tenant"] != tenant:
            raise UnknownFile(file_id)
        return description


def _shown(description: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in description.items() if name != "tenant"}
