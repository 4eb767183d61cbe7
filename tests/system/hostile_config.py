"""P25: settings nobody means. Whatever is asked for, `train` begins its work or says one line, and writes nothing."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from campaign import Bench, Trial, campaign, examples
from harness import mistake
from hypothesis import strategies as st

from gptworks.core import config

KEYS = list(config.keys())
NEVER_NUMBERS = ["nan", "-1", "1e400", "-inf", "true", "yes", "٣", "¹", "1,5", "0x10", "1e", "", " ", "${HOME}",
                 "$(id)", "~", "[1]", "{a: 1}", "None", "9" * 5000, "1_", "_", ".", "--1", "1 2", "[[]]", "!!int x",
                 "&a", "*a", "\udcff", "1\x00", "1e99999999"]  # fmt: skip
ATOMS = [*NEVER_NUMBERS, "0", "1", "0.5", "1e30", str(2**63), str(10**15), "-0", "null", "false", "1e-400", "x", "..",
         "a.b", "[a, b]", "{}", "[]", "\x00", "\n", "é" * 99, "x" * 9999, "%s%n", "{{7*7}}", "a,b", "="]  # fmt: skip
TYPOS = ["train.max_stesp", "trian.lr", "train..lr", "train", "", ".", "a.b.c", "TRAIN.LR", "train.lr.x", "model.a",
         "__class__", "train.__init__", "model_config", "stages.0", "data.train.0", "train.lr "]  # fmt: skip


def takes_only_numbers(key: str) -> bool:
    """Whether no text is a good value of a key, except where it spells a number."""

    def members(annotation: Any) -> Iterator[Any]:
        inner = get_args(annotation)
        if not inner or hasattr(annotation, "__metadata__"):
            yield inner[0] if inner else annotation
        for part in inner if not hasattr(annotation, "__metadata__") else ():
            yield from members(part)

    return all(kind in (int, float, type(None)) for kind in members(config.keys()[key].annotation))


NUMBERS = [key for key in KEYS if takes_only_numbers(key)]

VALUES = st.one_of(
    st.sampled_from(ATOMS),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=30),
    st.text(alphabet="0123456789.eE+-_kMBGT٣１ []{},:", max_size=14),
)
NAMES = st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS), st.sampled_from(TYPOS), st.text(max_size=10))
OVERRIDES = st.lists(st.builds("{}={}".format, NAMES, VALUES) | VALUES, min_size=1, max_size=3)
NODES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(ATOMS) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
SECTIONS = st.sampled_from(["data", "tokenizer", "model", "train", "generate", "stages", "trian"])
LEAVES = st.sampled_from([key.rpartition(".")[2] for key in KEYS]) | st.text(max_size=5)
TREES = st.dictionaries(
    SECTIONS, st.dictionaries(LEAVES, NODES, min_size=1, max_size=2) | NODES, min_size=1, max_size=2
)


def mutated(draw: random.Random, text: str) -> str:
    """A few characters of a recipe gone, doubled or replaced."""
    for _ in range(draw.randint(1, 4)):
        place, width = draw.randrange(len(text)), draw.choice((0, 1, 1, 5))
        text = (
            text[:place]
            + draw.choice(["", *"{}[]:,-&*!|>'\"#%@` \n\t\0é", "9" * 400, "<<: *a"])
            + text[place + width :]
        )
    return text


@campaign("P25", "hostile configuration: one line, exit 64 or 65, nothing written", 200, 9000)
def hostile_config(bench: Bench, count: int) -> Iterator[Trial]:
    draw, box = bench.draw("P25"), bench.box()
    grid = [(key, value) for key in NUMBERS for value in NEVER_NUMBERS]
    grid += [(key, "x" * 10_000_000) for key in NUMBERS[:2]] if count > 1000 else []
    draw.shuffle(grid)
    grid = grid[: max(count // 6, 1)]
    share = (count - len(grid)) // 4
    wrong = [atom for atom in ATOMS if atom != "{}"]  # which empties a section, and may
    yield from attempt(bench, box, "number", [[f"{key}={value}"] for key, value in grid], (64,))
    yield from attempt(bench, box, "override", examples(OVERRIDES, share, bench.seed), (0, 64, 65))
    yield from attempt(
        bench, box, "typo", [[f"{draw.choice(TYPOS)}={draw.choice(wrong)}"] for _ in range(share)], (64,)
    )

    recipes = [config.recipe_text(name) for name in config.recipe_names()]
    trees = examples(TREES, share, bench.seed)
    texts = [(f"{n}.yaml", yaml.safe_dump(tree)) for n, tree in enumerate(trees)]
    texts += [(f"m{n}.yaml", mutated(draw, draw.choice(recipes))) for n in range(count - len(grid) - 3 * share)]
    for name, text in texts:
        (box / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    yield from attempt(bench, box, "recipe", [[]] * len(texts), (0, 64, 65), [name for name, _ in texts])


def attempt(
    bench: Bench, box: Path, kind: str, overrides: Sequence[Sequence[str]], codes: tuple[int, ...],
    recipes: Sequence[str] = (),
) -> Iterator[Trial]:  # fmt: skip
    """Gives each list of overrides to `train`, to every second one with --dry-run, and looks for what was written."""
    commands = [
        ["train", recipes[number] if recipes else "laptop", *given, *(["--dry-run"] if number % 2 else [])]
        for number, given in enumerate(overrides)
    ]
    before = sorted(path.name for path in box.iterdir())
    position = 0
    while position < len(commands):
        outcomes = bench.commands.many(commands[position : position + 100], box, timeout=120, stage=False)
        for command, outcome in zip(commands[position:], outcomes, strict=False):
            problem = mistake(outcome, *codes)
            if not problem and sorted(path.name for path in box.iterdir()) != before:
                problem = "something was written"
            what = " ".join(command[1:])[:200]
            ended = {0: "accepted", 64: "refused", 65: "no such text"}.get(outcome.code, "")
            yield Trial(f"{kind}, {ended}" if kind != "number" else kind, problem and f"{what!r}: {problem}")
        position += len(outcomes)


OPTIONS: dict[str, list[str]] = {
    "generate": ["--max-new-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed",
                 "--stop", "--prompt"],
    "evaluate": ["--context", "--stride", "--batch", "--separator", "--text-column", "--data"],
}  # fmt: skip


@campaign("P25o", "hostile options of generate and evaluate", 20, 15 * (len(ATOMS) + 6))
def hostile_options(bench: Bench, count: int) -> Iterator[Trial]:
    box = bench.box()
    model, text = bench.run / "model", bench.run / "data" / "validation.jsonl"
    usual = {"generate": ["--prompt", "the", "--max-new-tokens", "2"], "evaluate": ["--data", text, "--context", "16"]}
    atoms = [*ATOMS, "-5", "1e-30", "1e30", str(2**31), str(2**64), str(10**30)]
    pairs = [(command, option, atom) for command, options in OPTIONS.items() for option in options for atom in atoms]
    for command, option, atom in bench.draw("P25o").sample(pairs, min(count, len(pairs))):
        if option == "--max-new-tokens" and atom in (str(2**31), str(2**63), str(10**15), str(2**64), str(10**30)):
            atom = "-" + atom  # a wish for so much text is no mistake, nor is the whole of a home folder
        atom = "~/nothere" if (option, atom) == ("--data", "~") else atom
        outcome = bench.commands(command, model, *usual[command], f"{option}={atom}", box=box, timeout=30)
        problem = mistake(outcome, 0, 64, 65, *([74] if option == "--data" else []))  # 74: no name of a file
        yield Trial(f"{command} {option}", problem and f"{option}={atom[:60]!r}: {problem}")
