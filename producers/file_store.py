"""Where uploaded files and the answers of batches live: blobs by name, written once, whole or not at all.

A blob that exists is never changed, so two writers of one name are harmless: the first one's stands. Shims that are to carry on each
other's batches must share a store; the default is a directory (of a shared disk, when there are several hosts).
"""

import asyncio
import contextlib
import os
import re
import tempfile
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from typing import Protocol

from coordinator.errors import ConfigError, InvalidField

CHUNK_BYTES = 256 * 1024
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


class NoBlob(KeyError):
    """There is no blob of this name."""


class FileStore(Protocol):
    """Names are letters, digits, `-`, `_` and `.`; anything else raises InvalidField, so no name leads out of the store."""

    async def put(self, name: str, chunks: AsyncIterable[bytes]) -> int:
        """Store a blob, unless one of this name is there already: the size of the one that stands."""

    async def size(self, name: str) -> int | None:
        """None when there is no such blob."""

    def get(self, name: str) -> AsyncIterator[bytes]:
        """A blob in chunks. Raises NoBlob."""

    async def names(self, prefix: str) -> list[str]:
        """Sorted."""

    async def delete(self, name: str) -> bool:
        """False when there is no such blob."""


class DirectoryStore:
    """One file per blob in one folder."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder. Raises ConfigError."""
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"--files_dir {folder}: {error.strerror}") from None

    async def put(self, name: str, chunks: AsyncIterable[bytes]) -> int:
        path = self._path(name)
        descriptor, draft = await asyncio.to_thread(tempfile.mkstemp, dir=self._folder, prefix=".draft-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                async for chunk in chunks:
                    await asyncio.to_thread(file.write, chunk)
                await asyncio.to_thread(_flush, file.fileno(), file.flush)
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)            # unlike a rename, it keeps what is there
        finally:
            os.unlink(draft)
        return path.stat().st_size

    async def size(self, name: str) -> int | None:
        path = self._path(name)
        return path.stat().st_size if path.is_file() else None

    async def get(self, name: str) -> AsyncIterator[bytes]:
        try:
            file = await asyncio.to_thread(self._path(name).open, "rb")
        except FileNotFoundError:
            raise NoBlob(name) from None
        with file:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield chunk

    async def names(self, prefix: str) -> list[str]:
        return sorted(name for name in await asyncio.to_thread(os.listdir, self._folder) if name.startswith(prefix) and name[0] != ".")

    async def delete(self, name: str) -> bool:
        try:
            await asyncio.to_thread(self._path(name).unlink)
        except FileNotFoundError:
            return False
        return True

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InvalidField("file_id", f"must be letters, digits, '-', '_' or '.', got {name!r:.80}")
        return self._folder / name


def _flush(descriptor: int, flush: object) -> None:
    assert callable(flush)
    flush()
    os.fsync(descriptor)


async def whole(store: FileStore, name: str) -> bytes:
    """A small blob. Raises NoBlob."""
    return b"".join([chunk async for chunk in store.get(name)])


async def once(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def lines(chunks: AsyncIterable[bytes], max_line_bytes: int) -> AsyncIterator[bytes]:
    """Lines without their ends. A line that is over the limit comes cut to one byte more than the limit, its rest is left out."""
    rest = b""
    is_skipping = False
    async for chunk in chunks:
        *ended, rest = (rest + chunk).split(b"\n")
        for line in ended:
            if not is_skipping:
                yield line[:max_line_bytes + 1]
            is_skipping = False
        if is_skipping:
            rest = b""
        elif len(rest) > max_line_bytes:
            yield rest[:max_line_bytes + 1]
            rest, is_skipping = b"", True
    if rest and not is_skipping:
        yield rest[:max_line_bytes + 1]
