"""The GPU engine against transformers on the same checkpoint: real head, latent and expert shapes, few layers.

bfloat16 rounds, and where two experts score alike it sends a token elsewhere. So the yardstick is transformers itself: our logits must be
as near to its float32 ones as its own bfloat16 ones are, and where float32's best token leads by more than that noise, it must be ours.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = {
    "deepseek-v2-lite": {"layers": 4, "hidden": 1024, "intermediate": 2048, "experts": 32, "vocab": 4096},
    "deepseek-v3": {"layers": 5, "hidden": 1024, "intermediate": 2048, "heads": 16, "experts": 32, "vocab": 4096},
    "llama": {"layers": 4, "hidden": 1024, "intermediate": 2048, "heads": 16, "kv_heads": 4, "vocab": 4096},
    "qwen2": {"layers": 4, "hidden": 1024, "intermediate": 2048, "heads": 16, "kv_heads": 2, "vocab": 4096},
}
LENGTHS = (7, 64, 130, 300)
NUM_DECODES = 12
NOISE = 1.5     # times transformers' own distance from float32
PAGE_SIZE = 64


@pytest.fixture(scope="module", params=SIZES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from workers.random_model import Overrides, write_random_model

    path = tmp_path_factory.mktemp("model")
    return write_random_model(path, request.param, Overrides(**SIZES[request.param]), seed=1, dtype="bfloat16", full=True)


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab_size, (length + NUM_DECODES,), generator=generator).tolist() for length in LENGTHS]


def expected(path: Path, dtype: torch.dtype, sequences: list[list[int]]) -> list[Tensor]:
    """transformers' logits [length + NUM_DECODES, vocab] of each sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").cuda().eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids], device="cuda")).logits[0].float() for ids in sequences]


class Ours:
    """Sequences on the executor, their next tokens given rather than drawn: the logits of every step from the end of the prompt on."""

    def __init__(self, path: Path, *, use_cuda_graphs: bool = True, keeps_fp8: bool | None = None, ops: Any = None) -> None:
        from workers.cuda_executor import CudaExecutor
        from workers.loader import Checkpoint
        from workers.model_config import ModelConfig

        config, device = ModelConfig.from_dir(path), torch.device("cuda", 0)
        weights = Checkpoint(path, config, torch.bfloat16, device, keeps_fp8=keeps_fp8)
        self.executor = CudaExecutor(config, weights, device=device, dtype=torch.bfloat16, num_pages=64, page_size=PAGE_SIZE,
                                     max_num_seqs=8, max_seq_len=1024, chunk_size=512, use_cuda_graphs=use_cuda_graphs, ops=ops)
        self.executor.warm_up()
        for cache in self.executor.kv_cache.layers:
            cache.fill_(float("nan"))

    def logits(self, sequences: list[list[int]]) -> list[Tensor]:
        """[NUM_DECODES, vocab] of each: prompts in one step, the longest in two chunks, then decodes together."""
        pages = iter(torch.randperm(64, generator=torch.Generator().manual_seed(3)).tolist())
        tables = [[next(pages) for _ in range(-(-len(ids) // PAGE_SIZE))] for ids in sequences]
        starts = [0] * len(sequences)
        out: list[list[Tensor]] = [[] for _ in sequences]
        ends = [[length] for length in LENGTHS]
        ends[-1] = [100, LENGTHS[-1]]
        for turn in range(2 + NUM_DECODES - 1):
            work = []
            for i, length in enumerate(LENGTHS):
                end = ends[i][turn] if turn < len(ends[i]) else length + turn - len(ends[i]) + 1
                if end < length + NUM_DECODES:
                    work.append((i, end))
            work.sort(key=lambda item: item[1] - starts[item[0]] != 1)   # decodes first, as the scheduler has them
            rows = self._step(sequences, tables, starts, work)
            for (i, end), row in zip(work, rows, strict=True):
                if end >= LENGTHS[i]:
                    out[i].append(row.clone())
        return [torch.stack(rows[:NUM_DECODES]) for rows in out]

    def _step(self, sequences: list[list[int]], tables: list[list[int]], starts: list[int], work: list[tuple[int, int]]) -> Tensor:
        from workers.batch import ForwardBatch

        batch = ForwardBatch(token_ids=[], positions=[], slot_mapping=[], query_lens=[], seq_lens=[], page_tables=[], logit_rows=[],
                             carried=[])
        for i, end in work:
            batch.token_ids += sequences[i][starts[i] : end]
            batch.query_lens.append(end - starts[i])
            batch.seq_lens.append(end)
            batch.page_tables.append(tables[i])
            batch.carried.append(-1)
            batch.logit_rows.append(len(batch.token_ids) - 1)
            starts[i] = end
        with torch.inference_mode():
            logits = self.executor._forward(batch)
        torch.cuda.synchronize()
        return logits[: len(work)]


def distance(actual: list[Tensor], wanted: list[Tensor]) -> float:
    """The median over positions: a token that goes to another expert is no measure of the arithmetic."""
    return torch.cat([(a - w).norm(dim=-1) / w.norm(dim=-1) for a, w in zip(actual, wanted, strict=True)]).median().item()


def test_logits_are_as_near_to_float32_as_those_of_transformers(checkpoint: Path) -> None:
    sequences = prompts(4096)
    wide, narrow = (expected(checkpoint, dtype, sequences) for dtype in (torch.float32, torch.bfloat16))
    cut = [slice(length - 1, length - 1 + NUM_DECODES) for length in LENGTHS]
    wide, narrow = ([rows[part] for rows, part in zip(of, cut, strict=True)] for of in (wide, narrow))
    ours = Ours(checkpoint).logits(sequences)
    noise = distance(narrow, wide)
    print(f"\n{checkpoint}: ours {distance(ours, wide):.2e} from float32, transformers in bfloat16 {noise:.2e}")
    assert distance(ours, wide) < NOISE * noise
    for mine, right, theirs in zip(ours, wide, narrow, strict=True):
        top = right.topk(2).values
        is_clear = (top[:, 0] - top[:, 1]) > 2 * NOISE * (theirs - right).abs().amax(-1)
        assert torch.equal(mine.argmax(-1)[is_clear], right.argmax(-1)[is_clear])


def test_graphs_change_nothing(checkpoint: Path) -> None:
    sequences = prompts(4096)
    with_graphs, without = (Ours(checkpoint, use_cuda_graphs=use).logits(sequences) for use in (True, False))
    assert distance(with_graphs, without) < 1e-2


def rounded(x: Tensor) -> Tensor:
    """To e4m3 and back, each row in groups of 128 columns that share a scale: what the products see of their inputs."""
    groups = x.float().unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 448.0
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def plain_fp8_ops() -> Any:
    """The device's operations with fp8 products in plain torch: dequantized weights, rounded inputs, float32 sums."""
    from kernels.block_fp8 import BlockFp8
    from kernels.cuda import CUDA
    from kernels.ops import Experts, Routed

    def make_linear(weight: Tensor | BlockFp8, bias: Tensor | None) -> Any:
        if not isinstance(weight, BlockFp8):
            return CUDA.make_linear(weight, bias)
        wide = weight.dequantized(torch.float32)
        return lambda x: (rounded(x) @ wide.t()).to(x.dtype)

    def make_experts(gate_up: BlockFp8, down: BlockFp8) -> Experts:
        first, second = gate_up.dequantized(torch.float32), down.dequantized(torch.float32)

        def run(x: Tensor, routed: Routed) -> Tensor:
            out = x.new_zeros(*routed.ids.shape, x.shape[1])
            for expert in range(len(first)):
                token, choice = (routed.ids == expert).nonzero(as_tuple=True)
                gate, up = (rounded(x[token]) @ first[expert].t()).chunk(2, -1)
                made = rounded(torch.nn.functional.silu(gate) * up) @ second[expert].t()
                out[token, choice] = (made * routed.weights[token, choice].unsqueeze(1)).to(x.dtype)
            return out

        return Experts(run)

    return replace(CUDA, make_linear=make_linear, make_experts=make_experts)


def test_fp8_products_are_those_of_rounded_inputs_with_dequantized_weights(tmp_path: Path) -> None:
    from workers.random_model import Overrides, write_random_model

    path = write_random_model(tmp_path, "deepseek-v3", Overrides(**SIZES["deepseek-v3"]), seed=2, dtype="bfloat16", full=True, fp8=True)
    sequences = prompts(4096)
    kernels, plain = Ours(path).logits(sequences), Ours(path, use_cuda_graphs=False, ops=plain_fp8_ops()).logits(sequences)
    wide = Ours(path, keeps_fp8=False).logits(sequences)
    print(f"\nfp8 kernels from plain fp8 {distance(kernels, plain):.2e}; from unrounded inputs {distance(kernels, wide):.2e}, "
          f"plain from those {distance(plain, wide):.2e}")
    assert distance(kernels, wide) < 1.2 * distance(plain, wide)
