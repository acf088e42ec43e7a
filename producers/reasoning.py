"""Part what a model thinks (`<think>…</think>`, as DeepSeek R1 and Qwen write it) from what it answers, as pieces of text come. Pure."""

from enum import Enum

OPENING, CLOSING = "<think>", "</think>"


def held_back(text: str, *markers: str) -> int:
    """How many characters at the end of `text` may be the beginning of one of `markers`."""
    longest = min(len(text), max(map(len, markers)) - 1)
    return next((size for size in range(longest, 0, -1) if any(marker.startswith(text[-size:]) for marker in markers)), 0)


class _At(Enum):
    START = 0
    THOUGHT = 1
    ANSWER = 2


class ReasoningSplitter:
    """How the text was cut into pieces makes no difference. White space around the marks is nobody's.

    `is_open`: the prompt itself ended with the opening mark. Without it, thinking begins only at the very start of the text.
    """

    def __init__(self, *, is_open: bool) -> None:
        self._at = _At.THOUGHT if is_open else _At.START
        self._held = ""
        self._is_fresh = True    # of this part nothing but white space has come

    @property
    def is_thinking(self) -> bool:
        return self._at is _At.THOUGHT

    def feed(self, piece: str) -> tuple[str, str]:
        """(thought, answer) that are certain now."""
        text, self._held = self._held + piece, ""
        if self._at is _At.START:
            text = self._begin(text)
        thought = ""
        if self._at is _At.THOUGHT:
            thought, text = self._think(text)
        if self._at is not _At.ANSWER:
            return thought, ""
        return thought, self._trimmed(text)

    def flush(self) -> tuple[str, str]:
        """The rest, once no more text comes."""
        held, self._held = self._held, ""
        if self._at is _At.THOUGHT:
            return self._trimmed(held).rstrip(), ""
        return "", held

    def _begin(self, text: str) -> str:
        start = text.lstrip()
        if start.startswith(OPENING):
            self._at = _At.THOUGHT
            return start.removeprefix(OPENING)
        if OPENING.startswith(start):
            self._held = text
            return ""
        self._at, self._is_fresh = _At.ANSWER, False
        return text

    def _think(self, text: str) -> tuple[str, str]:
        """(thought, what comes after its end)."""
        thought, mark, rest = text.partition(CLOSING)
        if mark:
            shown = self._trimmed(thought).rstrip()
            self._at, self._is_fresh = _At.ANSWER, True
            return shown, rest
        keep = held_back(text, CLOSING)
        body = text[: len(text) - keep]
        certain = body.rstrip()
        self._held = text[len(certain):]
        return self._trimmed(certain), ""

    def _trimmed(self, text: str) -> str:
        if self._is_fresh:
            text = text.lstrip()
            self._is_fresh = not text
        return text
