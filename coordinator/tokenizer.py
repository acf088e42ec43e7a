"""Text to token ids and back, the same in producers and in workers. Loads tokenizer.json on the `tokenizers` package alone.

What the folder says of special tokens (tokenizer_config.json, special_tokens_map.json) is applied as transformers' AutoTokenizer (5.x)
applies it, so the ids are equal; tokenizer.json itself is taken as it stands: whether BOS is put in front is decided by its
post-processor, not by `add_bos_token`. Code from a model folder is never run.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from coordinator.detokenizer import IncrementalDetokenizer, Pieces, pieces_factory
from coordinator.errors import ConfigError, InvalidField
from coordinator.stop_strings import StopStringMatcher

__all__ = ["IncrementalDetokenizer", "StopStringMatcher", "Tokenizer"]

NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LONG_TEXT_CHARS = 4096  # from here on encode() lets other threads run


class Backend(Protocol):
    """What both kinds of tokenizers give."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokenizer:
    """One model's tokenizer. Safe to share between threads."""

    backend: Backend
    fast: tokenizers.Tokenizer | None    # None: only a slow tokenizer exists
    special_tokens: dict[str, str]       # {"bos_token": "<s>", ...}
    added_tokens: dict[int, str]         # id -> text of every token outside of the learned vocabulary
    special_ids: frozenset[int]
    num_tokens: int                      # that the tokenizer can make
    vocab_size: int                      # rows of the model's embedding: ids below it are valid
    eos_token_ids: tuple[int, ...]       # what ends a sequence, as generation_config.json or config.json says
    chat_template: str | None

    @classmethod
    def from_dir(cls, model_dir: str | Path) -> "Tokenizer":
        """Raises ConfigError when the folder holds no tokenizer, or files that contradict one another."""
        folder = Path(model_dir)
        if not folder.is_dir():
            raise ConfigError(f"model_dir: {folder} is not a folder")
        config = read_json(folder / "tokenizer_config.json")
        fast: tokenizers.Tokenizer | None
        if (folder / "tokenizer.json").is_file():
            fast = _load_fast(folder, config)
            backend: Backend = _FastBackend(fast)
            special = _named_special_tokens(folder, config)
        else:
            backend, fast, special = _load_with_transformers(folder)
        added, special_ids, num_tokens = _added_tokens(backend, fast)
        model_config = read_json(folder / "config.json")
        return cls(backend=backend, fast=fast, special_tokens=special, added_tokens=added, special_ids=special_ids, num_tokens=num_tokens,
                   vocab_size=int(model_config.get("vocab_size") or num_tokens),
                   eos_token_ids=_eos_token_ids(folder, model_config, backend, fast, special), chat_template=_chat_template(folder, config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidField on text that is not valid Unicode (a lone surrogate)."""
        try:
            return self.backend.encode(text, add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise InvalidField("text", "is not valid Unicode text") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = False) -> str:
        """With `spaces_between_special_tokens`, added tokens that are shown stand apart by one space, as in LightLLM."""
        if not spaces_between_special_tokens or self.added_tokens.keys().isdisjoint(ids):
            return self.backend.decode(ids, skip_special_tokens)
        parts: list[str] = []
        plain: list[int] = []
        for token_id in ids:
            if skip_special_tokens and token_id in self.special_ids:
                continue
            if token_id not in self.added_tokens:
                plain.append(token_id)
                continue
            if plain:
                parts.append(self.backend.decode(plain, False))
                plain = []
            parts.append(self.added_tokens[token_id])
        if plain:
            parts.append(self.backend.decode(plain, False))
        return " ".join(parts)

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special_ids

    @cached_property
    def new_pieces(self) -> Callable[[], Pieces]:
        """Starts the text of one sequence; for IncrementalDetokenizer."""
        return pieces_factory(self)

    @property
    def decoder_config(self) -> dict[str, Any] | None:
        """The decoder of tokenizer.json as a map; None if there is none."""
        if self.fast is None or self.fast.decoder is None:
            return None
        state: dict[str, Any] = json.loads(self.fast.decoder.__getstate__())
        return state


class _FastBackend:
    def __init__(self, fast: tokenizers.Tokenizer) -> None:
        self._fast = fast

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) >= LONG_TEXT_CHARS:  # the batch call releases the GIL
            ids: list[int] = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
            return ids
        return self._fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._fast.decode(ids, skip_special_tokens=skip_special_tokens)


class _SlowBackend:
    """A tokenizer that transformers runs in Python."""

    def __init__(self, slow: Any) -> None:
        self.slow = slow

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.slow.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self.slow.decode(list(ids), skip_special_tokens=skip_special_tokens, spaces_between_special_tokens=False))


def _load_fast(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    try:
        fast = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception for whatever is wrong in the file
        raise ConfigError(f"{path}: {error}") from None
    fast.no_truncation()
    fast.no_padding()
    known = {(t.content, t.lstrip, t.rstrip, t.single_word, t.normalized, t.special) for t in fast.get_added_tokens_decoder().values()}
    listed = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    for _, token in listed:
        if (token["content"], *(bool(token.get(flag)) for flag in flags)) not in known:
            fast.add_tokens([tokenizers.AddedToken(token["content"], **{flag: bool(token.get(flag)) for flag in flags})])
    others = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    listed_others = others.values() if isinstance(others, dict) else others
    names = [*_named_special_tokens(folder, config).values(), *(_token_text(token) for token in listed_others)]
    marked = {t.content for t in fast.get_added_tokens_decoder().values() if t.special}
    fast.add_special_tokens([tokenizers.AddedToken(n, special=True, normalized=False) for n in names if n not in marked])
    return fast


def _named_special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """tokenizer_config.json first; the older special_tokens_map.json fills in what it leaves out."""
    older = read_json(folder / "special_tokens_map.json")
    found = {name: _token_text(config.get(name) or older.get(name)) for name in NAMED_SPECIAL_TOKENS}
    return {name: text for name, text in found.items() if text}


def _token_text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else (token or "")


def _load_with_transformers(folder: Path) -> tuple[Backend, tokenizers.Tokenizer | None, dict[str, str]]:
    """For folders with only SentencePiece or vocabulary files. Slow to import, hence only here."""
    try:
        from transformers import AutoTokenizer

        auto = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = f"{folder} has no tokenizer.json, and transformers cannot load another tokenizer there: {error}"
        raise ConfigError(f"model_dir: {reason}") from None
    special = {name: text for name in NAMED_SPECIAL_TOKENS if isinstance(text := getattr(auto, name, None), str)}
    fast = getattr(auto, "backend_tokenizer", None)
    if isinstance(fast, tokenizers.Tokenizer):
        return _FastBackend(fast), fast, special
    return _SlowBackend(auto), None, special


def _added_tokens(backend: Backend, fast: tokenizers.Tokenizer | None) -> tuple[dict[int, str], frozenset[int], int]:
    if fast is not None:
        added = fast.get_added_tokens_decoder()
        num_tokens = max(fast.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
    else:
        assert isinstance(backend, _SlowBackend)
        added, num_tokens = backend.slow.added_tokens_decoder, len(backend.slow)
    return {i: t.content for i, t in added.items()}, frozenset(i for i, t in added.items() if t.special), num_tokens


def _eos_token_ids(folder: Path, model_config: dict[str, Any], backend: Backend, fast: tokenizers.Tokenizer | None,
                   special: dict[str, str]) -> tuple[int, ...]:
    """generation_config.json decides, else config.json, else the tokenizer's own EOS token."""
    for source in (read_json(folder / "generation_config.json"), model_config):
        given = source.get("eos_token_id")
        if given is not None:
            return tuple(int(i) for i in given) if isinstance(given, list) else (int(given),)
    if "eos_token" not in special:
        return ()
    if fast is not None:
        found = fast.token_to_id(special["eos_token"])
    else:
        assert isinstance(backend, _SlowBackend)
        found = backend.slow.eos_token_id
    return () if found is None else (int(found),)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The default Jinja template: a file of its own wins over the entry in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    given = config.get("chat_template")
    if isinstance(given, list):
        return next((str(t["template"]) for t in given if t.get("name") == "default"), None)
    return given if isinstance(given, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder; {} if the file is not there. Raises ConfigError naming the file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return content
