"""KV pages between two pools on one GPU: what a hand-over costs there."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.kernel_case import KernelCase, Prepared
from kernels.page_copy import Config, copy_pages, copy_pages_reference, gather_pages

PAGE_SIZE = 64
POOL_PAGES = 256
CONFIGS = [Config(block=block, num_warps=num_warps) for block in (512, 1024, 2048, 4096, 8192) for num_warps in (2, 4, 8)
           if 4 <= block // (32 * num_warps) <= 32]
CAPPED = [Config(block=block, num_warps=8, max_programs=programs) for block in (4096, 8192) for programs in (132, 264, 528)]


def cases() -> list[KernelCase]:
    return [
        _copy("V2-Lite, 1k tokens", planes=27, elements=576, num_pages=16, bar=""),
        _copy("V2-Lite, 4k tokens", planes=27, elements=576, num_pages=64, bar=">= 3,600 GB/s"),
        _copy("V3, 4k tokens", planes=61, elements=576, num_pages=64, bar=">= 3,600 GB/s"),
        _copy("Llama 8B, 4k tokens", planes=64, elements=1024, num_pages=64, bar=">= 3,600 GB/s"),
        _gather("gathered, V2-Lite, 4k tokens", planes=27, elements=576, num_pages=64),
    ]


def offline_calls() -> list[Callable[[], object]]:
    pool, pages = torch.empty(27, 4 * PAGE_SIZE, 576, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int32)
    return [lambda: copy_pages(pool, pool, pages, pages, PAGE_SIZE), lambda: gather_pages(pool, pages, PAGE_SIZE)]


def _pool(planes: int, elements: int) -> Tensor:
    return torch.randn(planes, POOL_PAGES * PAGE_SIZE, elements, dtype=torch.bfloat16, device="cuda")


def _pages(num_pages: int) -> Tensor:
    return torch.randperm(POOL_PAGES, device="cuda")[:num_pages].int()


def _copy(shape: str, planes: int, elements: int, num_pages: int, bar: str) -> KernelCase:
    num_bytes = 4 * planes * num_pages * PAGE_SIZE * elements
    num_sets = 4

    def setup() -> Prepared:
        src, dst = _pool(planes, elements), _pool(planes, elements)
        lists = [(_pages(num_pages), _pages(num_pages)) for _ in range(num_sets)]
        runs = [torch.empty(planes, num_pages * PAGE_SIZE, elements, dtype=torch.bfloat16, device="cuda") for _ in range(2)]

        def run(config: Config | None, index: int) -> Tensor:
            copy_pages(src, dst, *lists[index], PAGE_SIZE, config=config)
            return dst

        def expected(index: int) -> Tensor:
            copied = dst.clone()
            copy_pages_reference(src, copied, *lists[index], PAGE_SIZE)
            return copied

        return Prepared(run=run, reference=expected, num_sets=num_sets, configs=CONFIGS + CAPPED,
                        peers={"indexed by torch": lambda index: copy_pages_reference(src, dst, *lists[index], PAGE_SIZE),
                               "plain copy of as much": lambda index: runs[index % 2].copy_(runs[1 - index % 2])})

    return KernelCase(kernel="page_copy", shape=shape, num_bytes=num_bytes, num_flops=0, rate="fp32", setup=setup, bar=bar, max_error=0.0)


def _gather(shape: str, planes: int, elements: int, num_pages: int) -> KernelCase:
    def setup() -> Prepared:
        pool, lists = _pool(planes, elements), [_pages(num_pages) for _ in range(4)]
        out = torch.empty(planes, num_pages * PAGE_SIZE, elements, dtype=torch.bfloat16, device="cuda")

        def expected(index: int) -> Tensor:
            by_page = torch.unflatten(pool, 1, (-1, PAGE_SIZE))
            return by_page[:, lists[index].long()].flatten(1, 2)

        return Prepared(run=lambda config, index: gather_pages(pool, lists[index], PAGE_SIZE, out, config=config), reference=expected,
                        num_sets=len(lists), configs=CONFIGS, peers={"indexed by torch": expected})

    return KernelCase(kernel="page_copy", shape=shape, num_bytes=4 * planes * num_pages * PAGE_SIZE * elements, num_flops=0, rate="fp32",
                      setup=setup, bar=">= 3,600 GB/s", max_error=0.0)
