"""Draw the next token of each sequence from its logits. Every row is computed by itself: batch mates never change a result.

Greedy takes the largest logit after penalties and masks (`penalties`). Sampling goes on with temperature, top_k, top_p over what
top_k left, min_p, and one uniform number per (seed, output index) (`philox`) put through the inverse of the cumulative
distribution in vocabulary order. The log probability returned is of the distribution after penalties and masks but before
temperature and the filters: what the model thought, comparable between greedy and sampled requests.

Vocabularies are searched in blocks of `BLOCK`: a maximum or a sum per block is one fast pass, the rest happens on small arrays,
and nothing ever sorts a whole vocabulary.
"""

import zlib
from collections.abc import Sequence as Seq
from math import inf

import torch
from torch import Tensor

from workers.penalties import TokenCounts, adjust, needs_adjusting
from workers.philox import uniforms
from workers.sequence import Sequence

BLOCK = 64


class Sampler:
    """Keeps nothing but per-sequence token counts, in `Sequence.sampling`."""

    def __init__(self, eos_ids: Seq[int]) -> None:
        self._eos_ids = tuple(eos_ids)

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: list[Sequence]) -> tuple[list[int], list[float]]:
        """One token id and its log probability per row.

        logits  [num_seqs, vocab_size] fp32; changed in place
        """
        if not sequences:
            return [], []
        self._adjust(logits, sequences)
        largest, top_ids = _argmax(logits)
        # One fused softmax also yields the normaliser: at the maximum the probability is 1 / sum(exp(logit - max)).
        probs = logits.softmax(-1)
        log_normaliser = largest - probs.gather(1, top_ids).log()
        token_ids = top_ids
        drawn_rows = [row for row, sequence in enumerate(sequences) if not sequence.params.is_greedy]
        if drawn_rows:
            token_ids = top_ids.clone()
            rows = torch.tensor(drawn_rows, device=logits.device)
            token_ids[rows] = _draw(logits, probs, rows, [sequences[row] for row in drawn_rows])
        logprobs = logits.gather(1, token_ids) - log_normaliser
        return token_ids.flatten().tolist(), logprobs.flatten().tolist()

    def _adjust(self, logits: Tensor, sequences: list[Sequence]) -> None:
        if not any(needs_adjusting(sequence.params) for sequence in sequences):
            return
        counts: dict[int, TokenCounts] = {}
        for row, sequence in enumerate(sequences):
            if sequence.params.has_penalties:
                if sequence.sampling is None:
                    sequence.sampling = TokenCounts(0 if sequence.params.input_penalty else sequence.num_prompt)
                sequence.sampling.update(sequence.token_ids)
                counts[row] = sequence.sampling
        adjust(logits, sequences, counts, self._eos_ids)


def _draw(logits: Tensor, probs: Tensor, rows: Tensor, sequences: list[Sequence]) -> Tensor:
    """Token ids [num_rows, 1] for the rows that sample; `probs` are the logits' at temperature 1."""
    params = [sequence.params for sequence in sequences]
    device = logits.device
    numbers = uniforms([_seed(sequence) for sequence in sequences], [sequence.num_output for sequence in sequences])
    draws = torch.from_numpy(numbers).to(device).unsqueeze(1)
    if len(rows) != len(logits):
        logits, probs = logits[rows], probs[rows]
    if any(p.temperature != 1.0 for p in params):
        temperature = torch.tensor([p.temperature for p in params], device=device).unsqueeze(1)
        probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    filtered = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0]
    if not filtered:
        return _inverse_cdf(probs, draws)
    if len(filtered) == len(params):
        weights, token_ids = _filter(probs, sequences)
        return token_ids.gather(1, _inverse_cdf(weights, draws))
    chosen = torch.tensor(filtered, device=device)
    weights, token_ids = _filter(probs[chosen], [sequences[row] for row in filtered])
    result = _inverse_cdf(probs, draws)
    result[chosen] = token_ids.gather(1, _inverse_cdf(weights, draws[chosen]))
    return result


def _filter(probs: Tensor, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
    """What top_k, top_p and min_p leave.

    probs    [n, vocab_size]
    returns  weights [n, k] (0 where filtered or padding) and their token ids [n, k], in vocabulary order
    """
    candidates, token_ids = _compress(probs, _floor(probs, sequences))
    top_k = _column([sequence.params.top_k if sequence.params.top_k > 0 else probs.shape[1] for sequence in sequences], probs)
    top_p = _column([sequence.params.top_p for sequence in sequences], probs)
    min_p = _column([sequence.params.min_p for sequence in sequences], probs)
    ordered, order = candidates.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[1], device=probs.device)
    ordered = ordered.where(rank < top_k, 0.0).double()
    total = ordered.cumsum(-1)
    is_kept = (total - ordered < top_p * total[:, -1:]) & (ordered >= min_p * ordered[:, :1])
    kept = torch.zeros_like(candidates).scatter_(1, order, ordered.where(is_kept, 0.0).to(candidates.dtype))
    return kept, token_ids


def _floor(probs: Tensor, sequences: list[Sequence]) -> Tensor:
    """A probability [n, 1] below which no token can survive the filters: exact bounds, cheap to find.

    top_k: at least k tokens are as large as the k-th largest block maximum.
    top_p: tokens below (1 - top_p) * mass / vocab_size have together less than the share to drop, and so has any tail of them;
           `mass` is what top_k leaves, at least k / vocab_size.
    """
    vocab_size = probs.shape[1]
    block_max, _ = _by_block(probs).sort(-1, descending=True)
    num_blocks = block_max.shape[1]
    top_k = [sequence.params.top_k if sequence.params.top_k > 0 else vocab_size for sequence in sequences]
    by_rank = block_max.gather(1, torch.tensor([[min(k, num_blocks) - 1] for k in top_k], device=probs.device))
    by_rank = by_rank.where(_column(top_k, probs) <= num_blocks, 0.0)
    by_mass = _column([(1.0 - sequence.params.top_p) * min(1.0, k / vocab_size) / vocab_size
                       for sequence, k in zip(sequences, top_k, strict=True)], probs)
    by_peak = _column([sequence.params.min_p for sequence in sequences], probs) * block_max[:, :1]
    slack = 1.0 - 1e-5  # the bounds hold for real numbers; leave room for rounding
    return torch.maximum(torch.maximum(by_rank, by_mass), by_peak).mul_(slack).to(probs.dtype)


def _compress(probs: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of at least `floor` [n, 1], in vocabulary order, padded with weight 0 to the longest row: ([n, k], [n, k])."""
    rows, columns = (probs >= floor).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(probs))
    slots = torch.arange(len(rows), device=probs.device) - (counts.cumsum(0) - counts)[rows]
    width = max(1, int(counts.max()))  # a row of NaN has no candidates
    weights = probs.new_zeros(len(probs), width)
    token_ids = torch.zeros(len(probs), width, dtype=torch.int64, device=probs.device)
    weights[rows, slots] = probs[rows, columns]
    token_ids[rows, slots] = columns
    return weights, token_ids


def _inverse_cdf(weights: Tensor, draws: Tensor) -> Tensor:
    """Positions [n, 1] where the cumulative sum of `weights` [n, m] first exceeds draws [n, 1] * the row's sum.

    First by block, then within it. Never a position of weight 0.
    """
    block_cdf = _block_sums(weights).double().cumsum(-1)
    target = draws * block_cdf[:, -1:]
    block = _first_above(block_cdf, target)
    before = block_cdf.gather(1, (block - 1).clamp(min=0)).where(block > 0, 0.0)
    columns, inside = _columns_of(block, weights)
    cdf = inside.double().cumsum(-1)
    return columns.gather(1, _first_above(cdf, target - before))


def _first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """First position whose cdf exceeds the target; where rounding left none, the first that reaches the full sum."""
    return torch.minimum((cdf <= target).sum(-1, keepdim=True), (cdf < cdf[:, -1:]).sum(-1, keepdim=True))


def _argmax(values: Tensor) -> tuple[Tensor, Tensor]:
    """(largest value, its first position), each [n, 1]. By block: several times faster than torch.argmax on a CPU."""
    largest, block = _by_block(values).max(-1, keepdim=True)
    columns, inside = _columns_of(block, values, -inf)
    return largest, columns.gather(1, inside.argmax(-1, keepdim=True))


def _columns_of(block: Tensor, values: Tensor, padding: float = 0.0) -> tuple[Tensor, Tensor]:
    """Column numbers and values of one block per row: ([n, BLOCK], [n, BLOCK]); beyond the last column `padding`."""
    columns = block * BLOCK + torch.arange(BLOCK, device=values.device)
    is_real = columns < values.shape[1]
    columns = columns.clamp(max=values.shape[1] - 1)
    return columns, values.gather(1, columns).where(is_real, padding)


def _by_block(values: Tensor) -> Tensor:
    """The maximum of each block [n, num_blocks]; the last block may be short."""
    whole = values.shape[1] // BLOCK * BLOCK
    parts = [values[:, :whole].view(len(values), -1, BLOCK).amax(-1)] if whole else []
    if whole < values.shape[1]:
        parts.append(values[:, whole:].amax(-1, keepdim=True))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _block_sums(values: Tensor) -> Tensor:
    whole = values.shape[1] // BLOCK * BLOCK
    parts = [values[:, :whole].view(len(values), -1, BLOCK).sum(-1)] if whole else []
    if whole < values.shape[1]:
        parts.append(values[:, whole:].sum(-1, keepdim=True))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _column(values: Seq[float], like: Tensor) -> Tensor:
    """Per-row numbers as [n, 1] float64, where `like` lives."""
    return torch.tensor(values, dtype=torch.float64, device=like.device).unsqueeze(1)


def _seed(sequence: Sequence) -> int:
    """Producers fill the seed in; without one it still has to be the same wherever the job goes on."""
    return zlib.crc32(sequence.job_id.encode()) if sequence.params.seed is None else sequence.params.seed
