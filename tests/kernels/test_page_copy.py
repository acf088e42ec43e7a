"""Pages are moved bit by bit, to where they belong and nowhere else."""

import pytest
import torch

from kernels.page_copy import Config, copy_pages, copy_pages_reference, gather_pages, scatter_pages

PAGE = 16
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CONFIGS = [None, Config(block=128, num_warps=1), Config(block=64, num_warps=1, max_programs=3)]


def make_pool(device: torch.device, dtype: torch.dtype, planes: int, num_pages: int, elements: int) -> torch.Tensor:
    """Any bits at all, NaNs among them."""
    words = torch.randint(0, 256, (planes, num_pages * PAGE, elements * dtype.itemsize), dtype=torch.uint8)
    return words.to(device).view(dtype)


def ids(device: torch.device, *pages: int) -> torch.Tensor:
    return torch.tensor(pages, dtype=torch.int32, device=device)


def are_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("planes", "elements"), [(1, 8), (3, 20)])
def test_copied_pages_are_the_same_bits_and_nothing_else_changes(device: torch.device, dtype: torch.dtype, planes: int, elements: int,
                                                                config: Config | None) -> None:
    src, dst = make_pool(device, dtype, planes, 5, elements), make_pool(device, dtype, planes, 7, elements)
    expected, src_pages, dst_pages = dst.clone(), ids(device, 4, 0, 3), ids(device, 1, 6, 2)
    copy_pages_reference(src.view(torch.uint8), expected.view(torch.uint8), src_pages, dst_pages, PAGE)
    copy_pages(src, dst, src_pages, dst_pages, PAGE, config=config)
    assert are_same_bits(dst, expected)


def test_page_lists_may_stand_anywhere_in_memory(device: torch.device) -> None:
    src, dst = make_pool(device, torch.float16, 2, 4, 8), make_pool(device, torch.float16, 2, 4, 8)
    pages = torch.stack((ids(device, 9, 2, 0), ids(device, 9, 1, 3)))[:, 1:]
    expected = dst.clone()
    copy_pages_reference(src, expected, *pages, PAGE)
    copy_pages(src, dst, *pages, PAGE)
    assert are_same_bits(dst, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_gathered_pages_stand_in_order_and_scatter_back(device: torch.device, config: Config | None) -> None:
    src, dst = make_pool(device, torch.bfloat16, 3, 6, 12), make_pool(device, torch.bfloat16, 3, 4, 12)
    src_pages, dst_pages = ids(device, 5, 1, 2), ids(device, 0, 3, 2)
    packed = gather_pages(src, src_pages, PAGE, config=config)
    assert are_same_bits(packed, torch.cat([src[:, page * PAGE : (page + 1) * PAGE] for page in (5, 1, 2)], 1))
    expected = dst.clone()
    copy_pages_reference(src, expected, src_pages, dst_pages, PAGE)
    scatter_pages(packed, dst, dst_pages, PAGE, config=config)
    assert are_same_bits(dst, expected)


def test_no_pages_are_no_work(device: torch.device) -> None:
    pool = make_pool(device, torch.float32, 2, 2, 4)
    before = pool.clone()
    copy_pages(pool, pool, ids(device), ids(device), PAGE)
    assert are_same_bits(pool, before) and gather_pages(pool, ids(device), PAGE).shape == (2, 0, 4)


def test_pools_that_do_not_fit_together_are_refused(device: torch.device) -> None:
    pool, page = make_pool(device, torch.float32, 2, 2, 4), ids(device, 0)
    others = make_pool(device, torch.float16, 2, 2, 4), make_pool(device, torch.float32, 1, 2, 4)
    for other in (*others, pool[:, :PAGE], pool[:, : PAGE + 1]):
        with pytest.raises(ValueError, match="page copy"):
            copy_pages(other, pool, page, page, PAGE)


@pytest.mark.gpu
@pytest.mark.parametrize(("planes", "elements", "max_programs"), [(27, 576, 0), (27, 576, 32), (64, 1024, 0)])
def test_sizes_of_real_use(device: torch.device, planes: int, elements: int, max_programs: int) -> None:
    src, dst = (torch.randint(-(1 << 15), 1 << 15, (planes, 80 * 64, elements), dtype=torch.int16, device=device) for _ in range(2))
    src_pages, dst_pages = (torch.randperm(80, device=device)[:66].int() for _ in range(2))
    expected = dst.clone()
    copy_pages_reference(src, expected, src_pages, dst_pages, 64)
    copy_pages(src, dst, src_pages, dst_pages, 64, config=Config(block=2048, num_warps=4, max_programs=max_programs))
    assert torch.equal(dst, expected)
