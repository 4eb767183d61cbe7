"""The console: on a terminal one live line that moves and fits, below lines that stay; in a pipe those lines alone."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator

import pytest

from gptworks.core import log
from gptworks.core.log import Console, Progress, cut, plural, table, width


class Screen:
    """A terminal of some width, as standard error, and what was written to it."""

    def __init__(self, columns: int) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w")

    def written(self) -> str:
        os.set_blocking(self.master, False)
        text = b""
        while True:
            try:
                text += os.read(self.master, 65536)
            except BlockingIOError:
                return text.decode().replace("\r\n", "\n")

    def lines(self) -> list[str]:
        """Each state of the live line, without what moves the cursor."""
        return re.findall(r"\r\x1b\[K([^\r\n]+)", self.written())


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Screen]]:
    opened = []

    def make(columns: int) -> Screen:
        opened.append(Screen(columns))
        monkeypatch.setattr(sys, "stderr", opened[-1].stream)
        return opened[-1]

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(log.console, "_drawn", 0.0)  # by a test before, a moment ago
    yield make
    monkeypatch.undo()
    for each in opened:
        each.stream.close()
        os.close(each.master)


@pytest.mark.parametrize(
    "text", ["step 5/100  loss 3.1234  30.2k tokens/s", "第一回 甄士隐梦幻识通灵 贾雨村风尘怀闺秀"]
)
@pytest.mark.parametrize("columns", [5, 20, 40, 200])
def test_a_live_line_is_cut_to_the_width(screen: Callable[[int], Screen], text: str, columns: int) -> None:
    terminal, console = screen(columns), Console()
    console.live(text)
    console.clear()
    (line,) = terminal.lines()
    assert width(line) < columns and text.startswith(line)
    assert columns < 200 or line == text


def test_a_live_line_moves_by_itself_and_still_fits(
    screen: Callable[[int], Screen], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "TICK", 0.02)
    terminal, console = screen(20), Console()
    console.live("step 5/100  loss 3.1234")
    console._since -= 7
    time.sleep(0.3)
    console.clear()
    first, *others = terminal.lines()
    assert len(others) >= 3 and {line[-7:] for line in others} == {"(7.0 s)"}
    assert first == "step 5/100  loss 3." and all(line == "step 5/100  (7.0 s)" for line in others)
    time.sleep(0.1)
    assert not terminal.written() and console._ticker is None  # what was cleared comes no more, and its thread ends


def test_a_line_that_stays_stands_above_the_live_one(screen: Callable[[int], Screen]) -> None:
    terminal, console = screen(80), Console()
    console.live("step 5")
    console.say("a result")
    console.clear()
    assert terminal.written() == "\r\x1b[Kstep 5\r\x1b[Ka result\n\r\x1b[Kstep 5\r\x1b[K"


def test_a_line_that_is_live_and_then_stays_is_drawn_once(screen: Callable[[int], Screen]) -> None:
    terminal, console = screen(80), Console()
    console.live("step 5")
    terminal.written()
    console.say("step 5")
    assert terminal.written() == "\r\x1b[Kstep 5\n"
    console.clear()


def test_live_lines_are_drawn_ten_times_a_second_at_most(screen: Callable[[int], Screen]) -> None:
    terminal, console = screen(80), Console()
    for number in range(1000):
        console.live(f"step {number}")
    console.clear()
    assert len(terminal.lines()) <= 3


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {}])
def test_colour_and_the_live_line_go_by_the_terminal(
    screen: Callable[[int], Screen], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    terminal, console = screen(80), Console()
    console.say("data     10 documents")
    console.say("step  5/10  eval loss 2.0")
    console.warn("of this")
    console.fail("of that")
    console.live("step 6")
    console.clear()
    seen = terminal.written()
    assert ("\x1b[36mdata\x1b[0m     10" in seen) == ("\x1b[33mwarning:\x1b[0m of this" in seen) == (not environment)
    assert ("step 6" in seen) == (environment.get("TERM") != "dumb")
    assert re.sub(r"\x1b\[[\d;]*m", "", seen).startswith(
        "data     10 documents\nstep  5/10  eval loss 2.0\nwarning: of this\nerror: of that\n"
    )


def test_a_pipe_gets_the_lines_that_stay_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.live("step 5")
    console.say("data     10 documents")
    for _ in range(3):
        console.now_and_then("saved    here")
    console.fail("stopped by Ctrl-C", asked=True)
    assert console._ticker is None
    assert capsys.readouterr().err == "data     10 documents\n" + "saved    here\n" * 3 + "stopped by Ctrl-C\n"


def test_what_comes_often_is_said_now_and_then_on_a_terminal(screen: Callable[[int], Screen]) -> None:
    terminal, console = screen(80), Console()
    for number in range(5):
        console.now_and_then(f"saved    step-{number}")
    assert terminal.written().count("step-") == 1
    console._said["saved"] -= log.NOW_AND_THEN
    console.now_and_then("saved    step-5")
    assert "step-5" in terminal.written()


def test_progress_tells_share_rate_and_time_left(screen: Callable[[int], Screen]) -> None:
    terminal = screen(80)
    progress = Progress("scoring", 2000, "tokens")
    progress.start -= 1
    progress.add(500)
    log.console.clear()
    assert re.fullmatch(r"scoring   25%  (49\d|500) tokens/s  3\.0 s left", terminal.lines()[0])


@pytest.mark.parametrize(
    ("text", "room", "shown"),
    [("abc", 2, "ab"), ("红楼梦", 5, "红楼"), ("e\u0301a", 1, "e\u0301"), ("a\nb\tc", 9, "a b c"), ("", 0, "")],
)
def test_text_is_cut_by_the_columns_it_takes(text: str, room: int, shown: str) -> None:
    assert cut(text, room) == shown and width(shown) <= room


def test_a_table_lines_up_whatever_the_letters() -> None:
    rows = table([["run", "loss"], ["红楼梦", "1.5"], ["b", "10.25"]])
    assert rows == ["run      loss", "红楼梦    1.5", "b       10.25"]


def test_one_thing_is_not_several() -> None:
    assert [plural(n, "step") for n in (0, 1, 2, 1200)] == ["0 steps", "1 step", "2 steps", "1,200 steps"]
    assert plural(1, "copy", "copies") == "1 copy" and plural(3, "copy", "copies") == "3 copies"
