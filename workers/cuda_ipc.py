"""Memory on a GPU that other processes of this host map: CUDA's own IPC, through the runtime library that torch has loaded.

    exporter    allocate -> tensor, address      an allocation of its own: torch's allocator hands out parts of larger blocks,
                                                 and a handle always names the whole
    importer    attach(address) -> tensor        kept for a while, because mapping takes milliseconds and a handle, unlike a
                                                 process id, never comes to mean something else
                drop_unused                      a mapping keeps the memory of an exporter that died from being given back

Whoever maps memory reads the same bytes after the exporter's death. Knows nothing of what the bytes mean.
"""

import ctypes
import functools
import sys
import threading
import time
import weakref
from collections import OrderedDict
from typing import Any, Literal

import torch
from torch import Tensor

from coordinator.errors import ConfigError, Unavailable

SCHEME = "cuda-ipc"
ALIGNMENT = 2 << 20            # smaller allocations share a block, which one handle would open as a whole
HANDLE_BYTES = 64
LAZY_PEER_ACCESS = 1
OUT_OF_MEMORY = 2
MAX_KEPT = 8                   # mappings of other processes' memory
KEEP_UNUSED_S = 5.0


def is_address(address: str) -> bool:
    return address.startswith(f"{SCHEME}:")


def allocate(num_bytes: int, device: torch.device) -> tuple[Tensor, str]:
    """Zeroed bytes [num_bytes] uint8 on `device` and the address that other processes attach to. Freed with the last tensor over them.

    Raises ConfigError if the memory is short, Unavailable if memory cannot be shared on this machine.
    """
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    pointer, handle = ctypes.c_void_p(), _Handle()
    with torch.cuda.device(device):
        try:
            _call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(-(-num_bytes // ALIGNMENT) * ALIGNMENT))
            memory = _Memory(pointer.value or 0, num_bytes, device, "cudaFree")
            _call("cudaIpcGetMemHandle", ctypes.byref(handle), pointer)
        except _CudaError as error:
            if error.status == OUT_OF_MEMORY:
                raise ConfigError(f"cannot allocate {num_bytes / 1e9:.1f} GB on {device} for the KV pool: lower --max_total_token_num "
                                  "or --mem_fraction") from None
            raise Unavailable(f"memory of {device} cannot be shared: {error}") from None
    address = f"{SCHEME}:{_uuid(device)}:{bytes(handle).hex()}:{num_bytes}"
    with _lock:
        _present[address] = memory
    return memory.tensor().zero_(), address


def attach(address: str) -> Tensor:
    """The bytes that `allocate` of some process of this host gave this address, [num_bytes] uint8; never written to by us.

    In the process that allocated them, the very same tensor's memory. Raises Unavailable if they are not there (any more).
    """
    with _lock:
        memory = _present.get(address)
        if memory is None:
            _present[address] = memory = _open(address)
        if memory.is_mapped:
            _kept[address] = memory, time.monotonic()
            _kept.move_to_end(address)
        dropped = [_kept.popitem(last=False) for _ in range(len(_kept) - MAX_KEPT)]
    del dropped  # unmapped here, outside of the lock, unless a tensor still shows it
    return memory.tensor()


def drop_unused(unused_s: float = KEEP_UNUSED_S) -> None:
    """Let go of what was not attached to for so long. Whoever attaches calls this now and then."""
    now = time.monotonic()
    with _lock:
        dropped = [_kept.pop(address) for address, (_, used_at) in list(_kept.items()) if now - used_at >= unused_s]
    del dropped


class _Memory:
    """Bytes on a GPU; every tensor over them holds on to this object, whose end gives them back."""

    def __init__(self, pointer: int, num_bytes: int, device: torch.device, release: Literal["cudaFree", "cudaIpcCloseMemHandle"],
                 opened_on: int | None = None) -> None:
        self._pointer = pointer
        self._num_bytes = num_bytes
        self._device = device
        self._release = release
        self._opened_on = device.index if opened_on is None else opened_on

    @property
    def is_mapped(self) -> bool:
        """Another process's."""
        return self._release == "cudaIpcCloseMemHandle"

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._num_bytes,), "typestr": "|u1", "data": (self._pointer, False), "strides": None, "version": 2}

    def tensor(self) -> Tensor:
        return torch.as_tensor(self, device=self._device)

    def __del__(self) -> None:
        if sys.is_finalizing():
            return  # the driver gives everything back with the process
        with torch.cuda.device(self._opened_on):
            _call(self._release, ctypes.c_void_p(self._pointer))


_lock = threading.Lock()
_present: "weakref.WeakValueDictionary[str, _Memory]" = weakref.WeakValueDictionary()   # all of this process, its own included
_kept: "OrderedDict[str, tuple[_Memory, float]]" = OrderedDict()                        # mapped, with the time of the last use


def _open(address: str) -> _Memory:
    if not torch.cuda.is_available():
        raise Unavailable(f"KV pool {address}: there is no GPU here")
    try:
        _, uuid, handle, size = address.split(":")
        handle_bytes, num_bytes = bytes.fromhex(handle), int(size)
        if len(handle_bytes) != HANDLE_BYTES or num_bytes <= 0:
            raise ValueError
    except ValueError:
        raise Unavailable(f"KV pool {address}: not an address") from None
    device = _devices().get(uuid)
    if device is None:
        raise Unavailable(f"KV pool {address}: this process does not see that GPU")
    pointer = ctypes.c_void_p()
    here = torch.cuda.current_device()  # of several GPUs, the one that will read: peer access is opened to it
    with torch.cuda.device(here):
        try:
            _call("cudaIpcOpenMemHandle", ctypes.byref(pointer), _Handle.from_buffer_copy(handle_bytes), ctypes.c_uint(LAZY_PEER_ACCESS))
        except _CudaError as error:
            raise Unavailable(f"KV pool {address}: {error}") from None
    return _Memory(pointer.value or 0, num_bytes, device, "cudaIpcCloseMemHandle", here)


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


@functools.cache
def _devices() -> dict[str, torch.device]:
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {_uuid(device): device for device in devices}


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t: opaque, passed by value."""

    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


class _CudaError(Exception):
    def __init__(self, function: str, status: int, text: str) -> None:
        super().__init__(f"{function}: {text} ({status})")
        self.status = status


def _call(function: str, *arguments: object) -> None:
    runtime = _runtime()
    status = getattr(runtime, function)(*arguments)
    if status != 0:
        runtime.cudaGetLastError()  # forget it, or torch reports it after its own next launch
        text = ctypes.cast(runtime.cudaGetErrorString(status), ctypes.c_char_p).value or b""
        raise _CudaError(function, status, text.decode())


@functools.cache
def _runtime() -> Any:
    """torch has loaded this library already; asked for by its name alone, the loader gives that very instance."""
    name = f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}"
    try:
        runtime = ctypes.CDLL(name)
    except OSError as error:
        raise _CudaError(name, -1, str(error)) from None
    runtime.cudaGetErrorString.restype = ctypes.c_void_p
    return runtime
