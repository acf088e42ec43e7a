"""MLA decode against plain torch, over shuffled pages in a poisoned cache."""

import dataclasses

import pytest
import torch
from torch import Tensor

from kernels.combined_product import combined_product, combined_product_reference
from kernels.launch import IS_INTERPRETED
from kernels.mla_decode import Config, config_for, mla_decode, mla_decode_parts, mla_decode_reference, num_splits
from kernels.split_schedule import SplitSchedule

SCALE = 0.3
GARBAGE = 2**30  # as a page id, far outside of any cache
CONFIGS = {
    "heads as rows": Config(block_h=16, block_n=16, tokens_as_rows=False, use_tma=False, num_warps=4, num_stages=2),
    "tokens as rows": Config(block_h=16, block_n=16, tokens_as_rows=True, use_tma=False, num_warps=4, num_stages=2),
    "tiles by TMA": Config(block_h=16, block_n=16, tokens_as_rows=True, use_tma=True, num_warps=4, num_stages=2),
    "heads as rows by TMA": Config(block_h=16, block_n=16, tokens_as_rows=False, use_tma=True, num_warps=4, num_stages=3),
}


@dataclasses.dataclass(slots=True)
class Case:
    q_latent: Tensor
    q_rope: Tensor
    cache: Tensor
    page_table: Tensor
    seq_lens: Tensor
    page_size: int

    def run(self, num_programs: int, config: Config | None = None, unit: int = 16, out: Tensor | None = None) -> Tensor:
        schedule = SplitSchedule.allocate(len(self.seq_lens), num_programs, self.cache.device, unit)
        schedule.refill(self.seq_lens, len(self.seq_lens))
        return mla_decode(self.q_latent, self.q_rope, self.cache, self.page_table, self.seq_lens, schedule, SCALE, self.page_size, out,
                          config)

    def expected(self) -> Tensor:
        return mla_decode_reference(self.q_latent, self.q_rope, self.cache, self.page_table, self.seq_lens, SCALE, self.page_size)

    def rows(self, *rows: int) -> "Case":
        keep = list(rows)
        return dataclasses.replace(self, q_latent=self.q_latent[keep], q_rope=self.q_rope[keep], page_table=self.page_table[keep],
                                   seq_lens=self.seq_lens[keep].contiguous())


def make_case(device: torch.device, dtype: torch.dtype, lens: list[int], num_heads: int = 4, latent_dim: int = 32, rope_dim: int = 16,
              page_size: int = 16) -> Case:
    """Tokens in shuffled pages; NaN in all slots that hold none, garbage in the page table where no page is needed."""
    generator = torch.Generator().manual_seed(len(lens) + sum(lens))
    pages_of = [-(-length // page_size) for length in lens]
    order = torch.randperm(sum(pages_of) + 3, generator=generator).tolist()
    page_table = torch.full((len(lens), max(pages_of) + 2), GARBAGE, dtype=torch.int32)
    cache = torch.full((len(order) * page_size, latent_dim + rope_dim), float("nan"))
    for i, length in enumerate(lens):
        pages = torch.tensor([order.pop() for _ in range(pages_of[i])], dtype=torch.int32)
        page_table[i, : len(pages)] = pages
        slots = (pages[:, None].long() * page_size + torch.arange(page_size)).flatten()[:length]
        cache[slots] = torch.randn(length, latent_dim + rope_dim, generator=generator)
    # As the engine makes them: the latent part comes head by head, the rotated part lies inside of wider rows.
    q_latent = torch.randn(num_heads, len(lens), latent_dim, generator=generator).to(device, dtype).transpose(0, 1)
    q_rope = torch.randn(len(lens), num_heads, 24 + rope_dim, generator=generator).to(device, dtype)[..., 24:]
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    return Case(q_latent, q_rope, cache.to(device, dtype), page_table.to(device), seq_lens, page_size)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_ragged_batches_match_plain_torch(device: torch.device, dtype: torch.dtype, config: Config) -> None:
    case = make_case(device, dtype, [1, 16, 50, 0, 97, 15])
    assert_close(case.run(3, config), case.expected(), dtype)


@pytest.mark.parametrize("lens", [[130], [7], [0], [64, 0, 33]])
def test_parts_are_added_up_and_leave_the_latent_space_in_one_launch(device: torch.device, dtype: torch.dtype, lens: list[int]) -> None:
    case = make_case(device, dtype, lens)
    schedule = SplitSchedule.allocate(len(lens), 3, device, 16)
    schedule.refill(case.seq_lens, len(lens))
    attended, results, log_sums = mla_decode_parts(case.q_latent, case.q_rope, case.cache, case.page_table, case.seq_lens, schedule, SCALE,
                                                   case.page_size, torch.full_like(case.q_latent, float("nan")))
    weight = torch.randn(4, 24, 32, generator=torch.Generator().manual_seed(1)).to(device, dtype).transpose(1, 2)
    out = torch.full((len(lens), 4, 24), float("nan"), dtype=dtype, device=device)
    combined_product(attended, results, log_sums, case.seq_lens, schedule, weight, out)
    expected = combined_product_reference(case.expected(), weight)
    assert not out[case.seq_lens == 0].any()
    if any(lens):
        assert_close(out, expected, dtype)


@pytest.mark.parametrize("num_programs", [1, 2, 8])
def test_split_sequences_match_plain_torch(device: torch.device, dtype: torch.dtype, num_programs: int) -> None:
    case = make_case(device, dtype, [130, 7], num_heads=5)
    assert_close(case.run(num_programs, CONFIGS["tokens as rows"]), case.expected(), dtype)


@pytest.mark.parametrize("num_heads", [4, 16, 20])
def test_any_number_of_heads_in_blocks_of_16(device: torch.device, dtype: torch.dtype, num_heads: int) -> None:
    case = make_case(device, dtype, [33, 18], num_heads=num_heads)
    assert_close(case.run(2, CONFIGS["heads as rows"]), case.expected(), dtype)


@pytest.mark.parametrize(("page_size", "latent_dim", "rope_dim"), [(64, 64, 16), (32, 16, 32)])
def test_sizes_of_pages_and_latents(device: torch.device, dtype: torch.dtype, page_size: int, latent_dim: int, rope_dim: int) -> None:
    case = make_case(device, dtype, [70, 64, 5], latent_dim=latent_dim, rope_dim=rope_dim, page_size=page_size)
    assert_close(case.run(2, unit=64), case.expected(), dtype)


def test_padding_rows_are_zero_and_every_row_is_written(device: torch.device, dtype: torch.dtype) -> None:
    case = make_case(device, dtype, [0, 20, 0])
    out = torch.full((3, 4, 40), float("nan"), dtype=dtype, device=device)[..., :32]
    assert case.run(4, CONFIGS["tokens as rows"], out=out) is out
    assert not out[[0, 2]].any() and torch.isfinite(out).all()


def test_only_padding_is_all_zeros(device: torch.device, dtype: torch.dtype) -> None:
    assert not make_case(device, dtype, [0, 0]).run(2).any()


def test_what_is_not_split_does_not_depend_on_batch_mates(device: torch.device, dtype: torch.dtype) -> None:
    case = make_case(device, dtype, [40, 45, 0, 38])
    together = case.run(4)
    for row in (0, 1, 3):
        alone = case.rows(row).run(1)
        assert torch.equal(alone[0], together[row])


def test_the_same_batch_gives_the_same_bits(device: torch.device, dtype: torch.dtype) -> None:
    case = make_case(device, dtype, [100, 3])
    assert torch.equal(case.run(5), case.run(5))


def test_odd_sizes_are_refused(device: torch.device) -> None:
    case = make_case(device, torch.float16, [5])
    case.page_size = 24
    with pytest.raises(ValueError, match="page size 24"):
        case.run(1)


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads", [16, 32, 128])
@pytest.mark.parametrize("lens", [[4096] * 4, [1, 63, 64, 65, 0, 1000, 4097, 30_000], [100_000]], ids=["equal", "ragged", "long"])
def test_deepseek_sizes(device: torch.device, num_heads: int, lens: list[int]) -> None:
    assert not IS_INTERPRETED
    case = make_case(device, torch.bfloat16, lens, num_heads=num_heads, latent_dim=512, rope_dim=64, page_size=64)
    for use_tma in (True, False):
        config = dataclasses.replace(config_for(num_heads), use_tma=use_tma)
        assert_close(case.run(num_splits(num_heads, device), config, unit=64), case.expected(), torch.bfloat16)
