"""Writing, syncing, hashing and reading back a checkpoint of 10 million parameters with AdamW state.

python benchmarks/checkpoint.py
"""

import tempfile
import time
from pathlib import Path

import torch
from common import parser, spread, table, write

from gptworks.core.config import Model, Train
from gptworks.model import build
from gptworks.model.config import build_config, parameter_count
from gptworks.training.optim import make_optimizers
from gptworks.training.state import State, newest_good, restore, save

options = parser(__doc__).parse_args()
shape = Model(family="qwen3", hidden_size=320, num_hidden_layers=8, num_attention_heads=5)
config = build_config(shape, 2048, 256)


def state() -> State:
    model = build.fresh(config, 1)
    made = State(model, make_optimizers(model, Train(optimizer="adamw", lr=1e-3, weight_decay=0.1)))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    made.optimizers[0].step()
    return made


source, target = state(), state()
writes, reads = [], []
with tempfile.TemporaryDirectory(dir=".") as folder:
    checkpoints = Path(folder) / "checkpoints"
    for step in range(1, options.runs + 2):
        source.step = step
        start = time.perf_counter()
        path = save(source, checkpoints, {})
        written = time.perf_counter()
        found = newest_good(checkpoints)
        assert found == path
        restore(target, found)
        done = time.perf_counter()
        size = sum(file.stat().st_size for file in path.iterdir())
        if step > 1:  # the first warms the disk up
            writes.append(written - start)
            reads.append(done - written)
assert source.fingerprint() == target.fingerprint()
both = [w + r for w, r in zip(writes, reads, strict=True)]
table(
    f"a checkpoint of {parameter_count(config) / 1e6:.1f} M parameters, {size / 1e6:.0f} MB — "
    f"median (range) of {len(both)}",
    [
        ("write, fsync, hash, s", spread(writes)),
        ("verify and read back, s", spread(reads)),
        ("both, s", spread(both)),
    ],
)
write(options.json, {"bytes": size, "write_s": writes, "read_s": reads})
