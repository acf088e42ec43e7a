"""What a guided sequence may say next: grammars compiled once, a matcher for each sequence (xgrammar).

    command thread -> wanted -> grammar thread: load the vocabulary once, compile, replay the output so far -> done -> engine's inbox

A guide's state follows from the tokens said alone, so it is made again wherever a sequence goes on: after a death, behind a hand-over.
A schema's answer is JSON without raw control characters, with at most MAX_BLANKS of white space in a row. The sequence ends with the token
after which nothing but its end is allowed, and may end (by EOS) wherever its text is complete.
"""

import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coordinator import json_schema
from coordinator.errors import ConfigError, InvalidField
from workers.sequence import Sequence
from workers.token_bytes import Mask, TokenBytes, mask_of

if TYPE_CHECKING:
    import xgrammar

log = logging.getLogger(__name__)

MAX_BLANKS = 20                     # an indented line's; a model in doubt would go on with them for ever
MOST_PER_TOKEN_S = 0.5              # grammars that can be read in many ways take ever longer, and every sequence of the engine waits
CACHE_BYTES = 256 * 1024 * 1024     # of compiled grammars
MAX_THREADS = 4
JSON_BLANKS = b"\n\r"               # the control characters that may stand in JSON: the grammar allows others inside of strings
_SOURCE = re.compile(r"^(\[[\d:]+\] )?(\S+\.(cc|h):\d+: )?")  # what xgrammar puts in front of its errors


class Guide:
    """One sequence's place in its grammar."""

    def __init__(self, field: str, matcher: "xgrammar.GrammarMatcher", tokens: TokenBytes, end_ids: Seq[int]) -> None:
        self._field = field
        self._matcher = matcher
        self._tokens = tokens
        self._every = mask_of(range(tokens.vocab_size), tokens.vocab_size)
        self._no_end = ~mask_of(end_ids, tokens.vocab_size)
        self._misfits: Mask | None = None
        self._words: Mask = np.zeros((1, self._every.size), dtype=np.int32)
        self._is_fresh = False
        self._spent_s = 0.0                  # of this thread's time, on the next token
        self.is_finished = False

    def mask(self) -> Mask:
        """[ceil(vocab_size / 32)]: a bit for each token that may come next. Valid until the next `take`."""
        words: Mask = self._words[0]
        if not self._is_fresh:
            started_s = time.thread_time()
            self._matcher.fill_next_token_bitmask(self._words, 0)
            words &= self._every
            if self._misfits is not None:
                words &= ~self._misfits
            self._is_fresh = True
            self._spent_s += time.thread_time() - started_s
        return words

    def take(self, token_id: int) -> None:
        """Go on behind a token that was said. Raises InvalidField if it is not allowed here, or a token takes too long to follow."""
        started_s = time.thread_time()
        if self.is_finished or not self._matcher.accept_token(token_id):
            raise InvalidField(self._field, f"token {token_id} of the output does not follow it")
        self._spent_s += time.thread_time() - started_s
        if self._spent_s > MOST_PER_TOKEN_S:
            raise InvalidField(self._field, f"is too ambiguous: one token took {self._spent_s:.1f} s to follow, {MOST_PER_TOKEN_S} at most")
        self._spent_s = 0.0
        self._is_fresh = False
        self._misfits = self._tokens.misfits(token_id)
        if self._matcher.is_terminated():
            self.is_finished = True
        elif self._matcher.is_completed():
            self.is_finished = not (self.mask() & self._no_end).any()


class Grammars:
    """Makes guides. Loads nothing before the first one; for one thread."""

    def __init__(self, model_dir: Path, vocab_size: int, eos_ids: Seq[int]) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._end_ids = [token_id for token_id in eos_ids if token_id < vocab_size]
        self._compilers: dict[bool, xgrammar.GrammarCompiler] = {}

    def guide(self, field: str, text: str, output: Seq[int]) -> Guide:
        """A guide that stands behind `output`. Raises InvalidField for a grammar that does not compile, or not to this output."""
        import xgrammar

        guide = Guide(field, xgrammar.GrammarMatcher(self._compiled(field, text)), self._tokens, self._end_ids)
        for token_id in output:
            guide.take(token_id)
        if not guide.is_finished and not guide.mask().any():
            raise InvalidField(field, "allows no token at all")
        return guide

    def _compiled(self, field: str, text: str) -> "xgrammar.CompiledGrammar":
        try:
            compiler = self._compiler(is_json=field == "guided_json")
            match field:
                case "guided_json":
                    return compiler.compile_json_schema(json_schema.checked(text), max_whitespace_cnt=MAX_BLANKS)
                case "guided_grammar":
                    return compiler.compile_grammar(text)
                case _:
                    return compiler.compile_regex(text)
        except ConfigError as error:
            raise InvalidField(field, f"cannot be kept to by this model: {error}") from None
        except (RuntimeError, ValueError, TypeError) as error:
            reason = " ".join(_SOURCE.sub("", str(error).strip()).split())
            raise InvalidField(field, f"does not compile: {reason[:300]}") from None

    def _compiler(self, *, is_json: bool) -> "xgrammar.GrammarCompiler":
        import xgrammar

        if is_json not in self._compilers:
            vocabulary = [_in_json(piece) if is_json else piece for piece in self._tokens.pieces]
            info = xgrammar.TokenizerInfo(vocabulary, xgrammar.VocabType.RAW, vocab_size=self._vocab_size, stop_token_ids=self._end_ids)
            num_threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 2))
            self._compilers[is_json] = xgrammar.GrammarCompiler(info, max_threads=num_threads, cache_limit_bytes=CACHE_BYTES)
        return self._compilers[is_json]

    @cached_property
    def _tokens(self) -> TokenBytes:
        return TokenBytes(self._model_dir, self._vocab_size)


def _in_json(piece: bytes) -> bytes:
    """No token at all if a string could not hold it."""
    return b"" if any(byte < 0x20 and byte not in JSON_BLANKS for byte in piece) else piece


class GuideMaker:
    """A thread that makes guides while the engine runs steps. `done(sequence, error)` is called there, the guide is in its place."""

    def __init__(self, grammars: Grammars, done: Callable[[Sequence, InvalidField | None], None]) -> None:
        self._grammars = grammars
        self._done = done
        self._wanted: queue.SimpleQueue[Sequence] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, sequence: Sequence) -> None:
        """For a sequence that the scheduler does not have yet."""
        self._wanted.put(sequence)
        if self._thread is None:
            self._thread = threading.Thread(target=self._make_forever, name="grammars", daemon=True)
            self._thread.start()

    def _make_forever(self) -> None:
        while True:
            sequence = self._wanted.get()
            constraint = sequence.params.constraint
            assert constraint is not None
            error: InvalidField | None = None
            try:
                sequence.guide = self._grammars.guide(*constraint, sequence.token_ids[sequence.num_prompt:])
            except InvalidField as refused:
                error = refused
            except Exception as failure:  # whatever a library makes of a grammar is the grammar's fault, not the engine's
                log.exception("job %s: %s", sequence.job_id, constraint[0])
                error = InvalidField(constraint[0], f"does not compile: {type(failure).__name__} {failure}"[:300])
            self._done(sequence, error)
