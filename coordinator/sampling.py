"""Sampling parameters: LightLLM's names, defaults and ranges, checked the same way for REST, NATS and batch."""

import json
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any

from coordinator import json_schema
from coordinator.errors import InvalidField

MAX_STOP_SEQUENCES = 10
MAX_STOP_TOKENS = 256
MAX_STOP_CHARS = 1024
MAX_ALLOWED_TOKEN_IDS = 256
MAX_N = 8
GREEDY_TEMPERATURE = 1e-5  # below this LightLLM decodes greedily
MAX_LOGIT_BIAS = 1024
MAX_ABS_BIAS = 100.0
MAX_TOP_LOGPROBS = 20
MAX_CONSTRAINT_CHARS = 64 * 1024
MAX_NESTING = 64  # of brackets in a grammar or an expression
CONSTRAINTS = ("guided_json", "guided_grammar", "regular_constraint")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when a sequence ends. Frozen: it travels with the job to every worker.

    `seed` is 64-bit unsigned; a producer fills it in when the user gave none, so that a resumed job draws the same numbers.
    `stop_sequences` holds strings (matched on text, across token borders) and tuples of token ids (matched on tokens).
    `logit_bias` holds (token id, what is added to its logit after penalties); `top_logprobs` is how many of the likeliest tokens are told
    with each output token. At most one constraint holds the answer to a JSON schema (`guided_json`, its text; `{}`: any object), a grammar
    in GBNF (`guided_grammar`) or a regular expression (`regular_constraint`); it also decides where the answer may end.
    """

    best_of: int = 1
    n: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    exponential_decay_length_penalty: tuple[int, float] = (1, 1.0)
    stop_sequences: tuple[str | tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_new_tokens: int = 16
    min_new_tokens: int = 1
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    add_spaces_between_special_tokens: bool = True
    print_eos_token: bool = False
    input_penalty: bool = False
    seed: int | None = field(default=None)
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    guided_json: str = ""
    guided_grammar: str = ""
    regular_constraint: str = ""

    @property
    def constraint(self) -> tuple[str, str] | None:
        """(field, text) of the constraint given, or None."""
        return next(((name, text) for name in CONSTRAINTS if (text := getattr(self, name))), None)

    @property
    def is_guided(self) -> bool:
        return bool(self.guided_json or self.guided_grammar or self.regular_constraint)

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(s for s in self.stop_sequences if isinstance(s, str))

    @property
    def stop_token_runs(self) -> tuple[tuple[int, ...], ...]:
        return tuple(s for s in self.stop_sequences if not isinstance(s, str))

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    def to_wire(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        wire: dict[str, Any] = {}
        for name, default in DEFAULTS.items():
            value = getattr(self, name)
            if value != default:
                wire[name] = value
        return wire

    @classmethod
    def parse(cls, given: Any, defaults: "SamplingParams | None" = None) -> "SamplingParams":
        """Check user input `given` (a mapping) and fill in `defaults`.

        Raises InvalidField naming the first field that is unknown, of a wrong type or out of range.
        """
        if not isinstance(given, dict):
            raise InvalidField("parameters", f"must be an object, not {type(given).__name__}")
        values: dict[str, Any] = {name: getattr(defaults, name) for name in DEFAULTS} if defaults else {}
        for name, value in given.items():
            if name not in DEFAULTS:
                raise InvalidField(str(name), "unknown parameter")
            if value is None:
                continue  # null means "the default", as in LightLLM's pydantic models
            values[name] = _CHECKS[name](name, value)
        if "best_of" in given and given["best_of"] is not None:
            if given.get("n") is None:
                values["n"] = values["best_of"]
        elif given.get("n") is not None:
            values["best_of"] = values["n"]
        params = cls(**values)
        _check_together(params)
        return params


def _check_together(p: SamplingParams) -> None:
    if p.n != p.best_of:
        raise InvalidField("n", f"must equal best_of ({p.best_of}), got {p.n}")
    if p.min_new_tokens > p.max_new_tokens:
        raise InvalidField("min_new_tokens", f"must be at most max_new_tokens ({p.max_new_tokens}), got {p.min_new_tokens}")
    if p.is_guided:
        _check_guided(p)


def _check_guided(p: SamplingParams) -> None:
    given = [name for name in CONSTRAINTS if getattr(p, name)]
    if len(given) > 1:
        raise InvalidField(given[1], f"cannot be combined with {given[0]}")
    clashes = {"allowed_token_ids": bool(p.allowed_token_ids), "ignore_eos": p.ignore_eos, "min_new_tokens": p.min_new_tokens > 1}
    for name, is_given in clashes.items():
        if is_given:
            raise InvalidField(name, f"cannot be combined with {given[0]}, which decides what may be said and where it ends")


def _integer(low: int, high: int | None = None) -> Any:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidField(name, f"must be an integer, got {value!r:.80}")
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise InvalidField(name, f"must be {bounds}, got {value}")
        return value

    return check


def _number(low: float, high: float = float("inf"), *, above: bool = False) -> Any:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise InvalidField(name, f"must be a finite number, got {value!r:.80}")
        if value < low or value > high or (above and value == low):
            least = f"above {low:g}" if above else f"at least {low:g}"
            raise InvalidField(name, f"must be {least}" + ("" if high == float("inf") else f" and at most {high:g}") + f", got {value!r}")
        return float(value)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidField(name, f"must be true or false, got {value!r:.80}")
    return value


def _top_k(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and (value == -1 or value >= 1):
        return value
    raise InvalidField(name, f"must be -1 (off) or an integer of at least 1, got {value!r:.80}")


def _decay(name: str, value: Any) -> tuple[int, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InvalidField(name, "must be [start index, factor]")
    return _integer(0)(name, value[0]), _number(1.0)(name, value[1])


def _token_ids(limit: int) -> Any:
    def check(name: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(t, int) and not isinstance(t, bool) and 0 <= t < 2**31 for t in value):
            raise InvalidField(name, "must be a list of token ids (integers of at least 0)")
        if len(value) > limit:
            raise InvalidField(name, f"must hold at most {limit} token ids, got {len(value)}")
        return tuple(value)

    return check


def _stop_sequences(name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple):
        raise InvalidField(name, "must be a string, a list of strings or a list of token id lists")
    if len(given) > MAX_STOP_SEQUENCES:
        raise InvalidField(name, f"must hold at most {MAX_STOP_SEQUENCES} sequences, got {len(given)}")
    stops: list[str | tuple[int, ...]] = []
    for stop in given:
        if not stop:
            raise InvalidField(name, "must not hold an empty sequence")
        if isinstance(stop, str):
            if len(stop) > MAX_STOP_CHARS:
                raise InvalidField(name, f"a stop string has at most {MAX_STOP_CHARS} characters, got {len(stop)}")
            stops.append(stop)
        else:
            stops.append(_token_ids(MAX_STOP_TOKENS)(name, stop))
    return tuple(stops)


def _logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """From {token id: bias}, where ids may be strings as in JSON, or a list of pairs."""
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise InvalidField(name, "must map token ids to biases")
    if len(pairs) > MAX_LOGIT_BIAS:
        raise InvalidField(name, f"must hold at most {MAX_LOGIT_BIAS} tokens, got {len(pairs)}")
    ids = [int(token) if isinstance(token, str) and token.isdecimal() and len(token) < 11 else token for token, _ in pairs]
    _token_ids(MAX_LOGIT_BIAS)(name, ids)
    if len(set(ids)) != len(ids):
        raise InvalidField(name, "names a token twice")
    return tuple(sorted((token, _number(-MAX_ABS_BIAS, MAX_ABS_BIAS)(name, bias)) for token, (_, bias) in zip(ids, pairs, strict=True)))


def _constraint(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidField(name, f"must be a string, got {type(value).__name__}")
    if len(value) > MAX_CONSTRAINT_CHARS:
        raise InvalidField(name, f"has at most {MAX_CONSTRAINT_CHARS} characters, got {len(value)}")
    depth = deepest = 0
    for char in value:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING and name != "guided_json":
        raise InvalidField(name, f"has brackets nested deeper than {MAX_NESTING}")
    return value


def _guided_json(name: str, value: Any) -> str:
    """Text as it is given; a schema that comes as an object becomes text."""
    text = _constraint(name, json.dumps(value) if isinstance(value, dict) else value)
    if text:
        json_schema.checked(text)
    return text


_CHECKS: dict[str, Any] = {
    "best_of": _integer(1, MAX_N),
    "n": _integer(1, MAX_N),
    "do_sample": _flag,
    "temperature": _number(0.0),
    "top_p": _number(0.0, 1.0, above=True),
    "top_k": _top_k,
    "min_p": _number(0.0, 1.0),
    "presence_penalty": _number(-2.0),     # OpenAI's lower bound; LightLLM's range has no upper one
    "frequency_penalty": _number(-2.0),
    "repetition_penalty": _number(1.0),
    "exponential_decay_length_penalty": _decay,
    "stop_sequences": _stop_sequences,
    "allowed_token_ids": _token_ids(MAX_ALLOWED_TOKEN_IDS),
    "ignore_eos": _flag,
    "max_new_tokens": _integer(1),
    "min_new_tokens": _integer(1),
    "skip_special_tokens": _flag,
    "add_special_tokens": _flag,
    "add_spaces_between_special_tokens": _flag,
    "print_eos_token": _flag,
    "input_penalty": _flag,
    "seed": _integer(0, 2**64 - 1),
    "logit_bias": _logit_bias,
    "top_logprobs": _integer(0, MAX_TOP_LOGPROBS),
    "guided_json": _guided_json,
    "guided_grammar": _constraint,
    "regular_constraint": _constraint,
}
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(SamplingParams)}
