"""What OpenAI's clients may send, as pydantic models: a field that is not here, or of another type, is refused by its name.

Values that the sampler checks itself (temperature, penalties, …) are only named here: coordinator/sampling.py knows their ranges.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from coordinator.errors import InvalidField

# What OpenAI knows and this farm cannot do: said with the reason, or with what to send instead.
REFUSED = {
    "functions": "deprecated: send tools", "function_call": "deprecated: send tool_choice", "suffix": "is not supported",
    "audio": "is not supported: this model takes text only", "modalities": "is not supported: this model writes text only",
    "prediction": "is not supported", "web_search_options": "is not supported", "reasoning_effort": "is not supported",
    "verbosity": "is not supported", "service_tier": "is not supported: send X-Job-Class",
    "prompt_cache_key": "is not supported: prompts are cached by their tokens", "prompt_cache_retention": "is not supported",
    "safety_identifier": "is not supported: send user or X-Tenant",
}
SAMPLING = ("temperature", "top_p", "n", "seed", "logit_bias", "presence_penalty", "frequency_penalty", "top_k", "min_p",
            "repetition_penalty", "ignore_eos", "guided_grammar", "regular_constraint")
MAX_METADATA = 16


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Asked(_Strict):
    """Common to both endpoints. null means "not given", as OpenAI has it; `user` is taken and changes nothing."""

    model: str
    max_tokens: int | None = None
    stop: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    temperature: Any = None
    top_p: Any = None
    n: Any = None
    seed: int | None = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    top_k: Any = None
    min_p: Any = None
    repetition_penalty: Any = None
    ignore_eos: Any = None
    guided_grammar: Any = None
    regular_constraint: Any = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    background: bool | None = None

    @classmethod
    def read(cls, body: dict[str, Any]) -> Self:
        """Raises InvalidField."""
        for name, reason in REFUSED.items():
            if body.get(name) is not None and name not in cls.model_fields:
                raise InvalidField(name, reason)
        try:
            asked = cls.model_validate({name: value for name, value in body.items() if name not in REFUSED or name in cls.model_fields})
        except ValidationError as error:
            raise _as_invalid_field(error) from None
        if asked.stream_options is not None and not asked.stream:
            raise InvalidField("stream_options", "is allowed only with stream")
        if asked.stream and asked.background:
            raise InvalidField("background", "cannot be combined with stream")
        if asked.metadata and not asked.is_kept:
            raise InvalidField("metadata", "is allowed only with store or background")
        if asked.metadata and len(asked.metadata) > MAX_METADATA:
            raise InvalidField("metadata", f"must hold at most {MAX_METADATA} entries")
        return asked

    @property
    def is_kept(self) -> bool:
        """Whether the answer can be asked for by its id."""
        return bool(self.store or self.background)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> dict[str, Any]:
        """In the words of coordinator/sampling.py, but for the length. OpenAI's answers are sampled unless temperature is 0."""
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if self.seed is not None:
            given["seed"] = self.seed % 2**64
        if self.stop:
            given["stop_sequences"] = _stops(self.stop)
        return {"do_sample": True, "add_spaces_between_special_tokens": False, **given}


class CompletionAsked(Asked):
    """POST /v1/completions. A prompt is text or token ids; a list of either is several prompts."""

    prompt: Any
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None


class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: Any
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def length(self) -> int | None:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidField("max_completion_tokens", f"differs from max_tokens ({self.max_tokens})")
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


def _stops(given: Any) -> Any:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidField("stop", "must be a string or a list of strings")
    return stops


def _as_invalid_field(error: ValidationError) -> InvalidField:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])[:80]
    reasons = {"extra_forbidden": "unknown field", "missing": "is missing"}
    return InvalidField(field, reasons.get(first["type"], first["msg"]))
