"""The bytes that tokens stand for, and which of them keep a text well-formed UTF-8. Needs nothing of a model but its tokenizer.

Byte-level tokens may end inside of a character. xgrammar counts the bytes of a character but does not look at their values, so a text under
its grammars may hold overlong forms, surrogates and code points that do not exist, which a reader sees as other characters than it counted.
"""

import codecs
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator.errors import ConfigError
from coordinator.tokenizer import Tokenizer

# Behind these first bytes of a character not every continuation byte (0x80 to 0xBF) may stand: those that may (RFC 3629, 4).
SECOND_BYTES = {0xE0: range(0xA0, 0xC0), 0xED: range(0x80, 0xA0), 0xF0: range(0x90, 0xC0), 0xF4: range(0x80, 0x90)}
CONTINUATION = range(0x80, 0xC0)

Mask = NDArray[np.int32]


class TokenBytes:
    """`pieces` has the bytes of each token: none for special ones, for ids unknown to the tokenizer and for bytes that no text holds.

    Raises ConfigError where the folder has no tokenizer that can be looked into.
    """

    def __init__(self, model_dir: Path, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.pieces = [piece if _may_be_well_formed(piece) else b"" for piece in _pieces(model_dir, vocab_size)]

    def misfits(self, token_id: int) -> Mask | None:
        """The tokens that must not follow this one, or None if its last byte forbids none."""
        last = self.pieces[token_id][-1:]
        return self._misfits[last[0]] if last and last[0] in SECOND_BYTES else None

    @cached_property
    def _misfits(self) -> dict[int, Mask]:
        firsts = np.array([piece[0] if piece else 0 for piece in self.pieces])
        return {lead: mask_of(np.flatnonzero((firsts >= 0x80) & (firsts < 0xC0) & ((firsts < fit.start) | (firsts >= fit.stop))).tolist(),
                              self.vocab_size) for lead, fit in SECOND_BYTES.items()}


def mask_of(token_ids: Sequence[int], vocab_size: int) -> Mask:
    """[ceil(vocab_size / 32)]: bit i of word w is for token 32 * w + i."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def _pieces(model_dir: Path, vocab_size: int) -> list[bytes]:
    import xgrammar  # it takes seconds, and most engines never need it
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_dir(model_dir)
    if tokenizer.fast is None:
        raise ConfigError(f"{model_dir} has only a tokenizer written in Python")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer.fast)
    pieces = xgrammar.TokenizerInfo.from_huggingface(fast, vocab_size=vocab_size, stop_token_ids=[0]).decoded_vocab[:vocab_size]
    pieces += [b""] * (vocab_size - len(pieces))
    for token_id, text in tokenizer.added_tokens.items():
        if token_id < vocab_size:
            pieces[token_id] = b"" if token_id in tokenizer.special_ids else text.encode()
    return pieces


def _may_be_well_formed(piece: bytes) -> bool:
    """Whether it is a part of some text: it may begin and end inside of a character."""
    if piece.isascii():
        return True
    start = 0
    while start < min(3, len(piece)) and piece[start] in CONTINUATION:
        start += 1
    try:
        codecs.getincrementaldecoder("utf-8")().decode(piece[start:])
    except UnicodeDecodeError:
        return False
    return True
