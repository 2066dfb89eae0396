"""Tokens to text as they come: never half a character, never past a stop string."""

from __future__ import annotations

import codecs

from engine.tokenizer import Tokenizer


class TextStream:
    """One request's text. The pieces put together equal the decoded tokens, cut before the first stop string.

    Args:
        tokenizer: gives each token's bytes.
        stop: strings that end the text; what might be the beginning of one is held back until it is clear.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, token: int, last: bool = False) -> str:
        """The text that a token completes, possibly "". With `last`, everything that was held back too."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(self._tokenizer.token_bytes(token), final=last)
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = 0 if last else self._undecided()
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max((len(s) - 1 for s in self._stop), default=0))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)
