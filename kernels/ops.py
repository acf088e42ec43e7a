"""The table that picks an implementation of each operation by kind of device. Looked up once, when a model is built."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import cpu, linear, reference
from kernels.linear import Linear
from kernels.plan import Chunk, DecodeGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """One implementation of each operation; shapes and meaning stand in `kernels.reference` and `kernels.linear`."""

    make_linear: Callable[[Tensor, Tensor | None], Linear]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = reference.rms_norm
    rotate_: Callable[[Tensor, Tensor], None] = reference.rotate_
    silu_mul: Callable[[Tensor], Tensor] = reference.silu_mul
    route_softmax: Callable[[Tensor, int, int, int, float], tuple[Tensor, Tensor]] = reference.route_softmax
    route_noaux: Callable[[Tensor, Tensor, int, int, int, float, bool], tuple[Tensor, Tensor]] = reference.route_noaux
    fused_experts: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = reference.fused_experts
    store_gqa: Callable[[Tensor, Tensor, Tensor], None] = reference.store_gqa
    store_mla: Callable[[Tensor, Tensor, Tensor], None] = reference.store_mla
    gqa_decode: Callable[[Tensor, Tensor, DecodeGroup, float], Tensor] = reference.gqa_decode
    gqa_chunk: Callable[[Tensor, Tensor, Chunk, float], Tensor] = reference.gqa_chunk
    mla_decode: Callable[[Tensor, Tensor, DecodeGroup, float, int], Tensor] = reference.mla_decode
    mla_chunk: Callable[[Tensor, Tensor, Chunk, Tensor, float], Tensor] = reference.mla_chunk


PLAIN = Ops(make_linear=linear.plain_linear)
OPS: dict[str, Ops] = {
    "cpu": Ops(make_linear=linear.cpu_linear, rms_norm=cpu.rms_norm, rotate_=cpu.rotate_, silu_mul=cpu.silu_mul,
               gqa_decode=cpu.gqa_decode, mla_decode=cpu.mla_decode),
    "cuda": PLAIN,
}


def ops_for(device: torch.device) -> Ops:
    return OPS.get(device.type, PLAIN)
