"""What a busy machine costs: training, generating and evaluating alone, and beside processes that always compute.

What is timed beside a load is timed with one thread beside the same load, and alone, in turn, so that what else changes
on the machine meets all of them. With --before a checkout of another version is trained in turn with this one.

python benchmarks/beside.py --loops 1 2 --runs 3
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from common import child, gptworks, parser, spread, table, write

arguments = parser(__doc__)
arguments.add_argument("--loops", nargs="+", type=int, default=[1, 2])
arguments.add_argument("--recipe", default="shakespeare_char")
arguments.add_argument("--before", help="a checkout of another version, trained alone in turn with this one")
options = arguments.parse_args()
ONE = {"OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many processes beside that compute all the time."""
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in beside:
            process.kill()
            process.wait()


def trained(folder: str, place: str = ".") -> float:
    """Seconds of a whole training, with the package of a folder."""
    command = ["env", "-C", place, sys.executable, "-m", "gptworks", "train", options.recipe]
    return child([*command, "--out", f"{folder}/run", "--fresh", "--quiet"])["seconds"]


def rate(*command: str, env: dict[str, str] | None = None) -> float:
    """Tokens a second that a command tells of itself."""
    before = dict(os.environ)
    os.environ.update(env or {})
    try:
        return gptworks(*command)["result"]["tokens_per_second"]
    finally:
        os.environ.clear()
        os.environ.update(before)


figures: dict[str, list[float]] = {}


def note(name: str, value: float) -> None:
    figures.setdefault(name, []).append(value)
    print(f"{name}: {value:.1f}", flush=True)


with tempfile.TemporaryDirectory() as folder:
    gptworks("train", options.recipe, "--out", f"{folder}/kept")
    model, held_out = f"{folder}/kept/model", f"{folder}/kept/data/validation.jsonl"
    generating = ("generate", model, "--prompt", "The", "--max-new-tokens", "400", "--seed", "1", "--ignore-eos")
    evaluating = ("evaluate", model, "--data", held_out)
    for _ in range(options.runs):
        note("train, alone, s", trained(folder))
        if options.before:
            note("train, alone, the version before, s", trained(folder, options.before))
        for loops in options.loops:
            with busy(loops):
                note(f"train, beside {loops}, s", trained(folder))
        with busy(options.loops[0]):
            for name, command in (("generate", generating), ("evaluate", evaluating)):
                note(f"{name}, beside {options.loops[0]}, tokens/s", rate(*command))
                note(f"{name}, beside {options.loops[0]}, one thread, tokens/s", rate(*command, env=ONE))
        for name, command in (("generate", generating), ("evaluate", evaluating)):
            note(f"{name}, alone, tokens/s", rate(*command))

table(f"median (range) of {options.runs}", [(name, spread(values, 1)) for name, values in figures.items()])
write(options.json, {"figures": figures})
