"""What the benchmarks share: timing a whole process, medians, tables, JSON with the machine beside the figures."""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gptworks.core.runtime import versions


def parser(doc: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the figures here")
    made.add_argument("--runs", type=int, default=5)
    return made


def child(command: list[str], env: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a command to its end: seconds from start to exit, peak resident bytes, and what it printed."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        pid = os.posix_spawnp(
            command[0],
            command,
            {**os.environ, **(env or {})},
            file_actions=[(os.POSIX_SPAWN_DUP2, output.fileno(), 1)],
        )
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    code = os.waitstatus_to_exitcode(status)
    if code:
        sys.exit(f"{' '.join(command)}: exit code {code}\n{text}")
    scale = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * scale, "stdout": text}


def gptworks(*arguments: str, tree: Path | None = None) -> dict[str, Any]:
    """A gptworks command as a process of its own, its JSON result under `result`; of the version in `tree`."""
    env = {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"} if tree else None
    done = child([sys.executable, "-m", "gptworks", *arguments, "--json", "--quiet"], env)
    return {**done, "result": json.loads(done["stdout"])}


def spread(values: list[float], digits: int = 2) -> str:
    """'median (lowest to highest)'."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(title: str, rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def write(path: Path | None, figures: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps({"machine": versions(), **figures}, indent=2) + "\n")
