"""Whether two versions of gptworks train the same bits: `python benchmarks/same_bits.py OLD [NEW]`.

OLD and NEW are commits; NEW is the working tree if left out. Both train the same short runs on this machine, by their
commands alone, and for each run the losses of all steps, the evaluations, and the SHA-256 of every tensor of the last
checkpoint (weights, optimizer state, average, best weights) and its counters are compared. Then NEW continues each run
from the checkpoint that OLD left half-way, and must end where OLD alone did. Exit code 1 if a row differs.

The golden losses of the tests agree between processors to rounding only, and `gptworks verify` compares a version with
itself; this compares versions, to the bit, where it runs. `--only TEXT` keeps the rows whose name has TEXT.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).parent.parent
STEPS = 20
# What the clock decides goes; all else of a recipe stays, down to shapes that a laptop trains in seconds.
SHORT = {"train.max_steps": STEPS, "train.max_tokens": None, "train.max_epochs": None, "train.time_budget_s": None,
         "train.checkpoint_every": STEPS // 2, "train.eval_every": 5, "train.log_every": 1, "train.threads": 2,
         "train.tensorboard": False, "generate.prompts": [""], "generate.max_new_tokens": 4}  # fmt: skip
SMALL = {"model.hidden_size": 64, "model.num_hidden_layers": 2, "model.num_attention_heads": 2,
         "tokenizer.vocab_size": 512, "train.context": 64, "train.batch_tokens": 1024}  # fmt: skip
TINY = {"model.family": "qwen3", "train.context": 64, "train.batch_tokens": 1024} | SMALL
BASE = "base"  # the run whose model the adapters start from


@dataclass(frozen=True)
class Case:
    """A short run: a recipe (None: an empty one) with overrides, on so many processes."""

    name: str
    recipe: str | None
    values: dict[str, Any]
    processes: int = 1
    needs_base: bool = False


def cases() -> list[Case]:
    """Every recipe, then what recipes leave out."""
    recipes = sorted(path.stem for path in (ROOT / "gptworks/recipes").glob("*.yaml"))
    large = {"gpt2_124m": SMALL, "gpt2_classic": SMALL, "textbook": SMALL | {"model.intermediate_size": 128},
             "gpt2_124m_moe": SMALL | {"model.moe_intermediate_size": 64},
             "shakespeare_char_best": {k: v for k, v in SMALL.items() if not k.startswith("tokenizer")}}  # fmt: skip
    own_text = ("cpu_5min", "gpt2_124m", "gpt2_classic", "gpt2_124m_moe", "lora")
    found = []
    for recipe in recipes:
        values = {"data.train": "shakespeare"} if recipe in own_text else {}
        values |= {"train.context": 64, "train.batch_tokens": 1024} if recipe == "lora" else large.get(recipe, {})
        found.append(Case(recipe, recipe, values, needs_base=recipe == "lora"))
    documents = {"data.separator": "\n\n", "data.mask_documents": True}
    lora = {"data.train": "shakespeare", "train.context": 64, "train.batch_tokens": 1024}
    more: dict[str, dict[str, Any]] = {
        "muon": {},
        "adamw": {"train.optimizer": "adamw", "train.schedule": "cosine", "train.l2": 0.001, "train.weight_decay": 0.1},
        "adam": {"train.optimizer": "adam", "train.label_smoothing": 0.1, "train.z_loss": 1e-4},
        "sgd": {"train.optimizer": "sgd", "train.l1": 1e-5, "train.schedule": "step"},
        "dropout": {"model.dropout": 0.1},
        "ema": {"train.ema": 0.95},
        "patience": {"train.patience": 3, "train.skip_spikes": 4},
        "masked documents": documents,
        "one worker": {"train.workers": 1, **documents},
        "two workers": {"train.workers": 2, "train.micro_batch": 4, **documents},
        "canonical": {"train.reduce": "canonical"},
        "mixture": {"data.train": [{"path": "shakespeare", "weight": 2}, {"path": "hongloumeng", "weight": 1}]},
        "full batch": {"train.batch_tokens": "full", "data.eval_fraction": 0.96, "train.max_steps": 4,
                       "train.checkpoint_every": 2, "train.eval_every": 2},
        "experts": {"model.family": "qwen3_moe", "model.num_experts": 4, "model.num_experts_per_tok": 2,
                    "model.moe_intermediate_size": 64, "train.router_z_loss": 0.001},
        "gpt2 parts": {"model.family": "gpt2", "model.positions": "sinusoidal", "model.activation": "relu"},
        "bf16": {"train.precision": "bf16"},
        "frozen": {"train.freeze": ["*.embed_tokens.*"]},
    }  # fmt: skip
    found += [Case(name, None, {**TINY, **values}) for name, values in more.items()]
    for name, values in {"lora dropout": {"adapter.dropout": 0.1}, "lora nf4": {"adapter.base": "nf4"},
                         "dora bf16": {"adapter.base": "bf16", "adapter.use_dora": True}}.items():  # fmt: skip
        found.append(Case(name, "lora", lora | values, needs_base=True))
    for reduce in ("sum", "canonical"):
        values = {**TINY, "train.reduce": reduce, "train.threads": 1, **documents}
        found.append(Case(f"two processes, {reduce}", None, values, processes=2))
    return found


def tree_of(commit: str | None, place: Path) -> Path:
    """A folder with the package as of a commit; the working tree for None."""
    if commit is None:
        return ROOT
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    target = place / commit
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(target, filter="data")
    return target


def train(tree: Path, case: Case, out: Path, base: Path) -> None:
    """Runs `gptworks train` of that tree. Raises SystemExit with what it printed where it fails."""
    empty = out.parent / "empty.yaml"
    empty.parent.mkdir(parents=True, exist_ok=True)
    empty.write_text("{}\n")
    values = SHORT | case.values | ({"model.path": str(base)} if case.needs_base else {})
    spelled = [f"{key}={json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value}"
               for key, value in values.items()]  # fmt: skip
    python = [sys.executable]
    if case.processes > 1:
        python += ["-m", "torch.distributed.run", f"--nproc-per-node={case.processes}", "--master-port=29517"]
    command = [*python, "-m", "gptworks", "train", case.recipe or str(empty), *spelled, "--out", str(out), "--quiet"]
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{case.name}: exit code {done.returncode}\n{done.stderr[-3000:]}")


def trace(run: Path) -> dict[str, Any]:
    """All that two runs have to have in common: figures of each step, tensors and counters of the last checkpoint."""
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    traced: dict[str, Any] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for key in ("train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "eval/loss", "sample"):
            if key in row:
                traced[f"{key} at step {row['step']}"] = row[key]
    for file in sorted(last.glob("*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            for name in sorted(tensors.keys()):
                value = tensors.get_tensor(name)
                traced[f"{file.stem} {name}"] = hashlib.sha256(value.tobytes() + str(value.shape).encode()).hexdigest()
    counters = json.loads((last / "state.json").read_text())
    best = counters.get("best_loss", counters.get("best_figure"))
    traced |= {key: counters[key] for key in ("step", "tokens", "evals_since_best", "skipped", "norms", "cursor")}
    result = json.loads((run / "result.json").read_text())
    return traced | {"best": best, "eval": result["eval"], "sources": result["sources"]}


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first thing that is not the same in both, or None. Evaluations move no bit of a training, and may differ by
    the order in which their sums are made."""
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key, "absent"), new.get(key, "absent")
        if key.startswith("eval/loss") or key in ("best", "eval"):
            before, after = (figures(value) for value in (before, after))
            if all(abs(a - b) <= 1e-6 * abs(a) for a, b in zip(before, after, strict=True)):
                continue
        if before != after:
            return f"{key}: {str(old.get(key, 'absent'))[:40]} and {str(new.get(key, 'absent'))[:40]}"
    return None


def figures(value: Any) -> list[float]:
    return [float(v) for v in value.values()] if isinstance(value, dict) else [float(value or 0.0)]


def halved(run: Path, copy: Path) -> None:
    """A copy of a finished run as it was at its older checkpoint."""
    shutil.copytree(run, copy)
    newest = sorted((copy / "checkpoints").glob("step-*"))[-1]
    shutil.rmtree(newest)
    shutil.rmtree(copy / "model")
    (copy / "result.json").unlink()


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("old", help="a commit")
    made.add_argument("new", nargs="?", help="a commit; left out: the working tree")
    made.add_argument("--only", default="", help="rows whose name has this text")
    made.add_argument("--keep", type=Path, help="keep the runs of OLD here, and take those that are there")
    options = made.parse_args()
    old = subprocess.run(["git", "rev-parse", "--short=12", options.old], cwd=ROOT, capture_output=True, text=True,
                         check=True).stdout.strip()  # fmt: skip
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        trees = tree_of(old, place), tree_of(options.new, place)
        before = (options.keep or place).resolve() / f"runs-{old}"

        def of_old(case: Case, base: Path) -> Path:
            out = before / case.name.replace(" ", "_").replace(",", "")
            if not (out / "result.json").is_file():
                shutil.rmtree(out, ignore_errors=True)
                train(trees[0], case, out, base)
            return out

        base = of_old(Case(BASE, None, {**TINY, "data.train": "shakespeare"}), Path()) / "model"
        for case in cases():
            if options.only not in case.name:
                continue
            start = time.perf_counter()
            theirs = of_old(case, base)
            ours, continued = place / "new", place / "continued"
            train(trees[1], case, ours, base)
            halved(theirs, continued)
            train(trees[1], case, continued, base)
            expected = trace(theirs)
            rows = {"trained": difference(expected, trace(ours)), "continued": difference(expected, trace(continued))}
            seconds = time.perf_counter() - start
            said = "; ".join(f"{what} {found or 'equal'}" for what, found in rows.items())
            print(f"{case.name:<28} {len(expected):>4} values  {said}  ({seconds:.0f} s)", flush=True)
            failed += any(rows.values())
            shutil.rmtree(ours)
            shutil.rmtree(continued)
    print(f"{failed} rows differ" if failed else "every row is equal")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
