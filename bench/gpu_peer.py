"""The peer on a GPU: transformers with random weights of the same shape, its plain forward pass step after step."""

from statistics import median
from time import perf_counter
from typing import Any

import torch

from bench.engine_figures import EngineFigure

PREFILL_ROUNDS, DECODE_STEPS, WARM_STEPS = 4, 12, 3
NAME = "transformers"


class TransformersOnGpu:
    """`config` is a config.json. Weights are drawn on the device in bfloat16; quantized models are not for it."""

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        made = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "architectures"})
        with torch.device("cuda"):
            self._model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).eval()
        self._vocab_size = config["vocab_size"]

    @torch.inference_mode()
    def prefill(self, batch: int, length: int) -> EngineFigure:
        """Prompts of `length` tokens, logits of their last positions only."""
        seconds = []
        for _ in range(PREFILL_ROUNDS):
            token_ids = self._tokens(batch, length)
            torch.cuda.synchronize()
            started = perf_counter()
            self._model(token_ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()
            seconds.append(perf_counter() - started)
        step_s = median(seconds[1:])
        return EngineFigure(kind=f"prefill by {NAME}", name=f"{batch} x {length}", batch=batch, context=length, step_ms=step_s * 1e3,
                            tok_s=batch * length / step_s)

    @torch.inference_mode()
    def decode(self, batch: int, context: int) -> EngineFigure:
        """Steps over a growing cache, the next tokens fetched to the host as a server must."""
        out = self._model(self._tokens(batch, context), use_cache=True, logits_to_keep=1)
        seconds = []
        for _ in range(WARM_STEPS + DECODE_STEPS):
            started = perf_counter()
            out = self._model(self._tokens(batch, 1), past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            out.logits.argmax(-1).tolist()
            seconds.append(perf_counter() - started)
        step_s = median(seconds[WARM_STEPS:])
        return EngineFigure(kind=f"decode by {NAME}", name=f"batch {batch}, context {context}", batch=batch, context=context,
                            step_ms=step_s * 1e3, tok_s=batch / step_s)

    def _tokens(self, batch: int, length: int) -> torch.Tensor:
        return torch.randint(self._vocab_size, (batch, length), device="cuda")
