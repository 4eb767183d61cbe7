"""What a person sees while we work: lines on standard error, and one live line on a terminal."""

import contextlib
import io
import os
import re
import select
import shutil
import sys
import threading
import time
import unicodedata
from functools import cache
from typing import Any, TextIO

# A table for str.translate: control characters, with which a text could steer the terminal, become U+FFFD.
PRINTABLE = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


LABEL = re.compile(r"([a-z]+) +(?<=^.{9})(?=\S)")  # the word that many of our lines begin with, filled up to nine
CYAN, YELLOW, RED, BOLD = "36", "33", "31;1", "1"
DRAWN_APART, TICK = 0.1, 1.0  # seconds between two drawings of a live line; after which it moves by itself
NOW_AND_THEN = 60.0


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


def _is_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


class Console:
    """Standard output belongs to results (`--json`), so everything here goes to standard error.

    On a terminal a live line stands below what was said until it is cleared. While nothing new comes a thread has it
    tell how long that has been, so that a person sees that the work goes on.
    """

    def __init__(self) -> None:
        self.quiet = False
        self.muted = False  # a process that leaves speaking to the main one
        self._live = ""  # what the live line says; empty: there is none
        self._since = 0.0  # when that was set
        self._drawn = 0.0  # when it was last drawn; 0: it is not on the screen
        self._ticker: threading.Thread | None = None
        self._lock = threading.RLock()
        self._said: dict[str, float] = {}  # what comes now and then: when it last did

    @property
    def terminal(self) -> bool:
        """True where a person looks at a terminal that can move its cursor."""
        if self.quiet or self.muted or not _is_terminal():
            return False
        return os.environ.get("TERM") != "dumb"

    def say(self, text: str = "") -> None:
        """A line that stays."""
        if not self.quiet and not self.muted:
            self._put_above(self._sober(text), text.translate(PRINTABLE))

    def now_and_then(self, text: str) -> None:
        """A line that stays, of a kind (its first word) that comes often: on a terminal once a minute at most."""
        kind, now = text.partition(" ")[0], time.perf_counter()
        if not self.terminal or now - self._said.get(kind, -NOW_AND_THEN) >= NOW_AND_THEN:
            self._said[kind] = now
            self.say(text)

    def warn(self, text: str) -> None:
        """A line that stays, even when quiet."""
        if not self.muted:
            self._put_above(f"{self._painted('warning:', YELLOW)} {text.translate(PRINTABLE)}")

    def fail(self, text: str, asked: bool = False) -> None:
        """The last line of a command that fails, or was asked to stop."""
        self.clear()
        self._write(f"{text}\n" if asked else f"{self._painted('error:', RED)} {text}\n")

    def live(self, text: str) -> None:
        """A line that the next one overwrites; shown on a terminal only."""
        if not self.terminal:
            return
        with self._lock:
            self._live, self._since = text.translate(PRINTABLE), time.perf_counter()
            if self._since - self._drawn >= DRAWN_APART:
                self._draw()
            if self._ticker is None or not self._ticker.is_alive():
                self._ticker = threading.Thread(target=self._tick, daemon=True, name="live line")
                self._ticker.start()

    def clear(self) -> None:
        """Takes the live line away."""
        with self._lock:
            self._live = ""
            self._erase()

    def _put_above(self, line: str, text: str = "") -> None:
        """Writes a line above the live one, which is not drawn again at once where it says the same."""
        with self._lock:
            self._erase()
            self._write(line + "\n")
            if self._live and self._live != text:
                self._draw()

    def _erase(self) -> None:
        if self._drawn:
            self._drawn = 0.0
            self._write("\r\x1b[K")

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        waited = self._drawn - self._since
        tail = f"  ({duration(int(waited))})" if waited >= TICK else ""
        room = columns() - 1 - len(tail)
        self._write(f"\r\x1b[K{cut(self._live, room) + tail if room > 0 else cut(self._live, columns() - 1)}")

    def _tick(self) -> None:
        while True:
            time.sleep(TICK)
            with self._lock:
                if not self._live:
                    self._ticker = None
                    return
                if time.perf_counter() - self._drawn >= TICK:
                    self._draw()

    def _painted(self, text: str, colour: str) -> str:
        """A text in a colour, where the terminal shows one and nobody asked for none (no-color.org)."""
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not _is_terminal()
        return text if plain else f"\x1b[{colour}m{text}\x1b[0m"

    def _sober(self, text: str) -> str:
        """A text for the screen: no control characters but our own colours."""
        text = text.translate(PRINTABLE)
        if match := LABEL.match(text):
            return self._painted(match[1], CYAN) + text[len(match[1]) :]
        return self._painted(text, BOLD) if re.match(r"step +\d+/\d+  eval ", text) else text

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
    """Things done of a known total: their rate and the time left on a live line, ten times a second at most."""

    def __init__(self, what: str, total: int, unit: str = "bytes") -> None:
        self.what, self.total, self.unit, self.done = what, max(total, 1), unit, 0
        self.start = time.perf_counter()
        self._shown = 0.0

    @property
    def rate(self) -> float:
        """Things per second so far."""
        return self.done / max(time.perf_counter() - self.start, 1e-9)

    def add(self, number: int) -> None:
        """Counts what is done since the last time."""
        self.done += number
        now = time.perf_counter()
        if now - self._shown > 0.1:
            self._shown = now
            share = min(self.done / self.total, 1.0)
            left = max(self.total - self.done, 0) / max(self.rate, 1e-9)
            speed = f"{self.rate / 1e6:.0f} MB/s" if self.unit == "bytes" else f"{count(self.rate)} {self.unit}/s"
            console.live(f"{self.what}  {share:4.0%}  {speed}  {duration(left)} left")


def columns() -> int:
    """The width of the terminal that the console writes to."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def width(text: str) -> int:
    """The columns that a text takes on a terminal: two for a Chinese character, none for an accent over another."""
    return sum(_width(character) for character in text)


def _width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def cut(text: str, room: int) -> str:
    """The beginning of a text that takes at most so many columns, on one line."""
    text, taken = text.replace("\n", " ").replace("\t", " "), 0
    for place, character in enumerate(text):
        taken += _width(character)
        if taken > room:
            return text[:place]
    return text


def table(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(width(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [" " * (most - width(cell)) + cell for most, cell in zip(widths[1:], others, strict=True)]
        lines.append("  ".join([first + " " * (widths[0] - width(first)), *cells]).rstrip())
    return lines


def plural(number: int, noun: str, nouns: str = "") -> str:
    """A number of things: 1 -> '1 step', 1200 -> '1,200 steps'. `nouns` is a plural that is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


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
