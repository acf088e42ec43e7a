"""What single tokens look like beside their log probabilities: their text, and the bytes where a token is only a part of a character."""

import re

from coordinator.detokenizer import BYTE_OF_CHAR, REPLACEMENT
from coordinator.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"


class TokenTexts:
    """Of one model; filled as tokens are met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder_config or {}
        self._is_byte_level = any(step.get("type") == "ByteLevel" for step in (decoder, *decoder.get("decoders", ())))
        self._known: dict[int, tuple[str, bytes]] = {}

    def of(self, token_id: int) -> tuple[str, bytes]:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look(token_id)
        return known

    def _look(self, token_id: int) -> tuple[str, bytes]:
        raw = self._bytes(token_id)
        return raw.decode(errors="replace"), raw

    def _bytes(self, token_id: int) -> bytes:
        if (added := self._tokenizer.added_tokens.get(token_id)) is not None:
            return added.encode()
        token = self._tokenizer.fast.id_to_token(token_id) if self._tokenizer.fast is not None else None
        if token is None:
            return self._tokenizer.decode([token_id], skip_special_tokens=False).replace(REPLACEMENT, "").encode()
        if self._is_byte_level and all(char in BYTE_OF_CHAR for char in token):
            return bytes(BYTE_OF_CHAR[char] for char in token)
        if (byte := _BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes((int(byte[1], 16),))
        return token.replace(_SPACE, " ").encode()
