"""Campaigns: many hostile or damaged inputs of one kind, counted. `make test` runs a sample of each; this, all of them.

    python tests/system/campaign.py [--json FILE] [--seed N] [--short] [NAME ...]

prints a table: case, how many were tried, how many passed, seconds. A new campaign is a generator of `Trial`s under the
decorator `campaign`, in a module named in `MODULES`; tests/system/test_campaigns.py then runs its sample.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the modules below register with the module of this name
    sys.modules["campaign"] = sys.modules["__main__"]
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import hypothesis
from harness import Commands
from hypothesis import strategies as st

MODULES = ("hostile_files", "hostile_config", "malformed_data", "flipped_bits", "any_text", "crash")

WORDS = ["the", "king", "and", "queen", "walked", "slowly", "over", "old", "stones;", "nobody", "answered.\n"]
SETTINGS = [
    "data.separator=stones;", "tokenizer.vocab_size=280", "model.family=qwen3", "model.hidden_size=16",
    "model.num_hidden_layers=1", "model.num_attention_heads=2", "train.context=16", "train.batch_tokens=64",
    "train.max_steps=4", "train.checkpoint_every=2", "train.eval_every=4", "train.threads=1", "train.precision=fp32",
    "train.compile=false", "train.tensorboard=false", "generate.max_new_tokens=4",
]  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One input tried: of what kind, and what went wrong (None: nothing)."""

    kind: str
    problem: str | None = None


class Bench:
    """What campaigns work with: a folder, a runner of commands, randomness, and a tiny run to copy and damage."""

    def __init__(self, folder: Path, seed: int = 1) -> None:
        self.folder, self.seed = folder.resolve(), seed
        self.notes: dict[str, Any] = {}  # figures beside the counts, for the table
        self._boxes = 0

    @cached_property
    def commands(self) -> Commands:
        return Commands()

    def draw(self, name: str) -> random.Random:
        """Randomness of its own for each user, so that one more draw here changes nothing there."""
        return random.Random(f"{self.seed} {name}")

    def box(self) -> Path:
        """A new empty folder."""
        self._boxes += 1
        path = self.folder / f"box-{self._boxes}"
        path.mkdir(parents=True)
        return path

    @cached_property
    def text(self) -> str:
        draw = self.draw("text")
        return " ".join(draw.choice(WORDS) for _ in range(600))

    @cached_property
    def recipe(self) -> Path:
        """An empty recipe: every setting is on the command line."""
        path = self.folder / "empty.yaml"
        path.write_text("{}\n")
        return path

    def train(self, run: Path, *settings: str) -> list[Any]:
        """The arguments of the command that trains the tiny run in `run`."""
        text = self.folder / "text.txt"
        if not text.is_file():
            text.write_text(self.text)
        return ["train", self.recipe, f"data.train={text}", *SETTINGS, *settings, "--out", run]

    @cached_property
    def run(self) -> Path:
        """A finished run with two checkpoints. Copy it (`copy`) to damage it."""
        box = self.box()
        done = self.commands(*self.train(box / "run"), box=box)
        assert done.code == 0 and not done.events, (done.err, done.events)
        return box / "run"

    def copy(self, what: Path, name: str | None = None) -> Path:
        """A copy in a box of its own."""
        target = self.box() / (name or what.name)
        shutil.copytree(what, target) if what.is_dir() else shutil.copy2(what, target)
        return target

    def close(self) -> None:
        if "commands" in self.__dict__:
            self.commands.close()


@dataclass
class Campaign:
    """`short` and `full` are how many inputs to ask `trials(bench, count)` for; what it gives is the denominator. One
    that is too slow for `make test` has no short form: 0."""

    name: str
    title: str
    short: int
    full: int
    trials: Callable[[Bench, int], Iterable[Trial]]


CAMPAIGNS: dict[str, Campaign] = {}


def campaign(name: str, title: str, short: int, full: int) -> Callable[..., Any]:
    def register(trials: Callable[[Bench, int], Iterable[Trial]]) -> Callable[[Bench, int], Iterable[Trial]]:
        assert name not in CAMPAIGNS, name
        CAMPAIGNS[name] = Campaign(name, title, short, full, trials)
        return trials

    return register


def examples(strategy: st.SearchStrategy[Any], count: int, seed: int) -> list[Any]:
    """So many values of a strategy, the same for the same seed."""
    made: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(strategy)
    def collect(value: Any) -> None:
        made.append(value)

    collect()
    return made[:count]


@dataclass
class Result:
    """What came of a campaign."""

    name: str
    title: str
    tried: int = 0
    passed: int = 0
    seconds: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


def conduct(chosen: Campaign, bench: Bench, count: int) -> Result:
    """Runs a campaign and counts. One that raises has failed, whatever it tried before."""
    result, kinds, start = Result(chosen.name, chosen.title), Counter[str](), time.perf_counter()
    bench.notes = result.notes
    try:
        for trial in chosen.trials(bench, count):
            kinds[trial.kind] += 1
            result.tried += 1
            result.passed += trial.problem is None
            if trial.problem is not None:
                result.problems.append(f"{trial.kind}: {trial.problem}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a Rust panic is no Exception
        result.problems.append(f"the campaign itself: {type(error).__name__}: {error}")
    result.seconds, result.kinds = round(time.perf_counter() - start, 2), dict(sorted(kinds.items()))
    return result


def load_all() -> dict[str, Campaign]:
    for module in MODULES:
        importlib.import_module(module)
    return CAMPAIGNS


def table(results: Iterable[Result]) -> Iterator[str]:
    yield f"{'case':<6}{'what':<58}{'tried':>8}{'passed':>8}{'seconds':>9}"
    for r in results:
        yield f"{r.name:<6}{r.title:<58}{r.tried:>8,}{r.passed:>8,}{r.seconds:>9.1f}"
        for key, value in r.notes.items():
            yield f"{'':<6}  {key}: {value}"
        for problem, times in Counter(r.problems).most_common(10):
            yield f"{'':<6}  FAILED {times} x {' '.join(problem.split())[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--json", type=Path, help="write counts, kinds, problems and the machine here")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="the sample that `make test` runs")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    known = load_all()
    if unknown := set(options.names) - known.keys():
        parser.error(f"no campaign {sorted(unknown)[0]!r}; there are {', '.join(known)}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.seed)
        try:
            for name in options.names or known:
                print(f"{name}: {known[name].title}", file=sys.stderr, flush=True)
                results.append(conduct(known[name], bench, known[name].short if options.short else known[name].full))
        finally:
            bench.close()
    print("\n".join(table(results)))
    if options.json:
        from gptworks.core.runtime import versions

        facts = {"seed": options.seed, "short": options.short, "when": time.strftime("%Y-%m-%d"), "machine": versions()}
        options.json.write_text(json.dumps({**facts, "results": [vars(r) for r in results]}, indent=2) + "\n")
    sys.exit(any(r.problems for r in results))


if __name__ == "__main__":
    main()
