"""Stop strings in text that arrives in pieces.

The text ends at the stop string that is complete first; of several that are complete with the same character, the
longest. The result does not depend on how the text is cut into pieces. Text that may turn out to be the beginning of
a stop string is held back.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for ``stops`` (non-empty strings) in a stream of text."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False):
        self._stops = tuple(dict.fromkeys(stops))
        self._include = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is settled now and, where one was found, the stop string that ended it."""
        if not self._stops:
            return text, None
        if not text:
            return "", None
        buffer = self._held + text
        matches = [(start + len(stop), start, stop) for stop in self._stops if (start := buffer.find(stop)) >= 0]
        if matches:
            end, start, stop = min(matches)
            self._held = ""
            return buffer[: end if self._include else start], stop
        settled = min(self._possible_start(buffer, stop) for stop in self._stops)
        self._held = buffer[settled:]
        return buffer[:settled], None

    def pass_by(self, text: str) -> str:
        """Text in which no stop string counts; what was held back before it is settled too."""
        return self.flush() + text

    def flush(self) -> str:
        """What is held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _possible_start(text: str, stop: str) -> int:
        """Where the longest end of ``text`` begins that is a beginning of ``stop``."""
        start = max(0, len(text) - len(stop) + 1)
        while (start := text.find(stop[0], start)) >= 0:
            if stop.startswith(text[start:]):
                return start
            start += 1
        return len(text)
