"""Turn what a user sent into prompt tokens and sampling parameters that the farm can honour, or say which field it cannot. No I/O."""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coordinator.errors import ConfigError, InvalidField
from coordinator.sampling import SamplingParams
from coordinator.tokenizer import LONG_TEXT_CHARS, Tokenizer, read_json

MODEL_DEFAULTS = ("do_sample", "temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """The limits of one model behind one door. Methods raise InvalidField."""

    tokenizer: Tokenizer
    defaults: SamplingParams
    max_req_total_len: int

    def params(self, given: Any) -> SamplingParams:
        """Parameters as a user wrote them, over the model's own defaults. Token ids in them must exist."""
        params = SamplingParams.parse(given, self.defaults)
        for run in params.stop_token_runs:
            self.check_ids("stop_sequences", run)
        self.check_ids("allowed_token_ids", params.allowed_token_ids)
        return params

    async def prompt(self, inputs: Any, params: SamplingParams, *, field: str = "inputs") -> tuple[int, ...]:
        """Token ids of a prompt given as text or as ids, within all limits."""
        prompt_ids = await self.encode(inputs, params, field=field)
        self.check_length(len(prompt_ids), params, field=field)
        return prompt_ids

    def check_length(self, num_tokens: int, params: SamplingParams, *, field: str) -> None:
        limit = self.max_req_total_len
        if num_tokens >= limit:
            raise InvalidField(field, f"prompt of {num_tokens} tokens leaves no room for output: the limit is {limit} "
                                      "(--max_req_total_len, or the model's positions)")
        if num_tokens + params.max_new_tokens > limit:
            raise InvalidField("max_new_tokens", f"prompt of {num_tokens} tokens and max_new_tokens {params.max_new_tokens} are over "
                                                 f"{limit} (--max_req_total_len, or the model's positions): at most {limit - num_tokens}")

    async def encode(self, inputs: Any, params: SamplingParams, *, field: str = "inputs") -> tuple[int, ...]:
        if not isinstance(inputs, str | list):
            raise InvalidField(field, f"must be a string or a list of token ids, not {_json_type(inputs)}")
        if not inputs:
            raise InvalidField(field, "must not be empty")
        if isinstance(inputs, list):
            self.check_ids(field, inputs)
            return tuple(inputs)
        if len(inputs) < LONG_TEXT_CHARS:
            prompt_ids = self.tokenizer.encode(inputs, params.add_special_tokens)
        else:  # tens of milliseconds for a long document: other requests go on
            prompt_ids = await asyncio.to_thread(self.tokenizer.encode, inputs, params.add_special_tokens)
        if not prompt_ids:
            raise InvalidField(field, "has no tokens")
        return tuple(prompt_ids)

    def check_ids(self, field: str, ids: Any) -> None:
        vocab_size = self.tokenizer.vocab_size
        for token_id in ids:
            if type(token_id) is not int:
                raise InvalidField(field, f"must hold only token ids (integers), got {token_id!r:.80}")
            if not 0 <= token_id < vocab_size:
                raise InvalidField(field, f"token id {token_id} is not in the vocabulary of {vocab_size} tokens")


def model_defaults(model_dir: str | Path) -> SamplingParams:
    """What generation_config.json says of sampling. Raises ConfigError for a value that LightLLM's ranges do not allow."""
    path = Path(model_dir) / "generation_config.json"
    config = read_json(path)
    given = {name: config[name] for name in MODEL_DEFAULTS if config.get(name) is not None}
    if given.get("top_k") == 0:  # how transformers writes "off"
        given["top_k"] = -1
    try:
        return SamplingParams.parse(given)
    except InvalidField as error:
        raise ConfigError(f"{path}: {error}") from None


def longest_request(max_req_total_len: int, model_dir: str | Path) -> int:
    """Most tokens of one request: the setting, or the positions that the model has if those are fewer."""
    positions = read_json(Path(model_dir) / "config.json").get("max_position_embeddings")
    return min(max_req_total_len, positions) if isinstance(positions, int) else max_req_total_len


def split(params: SamplingParams, seed: int) -> list[SamplingParams]:
    """One set of parameters per answer: n of them, each with a seed of its own."""
    first = params.seed if params.seed is not None else seed
    return [replace(params, n=1, best_of=1, seed=(first + i) % 2**64) for i in range(params.n)]


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    return {bool: "a boolean", int: "a number", float: "a number", dict: "an object", list: "a list"}.get(type(value), "a string")
