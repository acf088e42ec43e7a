"""Which mappings of other processes' memory are kept and for how long, and what is no address. The memory itself needs a GPU."""

import gc
from collections.abc import Iterator

import pytest
import torch

from coordinator.errors import Unavailable
from workers import cuda_ipc

HANDLE = "00" * 64
opened: list[str] = []
closed: list[str] = []


class FakeMemory:
    """Ordinary memory that tells when it is let go of."""

    def __init__(self, address: str, *, is_mapped: bool = True) -> None:
        self.address = address
        self.is_mapped = is_mapped

    def tensor(self) -> torch.Tensor:
        return torch.zeros(8, dtype=torch.uint8)

    def __del__(self) -> None:
        closed.append(self.address)


@pytest.fixture
def mappings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def open_(address: str) -> FakeMemory:
        opened.append(address)
        return FakeMemory(address)

    monkeypatch.setattr(cuda_ipc, "_open", open_)
    yield
    cuda_ipc.drop_unused(0.0)
    gc.collect()
    opened.clear()
    closed.clear()


def test_an_address_is_mapped_once_and_used_again(mappings: None) -> None:
    for _ in range(3):
        cuda_ipc.attach("one")
    cuda_ipc.attach("two")
    assert opened == ["one", "two"] and closed == []


def test_what_was_not_used_for_a_while_is_let_go_of(mappings: None) -> None:
    cuda_ipc.attach("one")
    cuda_ipc.drop_unused(60.0)
    assert closed == []
    cuda_ipc.drop_unused(0.0)
    assert closed == ["one"]
    cuda_ipc.attach("one")
    assert opened == ["one", "one"]


def test_of_too_many_mappings_the_longest_unused_goes(mappings: None) -> None:
    for i in range(cuda_ipc.MAX_KEPT):
        cuda_ipc.attach(str(i))
    cuda_ipc.attach("0")
    cuda_ipc.attach("more")
    assert closed == ["1"]


def test_memory_of_this_process_is_found_and_not_held_on_to(mappings: None) -> None:
    own = FakeMemory("own", is_mapped=False)
    cuda_ipc._present["own"] = own  # type: ignore[assignment]
    cuda_ipc.attach("own")
    assert opened == []
    del own
    assert closed == ["own"]


NO_ADDRESSES = ["cuda-ipc:", "cuda-ipc:a:b", f"cuda-ipc:gpu:{HANDLE}:x", f"cuda-ipc:gpu:{HANDLE}:0", "cuda-ipc:gpu:00:4",
                f"cuda-ipc:gpu:{HANDLE}:4"]


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_what_names_no_memory_here_is_unavailable(address: str) -> None:
    assert cuda_ipc.is_address(address)
    with pytest.raises(Unavailable, match="KV pool cuda-ipc"):
        cuda_ipc.attach(address)
