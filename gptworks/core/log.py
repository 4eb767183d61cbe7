"""What a person sees while we work: lines on standard error, and one live line on a terminal."""

import contextlib
import os
import sys
import time

# A table for str.translate: control characters, with which a text could steer the terminal, become U+FFFD.
PRINTABLE = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Console:
    """Standard output belongs to results (`--json`), so everything here goes to standard error."""

    def __init__(self) -> None:
        self.quiet = False
        self.muted = False  # a process that leaves speaking to the main one
        self._live = False

    @property
    def terminal(self) -> bool:
        return sys.stderr.isatty() and not self.quiet and not self.muted

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
        try:
            print(text, end="", file=sys.stderr, flush=True)
        except (OSError, ValueError):  # full, gone, closed
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # or Python tries it again as it ends


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


def number_of(number: int, noun: str) -> str:
    """1234, 'row' -> '1,234 rows'; 1, 'row' -> '1 row'."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def size(amount: float) -> str:
    """Bytes: 1234567 -> '1.23 MB'."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if amount >= unit:
            return f"{amount / unit:.3g} {name}"
    return f"{amount:.0f} bytes"
