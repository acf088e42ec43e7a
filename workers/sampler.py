"""Draw the next token of each sequence from its logits. Every row is computed by itself: batch mates never change a result.

Greedy takes the largest logit after penalties and masks (`penalties`). Sampling goes on with temperature, top_k, top_p over what
top_k left, min_p (`token_filters`), and one uniform number per (seed, output index) (`philox`) put through the inverse of the
cumulative distribution in vocabulary order. The log probability returned is of the distribution after penalties and masks but
before temperature and the filters: what the model thought, comparable between greedy and sampled requests. So are those of the likeliest
tokens, for sequences that ask for them (`Sequence.tops`).
"""

import zlib
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from math import isfinite

import torch
from torch import Tensor

from coordinator.messages import TopLogprobs
from coordinator.sampling import MAX_TOP_LOGPROBS, SamplingParams
from workers.penalties import TokenCounts, adjust, needs_adjusting
from workers.philox import uniforms
from workers.sequence import Sequence
from workers.token_filters import is_filtered, keep
from workers.vocabulary_blocks import argmax, first_above, inverse_cdf


class Sampler:
    """Keeps nothing but per-sequence token counts, in `Sequence.sampling`."""

    def __init__(self, eos_ids: Seq[int]) -> None:
        self._eos_ids = tuple(eos_ids)

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: list[Sequence],
               newest: Mapping[Sequence, int] | None = None) -> tuple[list[int], list[float]]:
        """One token id and its log probability per row.

        logits  [num_seqs, vocab_size] fp32; changed in place
        newest  the last token of those sequences that do not know it yet (`Sequence.num_in_flight`)
        """
        if not sequences:
            return [], []
        self._adjust(logits, sequences, newest or {})
        largest, top_ids = argmax(logits)
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
        _tell_tops(logits, log_normaliser, sequences)
        return token_ids.flatten().tolist(), logprobs.flatten().tolist()

    def _adjust(self, logits: Tensor, sequences: list[Sequence], newest: Mapping[Sequence, int]) -> None:
        if not any(needs_adjusting(sequence.params) for sequence in sequences):
            return
        counts: dict[int, TokenCounts] = {}
        for row, sequence in enumerate(sequences):
            if sequence.params.has_penalties:
                if sequence.sampling is None:
                    sequence.sampling = TokenCounts(0 if sequence.params.input_penalty else sequence.num_prompt)
                sequence.sampling.update([*sequence.token_ids, newest[sequence]] if sequence in newest else sequence.token_ids)
                counts[row] = sequence.sampling
        adjust(logits, sequences, counts, self._eos_ids)


def _tell_tops(logits: Tensor, log_normaliser: Tensor, sequences: list[Sequence]) -> None:
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.top_logprobs]
    if rows:
        found, found_ids = logits[rows].topk(min(MAX_TOP_LOGPROBS, logits.shape[1]))
        for row, logprobs, token_ids in zip(rows, (found - log_normaliser[rows]).tolist(), found_ids.tolist(), strict=True):
            told = top_logprobs(sequences[row].params.top_logprobs, token_ids, logprobs)
            sequences[row].tops.append(lambda told=told: told)  # type: ignore[misc]


def top_logprobs(count: int, token_ids: Seq[int], logprobs: Seq[float]) -> TopLogprobs:
    """The first `count`, fewer if masks leave fewer."""
    return tuple((token_id, logprob) for token_id, logprob in zip(token_ids[:count], logprobs[:count], strict=True) if isfinite(logprob))


def _draw(logits: Tensor, probs: Tensor, rows: Tensor, sequences: list[Sequence]) -> Tensor:
    """Token ids [num_rows, 1] for the rows that sample. `probs` are the logits' at temperature 1; they may be overwritten."""
    params = [sequence.params for sequence in sequences]
    numbers = uniforms([_seed(sequence) for sequence in sequences], [sequence.num_output for sequence in sequences])
    draws = torch.from_numpy(numbers).to(logits.device).unsqueeze(1)
    if len(rows) != len(logits):
        logits, probs = logits[rows], probs[rows]
    if any(p.temperature != 1.0 for p in params):
        temperature = torch.tensor([[p.temperature] for p in params], device=logits.device)
        probs = torch.div(logits, temperature, out=probs).softmax(-1)
    filtered = [row for row, p in enumerate(params) if is_filtered(p)]
    if len(filtered) == len(params):
        return _draw_filtered(probs, params, draws)
    token_ids = inverse_cdf(probs, draws)
    if filtered:
        chosen = torch.tensor(filtered, device=logits.device)
        token_ids[chosen] = _draw_filtered(probs[chosen], [params[row] for row in filtered], draws[chosen])
    return token_ids


def _draw_filtered(probs: Tensor, params: list[SamplingParams], draws: Tensor) -> Tensor:
    weights, token_ids = keep(probs, params)
    cdf = weights.double().cumsum(-1)  # in order, so that zeros in between change nothing: more candidates, same draw
    return token_ids.gather(1, first_above(cdf, draws * cdf[:, -1:]))


def _seed(sequence: Sequence) -> int:
    """Producers fill the seed in; without one it still has to be the same wherever the job goes on."""
    return zlib.crc32(sequence.job_id.encode()) if sequence.params.seed is None else sequence.params.seed
