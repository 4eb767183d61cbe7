"""Training speed and memory of our loop, `transformers` with fused AdamW, and a tutorial's loop, on GPT-2 shapes.

Each measurement is a process of its own: warm-up steps, then timed ones on random tokens. Each also measures its matmul
rate over several sizes; utilisation is of the best found so far by any. FLOPs a token are 6 for each parameter but the
input tables', plus causal attention.

python benchmarks/train_speed.py --sizes 1M 10M --contexts 256 1024 --runs 3
python benchmarks/train_speed.py --sizes 124M --precision bf16 --json speed.json
python benchmarks/train_speed.py --sizes 124M --contexts 256 --tokens 1024 --lora 16
python benchmarks/train_speed.py --sizes 1M 10M --contexts 256 --moe --runs 3
"""

import json
import statistics
import sys
import time
from itertools import product
from typing import Any

from common import child, parser, spread, write

SIZES: dict[str, dict[str, int]] = {
    "1M": {"width": 128, "layers": 4, "heads": 4, "vocabulary": 1024},
    "10M": {"width": 384, "layers": 6, "heads": 6, "vocabulary": 1024},
    "124M": {"width": 768, "layers": 12, "heads": 12, "vocabulary": 50257},
    "1.5B": {"width": 1600, "layers": 48, "heads": 25, "vocabulary": 50257},
}
ROW = "{:>5} {:>7} {:<18} {:>24} {:>20} {:>8} {:>8}"
WHO = {"ours": "gptworks", "experts": "eight experts", "transformers": "transformers", "textbook": "a tutorial's loop"}


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Steps of one of the three in this process."""
    import torch

    from gptworks.core import runtime
    from gptworks.core.config import Adapter, Model
    from gptworks.model.config import build_config
    from gptworks.planning.cost import Trainable, flops_per_token

    device = runtime.device()
    dtype = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    torch.set_flush_denormal(True)  # as our runs do; for all
    if device.type == "cpu":
        torch.set_num_threads(runtime.cores())
    shape = SIZES[job["size"]] | {"context": job["context"]}
    sizes = {"hidden_size": shape["width"], "num_hidden_layers": shape["layers"], "num_attention_heads": shape["heads"]}
    if job["moe"]:  # two of eight experts have the weights of the dense MLP
        inner = 4 * shape["width"]
        experts = {"family": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": inner // 2}
        chosen = Model(
            intermediate_size=inner, **sizes, **(experts if job["who"] == "experts" else {"family": "qwen3"})
        )
    else:
        chosen = Model(family="gpt2", **sizes)
    config = build_config(chosen, shape["vocabulary"], shape["context"])
    adapter = Adapter(kind="lora", rank=job["lora"], base=job["precision"]) if job["lora"] else None
    held = {"bf16": 2.0, "fp32": 4.0}
    part = Trainable.of(config, adapter, [], held[job["precision"]]) if adapter else None
    if job["who"] in ("ours", "experts"):
        seconds, tokens = ours(job, config, adapter, device, dtype)
    else:
        seconds, tokens = peer(job, shape, device, dtype)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else runtime.peak_memory()
    rate = runtime.matmul_rate(device, dtype, 1.0)
    speed = tokens / statistics.median(seconds)
    return {
        "tokens_per_second": speed, "flops": speed * flops_per_token(config, shape["context"], part),
        "peak_bytes": peak, "matmul_flops": rate, "rows": tokens // shape["context"],
    }  # fmt: skip


def rows_of(job: dict[str, Any]) -> int:
    return max(1, job["tokens"] // job["context"])


def ours(job: dict[str, Any], config: Any, adapter: Any, device: Any, dtype: Any) -> tuple[list[float], int]:
    """The loop of the package, as `gptworks train` runs it."""
    import numpy as np
    import torch

    from gptworks.core import runtime
    from gptworks.core.config import Config
    from gptworks.data.loader import Loader
    from gptworks.data.shards import Stream
    from gptworks.model import build
    from gptworks.model.adapters import attach
    from gptworks.planning.choices import Base, Facts
    from gptworks.planning.choose import choose
    from gptworks.planning.machine import here
    from gptworks.training.loop import Layout, run
    from gptworks.training.objectives import NextToken
    from gptworks.training.optim import make_optimizers
    from gptworks.training.schedule import RunSchedule
    from gptworks.training.state import State

    runtime.reuse_memory()
    rates = {"lr": 1e-4, "adam_lr": 1e-4, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.1}
    shape = {"context": job["context"], "threads": torch.get_num_threads(), "compile": job["compile"]}
    rows = rows_of(job)
    own = {"workers": job["workers"] or None, "micro_batch": job["micro_batch"] or None}
    steady = {"optimizer": job["optimizer"], "max_steps": 10**6, "eval_every": 10**6, "checkpoint_every": 10**6}
    asked = Config.model_validate({"train": {
        **rates, **shape, **steady, **own, "batch_tokens": rows * job["context"], "precision": job["precision"],
    }})  # fmt: skip
    facts = Facts(config.vocab_size, 10**9, base=Base("this model", config))
    train = choose(asked, facts, here(job["precision"])).chosen.train
    steps = job["warmup"] + job["steps"]
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (steps + 2) * rows * job["context"] + 2)
    loader = Loader(Stream(ids, np.zeros(1, dtype=np.int64), len(ids)), job["context"], rows, 1)
    model = build.fresh(config, 1)
    model = (attach(model, adapter, 1) if adapter else model).to(device)
    layout = Layout(device, dtype, train.micro_batch, job["compile"])
    seconds: list[float] = []

    def watch(state: State, m: Any) -> None:
        seconds.append(m.seconds)

    state = State(model, make_optimizers(model, train))
    run(state, loader, NextToken(train), train=train, layout=layout, schedule=RunSchedule(train), hooks=[watch],
        until=steps)  # fmt: skip
    return seconds[job["warmup"] :], rows * job["context"]


def peer(job: dict[str, Any], shape: dict[str, int], device: Any, dtype: Any) -> tuple[list[float], int]:
    import torch
    from baselines import textbook_loop, transformers_loop

    loop = {"transformers": transformers_loop, "textbook": textbook_loop}[job["who"]]
    made = loop.step(shape, device, dtype, **({"lora": job["lora"]} if job["lora"] else {}))
    rows, seconds = rows_of(job), []
    for _ in range(job["warmup"] + job["steps"]):
        ids = torch.randint(shape["vocabulary"], (rows, shape["context"] + 1), device=device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        made(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[job["warmup"] :], rows * shape["context"]


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.set_defaults(runs=1)
    arguments.add_argument("--sizes", nargs="+", choices=SIZES, default=["1M", "10M", "124M"])
    arguments.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 4096])
    arguments.add_argument("--who", nargs="+", choices=WHO, default=["ours", "transformers", "textbook"])
    arguments.add_argument("--tokens", type=int, default=4096, help="of a step; at least one row")
    arguments.add_argument("--micro-batch", type=int, help="rows of our forward passes (default: as a run chooses)")
    arguments.add_argument("--workers", type=int, help="of ours, as train.workers (default: as a run chooses)")
    arguments.add_argument("--steps", type=int, default=5, help="timed, after --warmup")
    arguments.add_argument("--warmup", type=int, default=2)
    arguments.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments.add_argument("--optimizer", default="adamw", help="ours; the others take AdamW")
    arguments.add_argument("--compile", action="store_true", help="ours")
    arguments.add_argument("--lora", type=int, default=0, help="rank of adapters on a frozen model; PEFT's beside ours")
    arguments.add_argument("--moe", action="store_true", help="a model with experts beside a dense one, both ours")
    options = arguments.parse_args()
    if options.moe:
        options.who = ["ours", "experts"]
    if options.lora:
        options.who = [who for who in options.who if who != "textbook"]
    rows: list[dict[str, Any]] = []
    names = ("tokens", "steps", "warmup", "precision", "optimizer", "compile", "lora", "moe")
    common = {name: getattr(options, name) for name in names}
    for size, context in product(options.sizes, options.contexts):
        found: dict[str, list[dict[str, float]]] = {who: [] for who in options.who}
        for _ in range(options.runs):  # in turns, so that all meet the same machine
            for who in options.who:
                job = {**common, "who": who, "size": size, "context": context, "micro_batch": options.micro_batch,
                       "workers": options.workers}  # fmt: skip
                done = child([sys.executable, __file__, json.dumps(job)])
                found[who].append(json.loads(done["stdout"].splitlines()[-1]))
                speed = found[who][-1]["tokens_per_second"]
                print(f"{size} {context} {WHO[who]}: {speed:,.0f} tokens/s", file=sys.stderr, flush=True)
        rows += [{"size": size, "context": context, "who": who, "runs": each} for who, each in found.items()]
        write(options.json, {"options": {k: v for k, v in vars(options).items() if k != "json"}, "rows": rows})
    show(rows, common)


def show(rows: list[dict[str, Any]], common: dict[str, Any]) -> None:
    rate = max(one["matmul_flops"] for row in rows for one in row["runs"])
    asked = ", ".join(f"{name} {value}" for name, value in common.items())
    print(f"{asked}; shares of {rate / 1e9:.0f} GFLOP/s, the best matmul rate that any found")
    print(ROW.format("size", "context", "who", "tokens/s", "% of matmul rate", "peak GB", "to ours"))
    speeds = {(row["size"], row["context"], row["who"]): [r["tokens_per_second"] for r in row["runs"]] for row in rows}
    for row, (place, own) in zip(rows, speeds.items(), strict=True):
        pairs = zip(own, speeds.get((*place[:2], "ours"), own), strict=True)
        ratio = statistics.median(speed / ours for speed, ours in pairs)
        peak = statistics.median(one["peak_bytes"] for one in row["runs"]) / 1e9
        used = spread([100 * one["flops"] / rate for one in row["runs"]], 0)
        size, context, who = place
        print(ROW.format(size, context, WHO[who], spread(own, 0), used, f"{peak:.2f}", f"{ratio:.2f}"))


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    else:
        main()
