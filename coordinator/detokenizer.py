"""Token ids to text, one token at a time: each piece is shown as soon as it is certain, and joined they are the whole text.

How pieces are made follows from the decoder in tokenizer.json. The two common kinds need no window at all: a byte-level token is
its bytes, a SentencePiece token is its text or one byte. Any other decoder is asked twice about a short window of tokens.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from coordinator.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_CHAR_BYTES = 4    # of one character in UTF-8: more undecided tokens than this are not an unfinished character
WINDOW_TOKENS = 8     # of settled context for decoders that look to the left
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
STRIP_FIRST_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


class Pieces(Protocol):
    """Makes text of consecutive tokens."""

    def add(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class IncrementalDetokenizer:
    """The text of one sequence. About a microsecond per token for byte-level and SentencePiece tokenizers.

    Joined pieces equal `tokenizer.decode` of all tokens with the same two flags. One exception, kept for prompt streaming: where
    SentencePiece byte tokens turn out not to be UTF-8, characters that were complete before stay, while decode() replaces
    that whole run of bytes.
    """

    def __init__(self, tokenizer: "Tokenizer", skip_special_tokens: bool = True, spaces_between_special_tokens: bool = False) -> None:
        self.tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._separate = tokenizer.added_tokens if spaces_between_special_tokens else {}
        self._pieces = tokenizer.new_pieces()
        self._is_in_text = False    # the segment that tokens go to now has begun
        self._has_segments = False  # something stands before it

    def add(self, token_id: int) -> str:
        """What this token adds to the text; empty while a character is incomplete."""
        if token_id in self._skipped:
            return ""
        if token_id in self._separate:
            return self._add_separate(self._separate[token_id])
        if self._is_in_text:
            return self._pieces.add(token_id)
        self._is_in_text = True
        gap = " " if self._has_segments else ""
        self._has_segments = True
        return gap + self._pieces.add(token_id)

    def flush(self) -> str:
        """The rest, once no more tokens come: an incomplete character becomes U+FFFD."""
        return self._pieces.flush()

    def _add_separate(self, text: str) -> str:
        rest = self._pieces.flush() if self._is_in_text else ""
        if self._is_in_text:
            self._pieces = self.tokenizer.new_pieces()
            self._is_in_text = False
        gap = " " if self._has_segments else ""
        self._has_segments = True
        return rest + gap + text


class _ByteLevelPieces:
    """Every token is a run of bytes; the text is their UTF-8 with what is invalid replaced."""

    def __init__(self, table: dict[int, bytes]) -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def add(self, token_id: int) -> str:
        return self._decode(self._table[token_id])

    def flush(self) -> str:
        return self._decode(b"", True)


class _SentencePieces:
    """Tokens are text, or one byte each (`<0xE4>`); the first space of the whole text goes."""

    def __init__(self, table: dict[int, str | int], *, strip_first: bool) -> None:
        self._table = table
        self._strip_first = strip_first
        self._bytes = b""        # of a character that is not complete
        self._is_broken = False  # in a run of byte tokens after an invalid one

    def add(self, token_id: int) -> str:
        part = self._table[token_id]
        if isinstance(part, int):
            text = self._add_byte(part)
        elif self._bytes or self._is_broken:
            text = self._end_run() + part
        else:
            text = part
        if self._strip_first and text:
            self._strip_first = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._end_run()

    def _add_byte(self, byte: int) -> str:
        if self._is_broken:
            return REPLACEMENT
        self._bytes += bytes((byte,))
        try:
            text = self._bytes.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            text = REPLACEMENT * len(self._bytes)
            self._is_broken = True
        self._bytes = b""
        return text

    def _end_run(self) -> str:
        text = REPLACEMENT * len(self._bytes)
        self._bytes = b""
        self._is_broken = False
        return text


class _WindowPieces:
    """For any decoder: compare the text of a short window with and without the new tokens."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []   # settled context, then undecided tokens
        self._num_settled = 0
        self._settled_text = ""     # of the context alone

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        num_undecided = len(self._ids) - self._num_settled
        if len(text) <= len(self._settled_text) and num_undecided < MAX_CHAR_BYTES:
            return ""
        if text.endswith(REPLACEMENT) and num_undecided < MAX_CHAR_BYTES:
            return ""
        return self._settle(text)

    def flush(self) -> str:
        return self._settle(self._decode(self._ids)) if len(self._ids) > self._num_settled else ""

    def _settle(self, text: str) -> str:
        piece = text[len(self._settled_text):]
        # The start of the text stays in the window until it is full: decoders treat the first token apart.
        self._ids = self._ids[-WINDOW_TOKENS:]
        self._num_settled = len(self._ids)
        self._settled_text = self._decode(self._ids)
        return piece


class _ByteTable(dict[int, bytes]):
    """Token id -> bytes, filled as tokens are met (a vocabulary of 128k would cost 0.1 s at start)."""

    def __init__(self, id_to_token: Callable[[int], str | None]) -> None:
        self._id_to_token = id_to_token

    def __missing__(self, token_id: int) -> bytes:
        token = self._id_to_token(token_id)
        if token is None:  # no such token: decoders pass over it
            value = b""
        elif all(char in BYTE_OF_CHAR for char in token):
            value = bytes(BYTE_OF_CHAR[char] for char in token)
        else:
            value = token.encode()
        self[token_id] = value
        return value


class _PieceTable(dict[int, str | int]):
    """Token id -> text, or the byte that a `<0xHH>` token stands for."""

    def __init__(self, id_to_token: Callable[[int], str | None], space: str, shown_as: str) -> None:
        self._id_to_token = id_to_token
        self._space = space        # "▁"
        self._shown_as = shown_as

    def __missing__(self, token_id: int) -> str | int:
        token = self._id_to_token(token_id) or ""
        byte = BYTE_TOKEN.fullmatch(token)
        value = int(byte[1], 16) if byte else token.replace(self._space, self._shown_as)
        self[token_id] = value
        return value


def _byte_chars() -> dict[str, int]:
    """The printable character that byte-level vocabularies (GPT-2) write for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_chars()


def pieces_factory(tokenizer: "Tokenizer") -> Callable[[], Pieces]:
    """Choose by the decoder, once per tokenizer."""
    config, fast = tokenizer.decoder_config, tokenizer.fast
    steps: list[dict[str, Any]] = [] if config is None else config["decoders"] if config["type"] == "Sequence" else [config]
    kinds = [step["type"] for step in steps]
    if fast is not None and kinds == ["ByteLevel"]:
        byte_table = _ByteTable(fast.id_to_token)
        return lambda: _ByteLevelPieces(byte_table)
    if fast is not None and kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and set(steps[0]["pattern"]) == {"String"}:
        strips = steps[3:]
        if strips in ([], [STRIP_FIRST_SPACE]):
            piece_table = _PieceTable(fast.id_to_token, steps[0]["pattern"]["String"], steps[0]["content"])
            return lambda: _SentencePieces(piece_table, strip_first=bool(strips))
    return lambda: _WindowPieces(lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
