"""Where a part of the GPU command puts what it found: a row at a time, on disk before the next is tried."""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

# What a row's verdict may be, and what it means.
VERDICTS = {
    "right": "it is what it has to be",
    "WRONG": "it is not",
    "reached": "the figure that was asked for, or better",
    "missed": "measured, and short of what was asked for",
    "measured": "a figure of which nothing was asked",
    "FAILED": "an error; its last lines are in the row",
    "not measured": "for want of time, hardware or a package, which the row names",
}


@dataclass(frozen=True)
class Row:
    """One line of the result: what was looked at, what was found, what was wanted, and whether it is so."""

    part: str
    name: str
    value: str
    wanted: str
    verdict: str
    facts: dict[str, Any] = field(default_factory=dict)  # the figures behind it, for a program to read
    at: float = 0.0  # seconds after the part began


class Sheet:
    """The rows of one part, with its time: `left` is what a measurement asks before it begins."""

    def __init__(self, out: Path, part: str, seconds: float, tiny: bool) -> None:
        self.out, self.part, self.seconds, self.tiny = out, part, seconds, tiny
        self.began = time.monotonic()
        self.device = torch.device("cpu" if tiny or not torch.cuda.is_available() else "cuda")

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def row(self, name: str, value: str = "", wanted: str = "", verdict: str = "measured", **facts: Any) -> None:
        assert verdict in VERDICTS, verdict
        at = round(time.monotonic() - self.began, 1)
        made = Row(self.part, name, value, wanted, verdict, facts, at)
        with open(self.out / "rows.jsonl", "a") as file:
            file.write(json.dumps(asdict(made)) + "\n")
        print(f"{at:6.1f}  {verdict:<12}  {name}: {value}" + (f" (wanted {wanted})" if wanted else ""), flush=True)

    def check(self, name: str, error: float, bound: float, **facts: Any) -> None:
        """A row for a difference that has to stay within `bound`; NaN does not."""
        verdict = "right" if error <= bound else "WRONG"
        self.row(name, f"{error:.2e}", f"at most {bound:.0e}", verdict, error=error, **facts)

    def reach(self, name: str, value: float, least: float, shown: str, wanted: str, **facts: Any) -> None:
        """A row for a figure that is to be at least so large. (A tiny run's says nothing, and gets no verdict.)"""
        verdict = "measured" if self.tiny else "reached" if value >= least else "missed"
        self.row(name, shown, wanted, verdict, figure=value, **facts)

    def attempt(self, name: str, work: Callable[[], None], needs: float = 0.0) -> None:
        """Does what may fail without the rest failing with it; where fewer than `needs` seconds are left, a row says so
        instead."""
        needs *= 0.1 if self.tiny else 1
        try:
            if self.left() < needs:
                raise Missing(f"needs some {needs:.0f} s and {max(self.left(), 0):.0f} s were left")
            work()
        except Missing as missing:
            self.row(name, str(missing), verdict="not measured")
        except Exception as error:
            lines = "".join(traceback.format_exception(error)).strip().splitlines()
            print("\n".join(lines[-30:]), flush=True)
            said = " ".join(str(error).split())[:200]
            self.row(name, f"{type(error).__name__}: {said}", verdict="FAILED", trace=lines[-30:])
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


class Missing(Exception):
    """Time, a package or a unit of the hardware is wanting."""
