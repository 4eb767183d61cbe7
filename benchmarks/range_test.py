"""The rates that the range test proposes, trained with: from those of the dial, and from rates ten times off.

A case is NAME=SETTINGS of the recipe `mine`, or NAME=RECIPE,SETTINGS. Printed is the loss in nats a token after
--steps steps with the rates of the dial or the recipe, and with those proposed from them, from a tenth and from ten
times as much. Exit code 1 where a proposal from the first is worse than they are.

python benchmarks/range_test.py --case "muon=data.train=books/" --case "sgd=data.train=books/ train.optimizer=sgd"
"""

import sys
import tempfile
from pathlib import Path

from common import gptworks, parser, table, write

from gptworks.core.config import RunFile

arguments = parser(__doc__)
arguments.add_argument("--case", action="append", required=True)
arguments.add_argument("--steps", type=int, default=300)
arguments.add_argument("--set", nargs="*", default=[], help="settings of all cases, key=value")
options = arguments.parse_args()


def trained(*settings: str) -> tuple[float, dict[str, float | None]]:
    """The loss that a run reaches, in nats a token of what is held out, and the rates that it had."""
    with tempfile.TemporaryDirectory() as folder:
        done = gptworks("train", *settings, "--out", f"{folder}/run")["result"]
        chosen = RunFile.read(Path(folder) / "run" / "config.yaml").chosen.train
        return done["eval"]["loss"], {"lr": chosen.lr, "adam_lr": chosen.adam_lr}


def rates(found: dict[str, float | None]) -> list[str]:
    return [f"train.{name}={found[name]:g}" for name in ("lr", "adam_lr") if found[name]]


kept: dict[str, dict[str, dict[str, float]]] = {}
for case in options.case:
    name, _, asked = case.partition("=")
    recipe, _, rest = asked.partition(",") if "=" not in asked.partition(",")[0] else ("mine", "", asked)
    with tempfile.TemporaryDirectory() as shards:
        length = [f"train.max_steps={options.steps}", "train.time_budget_s=null", "train.eval_every=1000000"]
        common = [recipe, *length, *options.set, *rest.split(), f"data.shards={shards}"]
        loss, before = trained(*common)
        reached = {before["lr"]: loss}
        figures = kept[name] = {"as planned": {"lr": before["lr"], "loss": loss}}
        for factor in (1.0, 0.1, 10.0):
            off = {key: value and value * factor for key, value in before.items()}
            found = gptworks("train", *common, *rates(off), "train.find_lr=true", "--out", f"{shards}/scan")["result"]
            if found["lr"] not in reached:
                reached[found["lr"]], _ = trained(*common, *rates(found))
            figures[f"from {factor:g} times"] = {"lr": found["lr"], "loss": reached[found["lr"]]}
        rows = [
            (f"{start}: {figure['lr']:g}", f"{figure['loss']:.3f}  {figure['loss'] / loss - 1:+.1%}")
            for start, figure in figures.items()
        ]
        table(f"{name}, {options.steps} steps: rate, nats a token", rows)
    write(options.json, kept)
sys.exit(any(case["from 1 times"]["loss"] > case["as planned"]["loss"] for case in kept.values()))
