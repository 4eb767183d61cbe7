"""Sizes of model at equal time, on several texts: bits per byte of the held-out text, and the size that is chosen.

Each run has as many tokens as its time holds on this machine when nothing else runs, which is measured first; what runs
beside the rest moves no result. Beside what a size reached stands what `gptworks plan` would have expected of so many
tokens. With --json a command that was stopped goes on where it was, and `benchmarks/forecast.py` fits the law to it.

python benchmarks/sizes.py --text novels=books/ --text wiki=wiki.txt,held_out.txt --seconds 60 --sizes 300k 1M 3M chosen
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import gptworks, parser, spread, table, write

from gptworks.planning.forecast import likely_bits, share_of_counting

STARTING, TRAINED = 4.0, 0.93  # seconds before the first step; of the rest, what evaluations and saving leave
STEPS = 14  # to time, of which the first three are not counted

arguments = parser(__doc__)
arguments.add_argument("--text", action="append", required=True, help="NAME=TRAIN or NAME=TRAIN,HELD_OUT")
arguments.add_argument("--seconds", type=float, default=60)
arguments.add_argument("--sizes", nargs="+", default=["300k", "600k", "1.2M", "2.4M", "4.8M", "chosen"])
arguments.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
arguments.add_argument("--set", nargs="*", default=[], help="more settings, key=value")
options = arguments.parse_args()
kept: dict[str, Any] = {"rates": {}, "runs": {}}
if options.json and options.json.exists():
    kept = {key: json.loads(options.json.read_text())[key] for key in kept}


def settings(text: str, size: str) -> list[str]:
    name, _, places = text.partition("=")
    train, _, held_out = places.partition(",")
    data = [f"data.train={train}", "data.eval_bytes=256k", f"data.shards={shards}/{name}"]
    model = [] if size == "chosen" else [f"model.parameters={size}"]
    return [*data, *([f"data.eval={held_out}"] if held_out else []), *model, *options.set]


def planned(text: str) -> dict[str, Any]:
    """What a plan for this time takes."""
    wanted = [*settings(text, "chosen"), f"train.time_budget_s={options.seconds}"]
    sizes = gptworks("plan", *wanted)["result"]["sizes"]
    return next(size for size in sizes if size["name"] == "chosen")


def rate_of(text: str, size: str, rows: str) -> float:
    """Tokens a second when nothing else runs."""
    with tempfile.TemporaryDirectory() as folder:
        few = [f"train.max_steps={STEPS}", "train.batch_tokens=4096", "train.log_every=1", "train.eval_every=1000000"]
        gptworks(
            "train", "mine", *settings(text, size), rows, *few, "train.time_budget_s=null", "--out", f"{folder}/run"
        )
        lines = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
    found = [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line]
    return statistics.median(found[3:])


def expected_of(run: dict[str, Any]) -> float:
    """The bits per byte that the forecast expects of a size and so many tokens."""
    facts = run["facts"]
    text, seen = (facts["bytes_per_token"] * tokens for tokens in (facts["epoch_tokens"], run["tokens"]))
    kind = {"vocab_size": facts["vocab_size"], "bytes_per_token": facts["bytes_per_token"]}
    return likely_bits(share_of_counting(run["parameters"], seen, text), facts["unigram_bits"], **kind)


with tempfile.TemporaryDirectory() as shards:
    cells = [(text, size) for text in options.text for size in options.sizes]
    for text, size in cells:
        key = f"{text} {size} {options.seconds:g}"
        if key not in kept["rates"]:
            plan = planned(text)
            parameters, rows = str(plan["parameters"]) if size == "chosen" else size, f"train.context={plan['context']}"
            kept["rates"][key] = {"parameters": parameters, "rows": rows, "rate": rate_of(text, parameters, rows)}
            print(key, kept["rates"][key], flush=True)
    write(options.json, kept)
    for seed in options.seeds:
        for text, size in cells:
            key = f"{text} {size} {options.seconds:g}"
            if f"{key} {seed}" in kept["runs"]:
                continue
            known = kept["rates"][key]
            limit = int(known["rate"] * TRAINED * (options.seconds - STARTING))
            length = [f"train.max_tokens={limit}", "train.time_budget_s=null", "train.eval_every=1000000"]
            with tempfile.TemporaryDirectory() as folder:
                sized = [*settings(text, known["parameters"]), known["rows"], f"train.seed={seed}"]
                done = gptworks("train", "mine", *sized, *length, "--out", f"{folder}/run")["result"]
                facts = json.loads(Path(f"{folder}/run/choices.json").read_text())["facts"]
            figures = {name: done[name] for name in ("parameters", "steps", "tokens")}
            kept["runs"][f"{key} {seed}"] = {**done["eval"], **figures, "facts": facts}
            print(key, seed, kept["runs"][f"{key} {seed}"], flush=True)
            write(options.json, kept)

for text in options.text:
    found = {}
    for size in options.sizes:
        runs = [kept["runs"][f"{text} {size} {options.seconds:g} {seed}"] for seed in options.seeds]
        found[size] = (runs[0], [run["bits_per_byte"] for run in runs])
    rows = [
        (f"{size}: {first['parameters']:,} parameters, {first['tokens']:,} tokens",
         f"{spread(values, 3)}, expected {expected_of(first):.3f}")
        for size, (first, values) in found.items()
    ]  # fmt: skip
    table(f"{text.partition('=')[0]}, {options.seconds:g} s, {len(options.seeds)} seeds: bits per byte", rows)
    if "chosen" in found:
        middle = {size: statistics.median(values) for size, (_, values) in found.items()}
        apart = max(max(values) - min(values) for _, values in found.values())
        best = min(middle.values())
        print(f"  chosen is {middle['chosen'] / best - 1:.1%} above the best; seeds are {apart / best:.1%} apart")
