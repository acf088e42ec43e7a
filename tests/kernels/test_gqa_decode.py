"""Grouped-head decode against plain torch, over shuffled pages in a poisoned cache."""

import dataclasses

import pytest
import torch
from torch import Tensor

from kernels.gqa_decode import Config, gqa_decode, gqa_decode_reference, num_splits
from kernels.split_schedule import SplitSchedule

SCALE = 0.3
GARBAGE = 2**30  # as a page id, far outside of any cache


@dataclasses.dataclass(slots=True)
class Case:
    q: Tensor
    cache: Tensor
    page_table: Tensor
    seq_lens: Tensor
    page_size: int

    def run(self, num_programs: int, config: Config | None = None, unit: int = 16, out: Tensor | None = None) -> Tensor:
        schedule = SplitSchedule.allocate(len(self.seq_lens), num_programs, self.cache.device, unit)
        schedule.refill(self.seq_lens, len(self.seq_lens))
        return gqa_decode(self.q, self.cache, self.page_table, self.seq_lens, schedule, SCALE, self.page_size, out, config)

    def expected(self) -> Tensor:
        return gqa_decode_reference(self.q, self.cache, self.page_table, self.seq_lens, SCALE, self.page_size)

    def rows(self, *rows: int) -> "Case":
        keep = list(rows)
        return dataclasses.replace(self, q=self.q[keep], page_table=self.page_table[keep], seq_lens=self.seq_lens[keep].contiguous())


def make_case(device: torch.device, dtype: torch.dtype, lens: list[int], num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 32,
              page_size: int = 16) -> Case:
    """Tokens in shuffled pages; NaN in all slots that hold none, garbage in the page table where no page is needed."""
    generator = torch.Generator().manual_seed(len(lens) + sum(lens))
    pages_of = [-(-length // page_size) for length in lens]
    order = torch.randperm(sum(pages_of) + 3, generator=generator).tolist()
    page_table = torch.full((len(lens), max(pages_of) + 2), GARBAGE, dtype=torch.int32)
    cache = torch.full((2, len(order) * page_size, num_kv_heads, head_dim), float("nan"))
    for i, length in enumerate(lens):
        pages = torch.tensor([order.pop() for _ in range(pages_of[i])], dtype=torch.int32)
        page_table[i, : len(pages)] = pages
        slots = (pages[:, None].long() * page_size + torch.arange(page_size)).flatten()[:length]
        cache[:, slots] = torch.randn(2, length, num_kv_heads, head_dim, generator=generator)
    # As the engine makes it: queries, keys and values of a token lie in one row.
    q = torch.randn(len(lens), num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(device, dtype)[:, :num_heads]
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    return Case(q, cache.to(device, dtype), page_table.to(device), seq_lens, page_size)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("num_programs", [1, 3, 8])
def test_ragged_batches_match_plain_torch(device: torch.device, dtype: torch.dtype, num_programs: int) -> None:
    case = make_case(device, dtype, [1, 16, 50, 0, 97, 15])
    assert_close(case.run(num_programs), case.expected(), dtype)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (14, 2), (17, 1), (5, 1)])
def test_any_group_of_heads(device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> None:
    case = make_case(device, dtype, [33, 18], num_heads=num_heads, num_kv_heads=num_kv_heads)
    assert_close(case.run(2), case.expected(), dtype)


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
def test_head_dimensions(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    case = make_case(device, dtype, [20, 3], head_dim=head_dim)
    assert_close(case.run(2), case.expected(), dtype)


def test_pages_of_64_tokens(device: torch.device, dtype: torch.dtype) -> None:
    case = make_case(device, dtype, [64, 130, 1], page_size=64)
    assert_close(case.run(3, unit=64), case.expected(), dtype)


def test_padding_rows_are_zero_and_every_row_is_written(device: torch.device, dtype: torch.dtype) -> None:
    case = make_case(device, dtype, [0, 20, 0])
    out = torch.full((3, 4, 40), float("nan"), dtype=dtype, device=device)[..., :32]
    assert case.run(4, out=out) is out
    assert not out[[0, 2]].any() and torch.isfinite(out).all()


def test_what_is_not_split_does_not_depend_on_batch_mates(device: torch.device, dtype: torch.dtype) -> None:
    case = make_case(device, dtype, [40, 45, 0, 38])
    together = case.run(4)
    for row in (0, 1, 3):
        assert torch.equal(case.rows(row).run(1)[0], together[row])


def test_the_same_batch_gives_the_same_bits(device: torch.device, dtype: torch.dtype) -> None:
    case = make_case(device, dtype, [100, 3])
    assert torch.equal(case.run(5), case.run(5))


def test_odd_sizes_are_refused(device: torch.device) -> None:
    case = make_case(device, torch.float16, [5])
    case.page_size = 24
    with pytest.raises(ValueError, match="page size 24"):
        case.run(1)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(32, 8, 128), (14, 2, 64), (32, 32, 96), (9, 3, 64)])
@pytest.mark.parametrize("lens", [[4096] * 4, [1, 63, 64, 65, 0, 1000, 4097, 30_000], [100_000]], ids=["equal", "ragged", "long"])
def test_published_sizes(device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int, lens: list[int]) -> None:
    case = make_case(device, torch.bfloat16, lens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=64)
    assert_close(case.run(num_splits(num_kv_heads, head_dim, device), unit=64), case.expected(), torch.bfloat16)
