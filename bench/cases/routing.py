"""Choosing experts and sorting the rows by them, as every layer with a mixture does before its products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.kernel_case import KernelCase, Prepared
from kernels.align import align, allocate
from kernels.routing import route, route_reference

Choice = dict[str, Any]
V2_LITE: Choice = {"top_k": 6, "num_shared": 2}
V3: Choice = {"top_k": 8, "num_groups": 8, "groups_per_token": 4, "scaling_factor": 2.5, "normalize": True, "num_shared": 1}
MODELS: dict[str, tuple[int, Choice]] = {"V2-Lite": (64, V2_LITE), "V3": (256, V3)}
PREFILL = 512   # from here on blocks have 128 rows


def cases() -> list[KernelCase]:
    return [_case(model, num_tokens) for model in MODELS for num_tokens in (1, 16, 64, 128, 256, 1024, 8192)]


def offline_calls() -> list[Callable[[], object]]:
    cpu = torch.device("cpu")
    return [lambda model=model, num_tokens=num_tokens: _route(*_inputs(model, num_tokens, cpu), model)  # type: ignore[misc]
            for model in MODELS for num_tokens in (1, 32, 8192)]


def _inputs(model: str, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    num_experts, choice = MODELS[model]
    logits = torch.randn(num_tokens, num_experts, device=device)
    return logits, torch.randn(num_experts, device=device) * 0.1 if choice is V3 else None


def _route(logits: Tensor, bias: Tensor | None, model: str) -> Tensor:
    num_experts, choice = MODELS[model]
    num_all = num_experts + choice["num_shared"]
    num_rows = logits.shape[0] * (choice["top_k"] + choice["num_shared"])
    aligned = allocate(num_rows, num_all, 16 if logits.shape[0] < PREFILL else 128, logits.device)
    return route(logits, bias, **choice, aligned=aligned)[1]


def _route_then_align(logits: Tensor, bias: Tensor | None, model: str) -> None:
    num_experts, choice = MODELS[model]
    align(route(logits, bias, **choice)[0], num_experts + choice["num_shared"], 16 if logits.shape[0] < PREFILL else 128)


def _in_order(logits: Tensor, bias: Tensor | None, choice: Choice) -> Tensor:
    """The reference's weights, best expert first."""
    ids, weights = route_reference(logits, bias, **choice)
    top_k = choice["top_k"]
    scores = logits if bias is None else logits.sigmoid() + bias
    order = scores.gather(1, ids[:, :top_k].long()).argsort(1, descending=True)
    return torch.cat((weights[:, :top_k].gather(1, order), weights[:, top_k:]), 1)


def _case(model: str, num_tokens: int) -> KernelCase:
    num_experts, choice = MODELS[model]
    num_rows = num_tokens * (choice["top_k"] + choice["num_shared"])

    def setup() -> Prepared:
        torch.manual_seed(num_tokens)
        sets = [_inputs(model, num_tokens, torch.device("cuda")) for _ in range(2)]   # as warm as the router leaves them
        return Prepared(
            run=lambda config, index: _route(*sets[index], model), reference=lambda index: _in_order(*sets[index], choice), num_sets=2,
            peers={"two launches": lambda index: _route_then_align(*sets[index], model),
                   "torch, unsorted": lambda index: route_reference(*sets[index], **choice)})

    bar = "<= 30 us" if num_tokens == 8192 else "<= 5 us" if num_tokens <= 256 else ""
    return KernelCase(
        kernel="routing", shape=f"{model}, {num_tokens} tokens, chosen and sorted", num_bytes=num_tokens * num_experts * 4 + num_rows * 12,
        num_flops=num_tokens * num_experts * (5 + 3 * choice["top_k"]), rate="fp32", setup=setup, bar=bar, max_error=1e-4)
