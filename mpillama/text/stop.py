"""Ending a generation at strings chosen by the user."""

from collections.abc import Sequence

from mpillama.errors import UserError


class StopStrings:
    """Watches streamed text for stop strings; the one completed first wins, and the longest of those.

    The result does not depend on how the text is cut into pushes. UserError for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise UserError(
                "A stop string is empty and would stop before the first token; remove it or write its text."
            )
        self._stops = tuple(stops)
        self._held = ""
        self._reached = False

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to print now, and whether a stop string was reached (then and ever after)."""
        if self._reached:
            return "", True
        text = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        self._reached = bool(matches)
        safe = min(matches)[1] if matches else len(text) - self._possible_start(text)
        self._held = "" if matches else text[safe:]
        return text[:safe], self._reached

    def finish(self) -> str:
        """The text still held back when the generation ends without a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string may begin."""
        longest = min(max(map(len, self._stops), default=0) - 1, len(text))
        ends = (size for size in range(longest, 0, -1) if self._begins_a_stop(text[-size:]))
        return next(ends, 0)

    def _begins_a_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
