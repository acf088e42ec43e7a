"""The next tokens of a batch: largest logits, draws behind filters, penalties.

A figure of `draw` is of both its launches, the survey of all logits included: the one that costs bytes. What sorting would keep is the
reference; token ids are compared, so that a neighbour drawn because float32 rounds otherwise is a small error and any other
token a large one. `flat` rows are what random weights give: no group of columns can be left out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernel_case import KernelCase, Prepared
from kernels.draw import draw
from kernels.penalize import Config as PenalizeConfig
from kernels.penalize import count_tokens, penalize
from kernels.row_params import COUNT_ROW, INDEX, WORDS, RowParams
from kernels.survey import Config, survey
from workers.philox import uniforms

GPU = torch.device("cuda")
COLD_BYTES = 200 << 20       # between two uses of one input set: more than the L2 cache
V2_LITE, V3, LARGE = 102_400, 129_280, 131_072
LIKE_TEXT, FLAT = 5.0, 1.0   # standard deviation of logits: about 150 tokens hold 0.9 of the mass, or 80,000 do
ALL_FILTERS = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
DRAW_CONFIGS = [Config(block=block, survey_warps=survey_warps, draw_warps=draw_warps) for block in (2048, 4096, 1024)
                for survey_warps in (4, 8, 2) for draw_warps in (16, 8)]
PENALIZE_CONFIGS = [PenalizeConfig(block=block, num_warps=num_warps) for block in (1024, 2048, 4096) for num_warps in (2, 4, 8)]


def cases() -> list[KernelCase]:
    return [
        *(_draw_case("greedy", V2_LITE, rows, None) for rows in (1, 16, 64, 128, 256)),
        _draw_case("greedy", V3, 128, None),
        *(_draw_case("temperature", V2_LITE, rows, {"temperature": 0.8}) for rows in (1, 128)),
        *(_draw_case("all filters", vocab, rows, ALL_FILTERS, bar="<= 300 us" if rows == 128 else "")
          for vocab, rows in ((V2_LITE, 1), (V2_LITE, 128), (LARGE, 128), (LARGE, 256))),
        *(_draw_case("top_p 0.9", LARGE, rows, {"top_p": 0.9}) for rows in (1, 128)),
        *(_draw_case("top_p 0.9, flat", LARGE, rows, {"top_p": 0.9}, scale=FLAT, bar="<= 300 us" if rows == 128 else "")
          for rows in (1, 128)),
        *(_penalize_case(LARGE, rows) for rows in (1, 128)),
    ]


def offline_calls() -> list[Callable[[], object]]:
    logits, counts = torch.empty(128, V3), torch.empty(128, V3, dtype=torch.int16)
    words, eos = torch.empty(128 * WORDS.value, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    return [
        lambda: draw(logits, survey(logits, 128)),
        lambda: draw(logits, survey(logits, 128, words), words, counts),
        lambda: draw(logits[:, :V2_LITE].contiguous(), survey(logits[:, :V2_LITE].contiguous(), 128, words), words),
        lambda: penalize(logits, 128, words, counts, eos),
        lambda: count_tokens(counts, 3, words, 0, 100),
    ]


# ---- draws ----


def _draw_case(name: str, vocab_size: int, num_rows: int, filters: dict[str, Any] | None, scale: float = LIKE_TEXT,
               bar: str = "") -> KernelCase:
    num_bytes = 4 * num_rows * vocab_size

    def setup() -> Prepared:
        sets = [torch.randn(num_rows, vocab_size, device=GPU) * scale for _ in range(max(2, -(-COLD_BYTES // num_bytes)))]
        words = None if filters is None else _words([RowParams(is_sampled=True, seed=row, **filters) for row in range(num_rows)])

        def run(config: Config | None, index: int) -> Tensor:
            return draw(sets[index], survey(sets[index], num_rows, words, config=config), words)[0]

        def of_set(call: Callable[[Tensor], Tensor], index: int) -> Tensor:
            return call(sets[index])

        if filters is None:
            return Prepared(run=run, reference=lambda index: sets[index].argmax(-1), num_sets=len(sets), configs=DRAW_CONFIGS,
                            peers={"torch argmax, logsumexp": partial(of_set, _greedy)})
        numbers = torch.from_numpy(uniforms(range(num_rows), [0] * num_rows)).to(GPU).unsqueeze(1)
        settings = filters

        def by_sorting(logits: Tensor) -> Tensor:
            return _by_sorting(logits, numbers, **settings)

        return Prepared(run=run, reference=lambda index: by_sorting(sets[index].double()), num_sets=len(sets), configs=DRAW_CONFIGS,
                        peers={"torch sort": partial(of_set, by_sorting)})

    return KernelCase(kernel="draw", shape=f"{name}, V {vocab_size}, B {num_rows}", num_bytes=num_bytes, num_flops=0, rate="fp32",
                      setup=setup, bar=bar)


def _greedy(logits: Tensor) -> Tensor:
    largest, ids = logits.max(-1)
    return ids + 0 * (largest - logits.logsumexp(-1)).long()


def _by_sorting(logits: Tensor, numbers: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                min_p: float = 0.0) -> Tensor:
    """Token ids [B] at uniform numbers [B, 1]."""
    probs = (logits / temperature).softmax(-1)
    ordered = probs.sort(descending=True).values
    cumulative = ordered.cumsum(-1)
    last = (top_k or probs.shape[1]) - 1
    rank = (cumulative < top_p * cumulative[:, last : last + 1]).sum(-1, keepdim=True).clamp(max=last)
    threshold = torch.maximum(ordered.gather(1, rank if top_p < 1 else torch.full_like(rank, last)), min_p * ordered[:, :1])
    cdf = probs.where(probs >= threshold, 0.0).cumsum(-1)
    return (cdf <= numbers * cdf[:, -1:]).sum(-1).clamp(max=probs.shape[1] - 1)


def _words(rows: list[RowParams]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(row.pack() for row in rows)), dtype=torch.int64).to(GPU)


# ---- penalties ----


def _penalize_case(vocab_size: int, num_rows: int) -> KernelCase:
    """A thousand tokens said by each row. The penalties are such that they change nothing: every run gives the same."""
    num_said = 1000
    num_bytes = num_rows * (2 * vocab_size + 2 * 32 * num_said)  # counts; a sector read and written for each token said

    def setup() -> Prepared:
        sets = []
        for _ in range(max(2, -(-COLD_BYTES // (6 * num_rows * vocab_size)))):
            counts = torch.zeros(num_rows, vocab_size, dtype=torch.int16, device=GPU)
            counts.scatter_(1, torch.randint(vocab_size, (num_rows, num_said), device=GPU), 1)
            sets.append((torch.randn(num_rows, vocab_size, device=GPU), counts))
        words = _words([RowParams(is_adjusted=True, min_tokens=5)] * num_rows)
        words.view(num_rows, -1)[:, COUNT_ROW.value] = torch.arange(num_rows, device=GPU)
        words.view(num_rows, -1)[:, INDEX.value] = 9
        eos = torch.tensor([1], device=GPU)

        def run(config: PenalizeConfig | None, index: int) -> Tensor:
            logits, counts = sets[index]
            penalize(logits, num_rows, words, counts, eos, config=config)
            return logits

        expected = [logits.clone() for logits, _ in sets]
        return Prepared(run=run, reference=lambda index: expected[index], num_sets=len(sets), configs=PENALIZE_CONFIGS)

    return KernelCase(kernel="penalize", shape=f"{num_said} tokens said, V {vocab_size}, B {num_rows}", num_bytes=num_bytes, num_flops=0,
                      rate="fp32", setup=setup)
