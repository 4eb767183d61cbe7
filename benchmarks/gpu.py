"""All that is to be learnt from one NVIDIA GPU, in minutes: what is right, how fast it is, how much it takes.

python benchmarks/gpu.py --prepare                 beforehand, where there is a network: wheels and a text
python benchmarks/gpu.py --minutes 8 --out DIR     on the machine with the GPU; no installation, no network
python benchmarks/gpu.py --only right fast         some parts
python benchmarks/gpu.py --tiny                    a rehearsal on a CPU: the same code, small shapes

Every part is a process of its own with its own limit. What is found is in DIR/rows.jsonl as it comes; at the end
DIR/summary.md has a line a row.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_parts import ground

ROOT = Path(__file__).resolve().parents[1]
# In the order of their value: seconds that a part gets at most, on a GPU, and what is looked at.
PARTS = {
    "right": (90, "every GPU path against the CPU or its plain form"),
    "fast": (150, "training speed, beside nanoGPT and transformers; where the time goes"),
    "loss": (190, "whole runs: Tiny Shakespeare to 1.4697, GPT-2 124M on Wikipedia"),
    "decode": (60, "tokens a second for one request"),
    "memory": (60, "estimated memory beside what is taken"),
    "choices": (20, "what the package chooses on this card, and why"),
}
LEAST = 10  # seconds; with less left a part is not begun
TINY = 0.4  # of the seconds, for a rehearsal
LINES = 80  # of the summary


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: 8)")
    arguments.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    arguments.add_argument(
        "--tiny", action="store_true", help="small shapes on the CPU: a rehearsal, not a measurement"
    )
    arguments.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for what is found (runs/gpu)")
    arguments.add_argument(
        "--prepare",
        nargs="*",
        choices=("wheels", "text"),
        help="bring wheels, and the text that is trained on, then end",
    )
    arguments.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in this process
    arguments.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    options.out = options.out.absolute()
    os.chdir(ROOT)  # the prepared shards name their text from here
    places = [str(ROOT), str(ROOT / "benchmarks")]  # nothing needs to be installed
    sys.path[:0] = places
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
    ground.add_wheels()
    if options.prepare is not None:
        for step in options.prepare or ("wheels", "text"):
            ground.STEPS[step]()
        return 0
    if options.part:
        return work(options.part, options.out, options.seconds, options.tiny)
    found = look(options.tiny)
    if found["trouble"]:
        print(f"error: {found['trouble']}", file=sys.stderr)
        return 64
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for old in (options.out / "rows.jsonl", options.out / "summary.md"):
            old.unlink(missing_ok=True)
            old.touch()
    except OSError as error:
        print(f"error: --out {options.out}: {error.strerror}; choose another folder", file=sys.stderr)
        return 74
    print(found["machine"], flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: no part is left behind on the card
        signal.signal(number, signal.default_int_handler)
    stopped = every(options.only or list(PARTS), options.out, options.minutes, options.tiny)
    text = summary(options.out, found["machine"])
    (options.out / "summary.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{options.out / 'summary.md'}")
    if stopped:
        return 75
    if all(row["verdict"] == "not measured" for row in read(options.out)):
        return 1
    rows = read(options.out)
    return 1 if any(row["verdict"] in ("WRONG", "FAILED") for row in rows) else 0


def every(parts: list[str], out: Path, minutes: float, tiny: bool) -> bool:
    """One part after another, for as long as there are minutes; whether somebody stopped it."""
    end = time.monotonic() + 60 * minutes
    for part in parts:
        most, left = PARTS[part][0] * (TINY if tiny else 1), end - time.monotonic()
        if left < min(LEAST, most):
            note(out, part, f"needs {min(LEAST, most):.0f} s at least and {max(left, 0):.0f} s were left")
            continue
        try:
            begin(part, out, min(most, left), tiny)
        except KeyboardInterrupt:
            note(out, part, "stopped")
            return True
    return False


def work(part: str, out: Path, seconds: float, tiny: bool) -> int:
    """A part, in this process."""
    import importlib

    from gpu_parts.sheet import Sheet

    importlib.import_module(f"gpu_parts.{part}").run(Sheet(out, part, seconds, tiny))
    return 0


def look(tiny: bool) -> dict[str, Any]:
    """What stands against measuring here, and what machine this is; by a process of its own."""
    code = f"from gpu_parts import check; check.main({tiny})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return {"trouble": f"the GPU cannot be asked: {' '.join(done.stderr.split())[-300:]}", "machine": ""}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def begin(part: str, out: Path, seconds: float, tiny: bool) -> None:
    """A part as a process, which is ended when its time is over; its last lines are kept if it fails."""
    print(f"\n== {part}: {PARTS[part][1]}; at most {seconds:.0f} s", flush=True)
    command = [
        sys.executable,
        str(ROOT / "benchmarks/gpu.py"),
        "--part",
        part,
        "--seconds",
        f"{seconds - 2:.1f}",
        "--out",
        str(out),
    ]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if tiny else {})
    log = out / f"{part}.log"
    start = time.monotonic()
    with open(log, "wb") as file:
        child = subprocess.Popen(
            command + (["--tiny"] if tiny else []),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        shown = 0
        try:
            while child.poll() is None and time.monotonic() - start < seconds:
                time.sleep(0.2)
                shown = tell(log, shown)
        finally:
            late = child.poll() is None
            if late:
                for pid in (*descendants(child.pid), child.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            code = child.wait()
            tell(log, shown)
    if late:
        note(out, part, f"ended after its {seconds:.0f} s; what is missing was not reached")
    elif code:
        lines = log.read_text("utf-8", "replace").splitlines()[-30:]
        note(out, part, f"exit code {code}: {' '.join(lines[-1:])[:200]}", "FAILED", trace=lines)


def descendants(pid: int) -> list[int]:
    """All processes that one has started, and those have, whatever session they are in (Linux)."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = list(parents.get(pid, []))
    for child in found:
        found += parents.get(child, [])
    return found


def tell(log: Path, shown: int) -> int:
    """Prints the rows that are new in a part's log; all else stays there."""
    text = log.read_bytes()
    whole = text.rfind(b"\n") + 1
    for line in text[shown:whole].decode("utf-8", "replace").splitlines():
        if line[:6].strip().replace(".", "").isdigit():
            print(line[:200], flush=True)
    return whole


def note(out: Path, part: str, text: str, verdict: str = "not measured", **facts: Any) -> None:
    """A row of ours about a whole part."""
    row = {"part": part, "name": part, "value": text, "wanted": "", "verdict": verdict, "facts": facts, "at": 0.0}
    file = out / "rows.jsonl"
    whole = not file.exists() or file.read_bytes()[-1:] in (b"", b"\n")  # a part that was killed may leave half a line
    with open(file, "a") as rows:
        rows.write(("" if whole else "\n") + json.dumps(row) + "\n")
    print(f"{verdict:<12}  {part}: {text}", flush=True)


def read(out: Path) -> list[dict[str, Any]]:
    found = []
    for line in (out / "rows.jsonl").read_text("utf-8", "replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # half a line, of a part that was killed
            found.append(json.loads(line))
    return found


def summary(out: Path, heading: str) -> str:
    """At most LINES lines of Markdown, a row each: what is wrong comes first, and what does not fit is counted."""
    rows = read(out)
    order = {"WRONG": 0, "FAILED": 0, "missed": 1}
    places = {part: number for number, part in enumerate(PARTS)}
    rows.sort(key=lambda row: (order.get(row["verdict"], 2), places[row["part"]]))
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    head = [heading, "", ", ".join(f"{count} {verdict}" for verdict, count in counts.items()), "",
            "| part | what | found | wanted | verdict |", "|---|---|---|---|---|"]  # fmt: skip
    room = LINES - len(head) - 1

    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "/")[:700]

    lines = [
        f"| {row['part']} | {cell(row['name'])} | {cell(row['value'])} | {cell(row['wanted'])} | {row['verdict']} |"
        for row in rows
    ]
    more = [f"and {len(lines) - room} rows more in rows.jsonl"] if len(lines) > room else []
    return "\n".join([*head, *lines[:room], *more]) + "\n"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:  # a full disk; somebody who has read enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"error: {error.filename or 'standard output'}: {error.strerror}; what was found is in rows.jsonl",
              file=sys.stderr)  # fmt: skip
        sys.exit(74)
