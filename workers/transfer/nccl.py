"""NCCL's own interface, of the library that torch has loaded: two ranks, send, receive, abort. Nothing of torch.distributed.

Its process group would end this process when a peer hangs; a hand-over's peer may die, and then only its own communicator must go.
"""

import ctypes
import functools
from typing import Any

import torch

from coordinator.errors import Unavailable

SUCCESS, IN_PROGRESS = 0, 7
UINT8 = 1
MAX_CTAS = 16            # multiprocessors that a transfer may take from the steps
LIBRARY = "libnccl.so.2"


class UniqueId(ctypes.Structure):
    """ncclUniqueId: opaque, passed by value."""

    _fields_ = [("internal", ctypes.c_byte * 128)]


class _Config(ctypes.Structure):
    """The first fields of ncclConfig_t as of version 2.18: by `size` the library knows where ours ends, and takes its defaults beyond."""

    _fields_ = [("size", ctypes.c_size_t), ("magic", ctypes.c_uint), ("version", ctypes.c_uint), ("blocking", ctypes.c_int),
                ("cga_cluster_size", ctypes.c_int), ("min_ctas", ctypes.c_int), ("max_ctas", ctypes.c_int), ("net_name", ctypes.c_char_p),
                ("split_share", ctypes.c_int)]


UNDEFINED = -(1 << 31)
MAGIC, VERSION = 0xCAFEBEEF, 21800


class NcclError(Unavailable):
    """A call that failed, or did not end in time."""


class Communicator:
    """This process's end of two. Every call returns at once or raises NcclError; `is_ready` tells when what was called is under way."""

    def __init__(self, unique_id: bytes, rank: int) -> None:
        config = _Config(ctypes.sizeof(_Config), MAGIC, VERSION, 0, UNDEFINED, UNDEFINED, MAX_CTAS, None, UNDEFINED)
        self._comm = ctypes.c_void_p()
        self._call("ncclCommInitRankConfig", ctypes.byref(self._comm), 2, UniqueId.from_buffer_copy(unique_id), rank, ctypes.byref(config))
        self._peer = 1 - rank

    def send(self, pointer: int, num_bytes: int, stream: int) -> None:
        self._call("ncclSend", ctypes.c_void_p(pointer), ctypes.c_size_t(num_bytes), UINT8, self._peer, self._comm, ctypes.c_void_p(stream))

    def receive(self, pointer: int, num_bytes: int, stream: int) -> None:
        self._call("ncclRecv", ctypes.c_void_p(pointer), ctypes.c_size_t(num_bytes), UINT8, self._peer, self._comm, ctypes.c_void_p(stream))

    def is_ready(self) -> bool:
        """False: the last call is still setting something up. Raises NcclError for what went wrong meanwhile."""
        state = ctypes.c_int()
        self._call("ncclCommGetAsyncError", self._comm, ctypes.byref(state))
        if state.value not in (SUCCESS, IN_PROGRESS):
            raise NcclError(f"NCCL: {_text(state.value)}")
        return state.value == SUCCESS

    def abort(self) -> None:
        """Ends what is under way, on the device too, whatever the peer does."""
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm:
            _library().ncclCommAbort(comm)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(_library(), name)(*arguments)
        if status not in (SUCCESS, IN_PROGRESS):
            raise NcclError(f"{name}: {_text(status)}")


def new_unique_id() -> bytes:
    """For both ends of one communicator; whoever makes it listens for the other."""
    unique_id = UniqueId()
    status = _library().ncclGetUniqueId(ctypes.byref(unique_id))
    if status != SUCCESS:
        raise NcclError(f"ncclGetUniqueId: {_text(status)}")
    return bytes(unique_id)


def _text(status: int) -> str:
    return f"{(_library().ncclGetErrorString(status) or b'').decode()} ({status})"


@functools.cache
def _library() -> Any:
    torch.cuda.init()  # loads it, wherever it was installed
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise NcclError(f"{LIBRARY}: {error}") from None
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library
