"""Find stop strings in text that arrives in pieces, and hold back what may be the beginning of one. Knows characters, not tokens."""

from collections.abc import Sequence


class StopStringMatcher:
    """Where the text stops depends on the text alone, never on how it was cut into pieces.

    The stop string that is complete first wins (of two that end at the same character, the longer); neither it nor anything
    after it is shown. One automaton per stop string (Knuth, Morris, Pratt): time is linear in the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._borders = [_borders(stop) for stop in self._stops]
        self._first_chars = frozenset(stop[0] for stop in self._stops)
        self._matched = [0] * len(self._stops)  # characters of each stop string that the text ends with now
        self._held = ""
        self.is_stopped = False

    def feed(self, piece: str) -> tuple[str, bool]:
        """(text that may be shown now, whether a stop string is complete). After a match all further text is swallowed."""
        if not self._stops:
            return piece, False
        if self.is_stopped:
            return "", True
        if not self._held and self._first_chars.isdisjoint(piece):
            return piece, False
        for end, char in enumerate(piece, start=1):
            stop_len = self._advance(char)
            if stop_len:
                visible = (self._held + piece[:end])[:-stop_len]
                self._held = ""
                self.is_stopped = True
                return visible, True
        text = self._held + piece
        num_shown = len(text) - max(self._matched)
        self._held = text[num_shown:]
        return text[:num_shown], False

    def flush(self) -> str:
        """What is held back, once no more text can come."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> int:
        """Take one character in. Returns the length of the longest stop string that it completes, or 0."""
        longest = 0
        for i, stop in enumerate(self._stops):
            borders, matched = self._borders[i], self._matched[i]
            while matched and stop[matched] != char:
                matched = borders[matched]
            if stop[matched] == char:
                matched += 1
            self._matched[i] = matched
            if matched == len(stop):
                longest = max(longest, matched)
        return longest


def _borders(stop: str) -> list[int]:
    """borders[n]: length of the longest proper prefix of stop[:n] that is also its suffix."""
    borders = [0, 0]
    length = 0
    for char in stop[1:]:
        while length and stop[length] != char:
            length = borders[length]
        if stop[length] == char:
            length += 1
        borders.append(length)
    return borders
