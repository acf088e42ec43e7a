"""The peer: the same checkpoint under Hugging Face transformers, measured on the same machine with the same number of threads."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging


class TransformersPeer:
    """One model in fp32. Nothing else is asked of it than greedy tokens, so no logits processor slows it down."""

    def __init__(self, model_dir: Path, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        transformers_logging.disable_progress_bar()  # ours is on the screen
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._model.generation_config.eos_token_id = None  # go on to the last token, as the farm is told to
        self._model.generation_config.do_sample = False

    def generate(self, prompt_ids: Sequence[int], num_tokens: int) -> tuple[float, tuple[int, ...]]:
        """Seconds for the prompt and `num_tokens` greedy tokens, and their ids."""
        inputs = torch.tensor([list(prompt_ids)])
        with torch.inference_mode():
            started = perf_counter()
            output = self._model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens)
            elapsed_s = perf_counter() - started
        new_ids = tuple(output[0, len(prompt_ids) :].tolist())
        if len(new_ids) != num_tokens:
            raise RuntimeError(f"transformers generated {len(new_ids)} tokens, not {num_tokens}")
        return elapsed_s, new_ids

    def prefill(self, prompt_ids: Sequence[int]) -> float:
        """Seconds from the prompt to the first token's id: one forward pass that keeps the cache, logits of the last position only."""
        inputs = torch.tensor([list(prompt_ids)])
        with torch.inference_mode():
            started = perf_counter()
            output = self._model(inputs, use_cache=True, logits_to_keep=1)
            int(output.logits[0, -1].argmax())
            return perf_counter() - started
