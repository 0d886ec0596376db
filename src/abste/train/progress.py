"""Live progress: one rewritten line on a terminal, a few readable lines in a log file."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any, TextIO


def duration(seconds: float) -> str:
    """``47 s``, ``12:05`` (minutes) or ``3:12:05`` (hours)."""
    whole = round(max(0.0, seconds))
    minutes, rest = divmod(whole, 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Prints where a run is, as long as anybody can read it: a lost output, such as a closed pipe, ends no run.

    Args:
        enabled: False prints nothing (ranks other than 0).
        stream: by default standard output, looked up now.
        every: seconds between lines that are not the end of an epoch, where the stream is no terminal.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None, every: float = 30.0) -> None:
        self.stream: TextIO | Any = stream or sys.stdout  # which is None where a process began without
        self.enabled = enabled and self.stream is not None and not getattr(self.stream, "closed", False)
        self.live = self.enabled and self.stream.isatty()
        self.every = every
        self._last = time.monotonic()
        self._width = 0

    def status(self, text: str) -> None:
        """Where the run is now; shown while it is news."""
        if not self.enabled:
            return
        if self.live:
            self._rewrite(text)
        elif time.monotonic() - self._last >= self.every:
            self.line(text)

    def line(self, text: str) -> None:
        """A line that stays."""
        if not self.enabled:
            return
        if self.live:
            self._rewrite("")
        self._write(f"{text}\n")
        self._last = time.monotonic()

    def _rewrite(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be rewritten
        self._write("\r" + text.ljust(self._width) + ("" if text else "\r"))
        self._width = len(text)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # nobody reads, no space is left, or it was closed
            self.enabled = self.live = False
