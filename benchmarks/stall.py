"""How long a checkpoint of a 124 M parameter GPT-2 with AdamW holds up its training.

Trains the model on a few tokens a step, with a checkpoint at every other step, and prints three figures, medians and
ranges: the seconds in which training stands still for the checkpoint (starting it, and waiting before the next update
until its tensors have been read), how much longer than its neighbours the step beside it takes (the writing shares the
cores), and the seconds until the checkpoint is durable.

python benchmarks/stall.py
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import parser, spread, table, write

from gptworks.core.config import Model, Train
from gptworks.data.loader import Loader
from gptworks.data.shards import Stream
from gptworks.model import build
from gptworks.model.config import build_config, parameter_count
from gptworks.training.loop import Layout, StepMetrics, run
from gptworks.training.objectives import NextToken
from gptworks.training.optim import make_optimizers
from gptworks.training.schedule import RunSchedule
from gptworks.training.state import Saving, State

parse = parser(__doc__)
parse.add_argument("--tokens", type=int, default=512, help="of a step")
options = parse.parse_args()
config = build_config(Model(family="gpt2", hidden_size=768, num_hidden_layers=12, num_attention_heads=12), 50257, 256)
train = Train(optimizer="adamw", lr=1e-4, weight_decay=0.1, warmup=0.0, max_steps=10**6, schedule="constant")
ids = np.random.default_rng(1).integers(0, 50257, 100_000)
loader = Loader(Stream(ids, np.zeros(1, dtype=np.int64), 400_000), 256, options.tokens // 256, 1)
model = build.fresh(config, 1)
state = State(model, make_optimizers(model, train))
steps: list[float] = []  # seconds, alternately with a checkpoint beside them and without
stalls, durable = [], []
usual = State.settle


def settle(self: State) -> None:
    start = time.perf_counter()
    usual(self)
    if self.step % 2 and self.step > 2:
        stalls[-1] += time.perf_counter() - start


State.settle = settle  # type: ignore[method-assign]

with tempfile.TemporaryDirectory(dir=".") as folder:
    saving: list[tuple[Saving, float]] = []

    def hook(state: State, m: StepMetrics) -> str | None:
        steps.append(m.seconds)
        if saving:
            one, begun = saving.pop()
            one.finish()
        if state.step % 2 and state.step > 1:
            start = time.perf_counter()
            saving.append((Saving(state, Path(folder) / "checkpoints", {}), start))
            one = saving[0][0]
            body, stamp = one.run, start

            def timed() -> None:
                body()
                durable.append(time.perf_counter() - stamp)

            one.run = timed  # type: ignore[method-assign]
            one.start()
            stalls.append(time.perf_counter() - start)
        return None

    run(
        state, loader, NextToken(train), train=train, layout=Layout(torch.device("cpu"), torch.float32, 2),
        schedule=RunSchedule(train), hooks=[hook], until=3 + 2 * options.runs,
    )  # fmt: skip
    if saving:
        saving.pop()[0].finish()
beside, between = steps[3::2], steps[4::2]
extra = [b - p for b, p in zip(beside, between, strict=False)]
size = 12 * parameter_count(config)
table(
    f"a checkpoint of {parameter_count(config) / 1e6:.0f} M parameters with AdamW, {size / 1e9:.2f} GB, beside steps "
    f"of {options.tokens} tokens — median (range) of {len(extra)}",
    [
        ("training stands still, s", spread(stalls[: len(extra)])),
        ("the step beside it takes longer, s", spread(extra)),
        ("a step without, s", spread(between)),
        ("until it is durable, s", spread(durable)),
    ],
)
write(options.json, {"stall": stalls, "steps": steps, "durable": durable, "bytes": size})
