"""The contract of a file store, on a directory; and lines out of chunks."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator.errors import ConfigError, InvalidField
from producers.file_store import DirectoryStore, FileStore, NoBlob, lines, once, whole


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return DirectoryStore(tmp_path / "files")


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_a_blob_is_what_was_put(store: FileStore) -> None:
    content = bytes(range(256)) * 4096
    assert await store.put("a", chunks(content[:10], content[10:])) == len(content)
    assert await whole(store, "a") == content and await store.size("a") == len(content)


async def test_the_first_blob_of_a_name_stands(store: FileStore) -> None:
    await store.put("a", once(b"first"))
    assert await store.put("a", once(b"second, longer")) == 5
    assert await whole(store, "a") == b"first"


async def test_a_blob_whose_writer_fails_never_was(store: FileStore, tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise OSError("the client has gone")

    with pytest.raises(OSError, match="gone"):
        await store.put("a", broken())
    assert await store.size("a") is None and list((tmp_path / "files").iterdir()) == []


async def test_names_are_found_by_prefix_and_deleted(store: FileStore) -> None:
    for name in ("b.part-2", "b.part-1", "c"):
        await store.put(name, once(b""))
    assert await store.names("b.part-") == ["b.part-1", "b.part-2"]
    assert await store.delete("c") and not await store.delete("c")
    with pytest.raises(NoBlob):
        await whole(store, "c")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a\0", "a" * 300])
async def test_no_name_leads_out_of_the_store(store: FileStore, name: str) -> None:
    with pytest.raises(InvalidField):
        await store.put(name, once(b""))


def test_a_folder_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--files_dir"):
        DirectoryStore(tmp_path / "file" / "files")


@pytest.mark.parametrize(("parts", "expected"), [
    ((b"a\nb\n",), [b"a", b"b"]),
    ((b"a\nb",), [b"a", b"b"]),
    ((b"ab", b"c\nd", b"\n\ne"), [b"abc", b"d", b"", b"e"]),
    ((b"12345678\nx\n",), [b"12345", b"x"]),
    ((b"1234", b"5678", b"9\nx\n"), [b"12345", b"x"]),
    ((), []),
])
async def test_lines_are_found_across_chunks_and_long_ones_are_cut(parts: tuple[bytes, ...], expected: list[bytes]) -> None:
    assert [line async for line in lines(chunks(*parts), max_line_bytes=4)] == expected
