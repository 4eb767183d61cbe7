"""What a person sees while we work: lines on standard error, and one live line on a terminal."""

import contextlib
import io
import select
import sys
import time
from functools import cache
from typing import Any, TextIO

# A table for str.translate: control characters, with which a text could steer the terminal, become U+FFFD.
PRINTABLE = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Descriptor(io.FileIO):
    """A standard stream below its text: what it does not take is dropped, and why is kept for who has to know."""

    error: OSError | None = None

    def write(self, content: Any) -> int:
        size = memoryview(content).nbytes
        try:
            written = super().write(content)
            while written is None:  # somebody who shares it has it not wait
                select.select([], [self], [])
                written = super().write(content)
        except OSError as error:
            self.error = error
            return size
        return written


@cache
def unfailing(number: int, encoding: str = "utf-8") -> TextIO:
    """A text stream on a descriptor that others write to as well: nothing that is written to it raises an error."""
    below = io.BufferedWriter(Descriptor(number, "w", closefd=False))
    return io.TextIOWrapper(below, encoding, errors="backslashreplace", line_buffering=True)


def unwritten(stream: Any) -> OSError | None:
    """The error for which a stream dropped what was written to it, if it is an `unfailing` one that did."""
    below = getattr(getattr(stream, "buffer", None), "raw", None)
    return below.error if isinstance(below, Descriptor) else None


class Console:
    """Standard output belongs to results (`--json`), so everything here goes to standard error."""

    def __init__(self) -> None:
        self.quiet = False
        self.muted = False  # a process that leaves speaking to the main one
        self._live = False

    @property
    def terminal(self) -> bool:
        if self.quiet or self.muted or sys.stderr is None or sys.stderr.closed:
            return False
        return sys.stderr.isatty()

    def say(self, text: str = "") -> None:
        """A line that stays."""
        if not self.quiet and not self.muted:
            self.clear()
            self._write(text.translate(PRINTABLE) + "\n")

    def warn(self, text: str) -> None:
        """A line that stays, even when quiet."""
        if self.muted:
            return
        self.clear()
        self._write(f"warning: {text.translate(PRINTABLE)}\n")

    def fail(self, text: str) -> None:
        """The last line of a command that fails."""
        self.clear()
        self._write(f"error: {text}\n")

    def live(self, text: str) -> None:
        """A line that the next one overwrites; shown on a terminal only."""
        if self.terminal:
            self._write(f"\r\x1b[K{text.translate(PRINTABLE)}")
            self._live = True

    def clear(self) -> None:
        if self._live:
            self._live = False
            self._write("\r\x1b[K")

    @staticmethod
    def _write(text: str) -> None:
        """Writes to standard error. A terminal that was closed, or a full disk, is no reason to end what runs."""
        stream, own = sys.stderr, sys.__stderr__
        if stream is None:  # which `print` would take for standard output
            return
        with contextlib.suppress(OSError, ValueError):  # full, gone, closed
            if own is not None and stream is own:  # its buffer would keep what cannot be written until Python ends
                stream = unfailing(own.fileno(), own.encoding)
            print(text, end="", file=stream, flush=True)


console = Console()


class Progress:
    """Bytes done of a known total: MB/s and time left on a live line, ten times a second at most."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, max(total, 1), 0
        self.start = time.perf_counter()
        self._shown = 0.0

    @property
    def rate(self) -> float:
        """Bytes per second so far."""
        return self.done / max(time.perf_counter() - self.start, 1e-9)

    def add(self, count: int) -> None:
        self.done += count
        now = time.perf_counter()
        if now - self._shown > 0.1:
            self._shown = now
            share = min(self.done / self.total, 1.0)
            left = max(self.total - self.done, 0) / max(self.rate, 1.0)
            console.live(f"{self.what}  {share:4.0%}  {self.rate / 1e6:.0f} MB/s  {duration(left)} left")


def duration(seconds: float) -> str:
    """3725 -> '1 h 02 min', 65 -> '1 min 05 s', 6.5 -> '6.5 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: float) -> str:
    """1234567 -> '1.23M'."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def size(amount: float) -> str:
    """Bytes: 1234567 -> '1.23 MB'."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if amount >= unit:
            return f"{amount / unit:.3g} {name}"
    return f"{amount:.0f} bytes"
