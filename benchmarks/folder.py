"""Loading and saving the model folder of GPT-2 (124 M parameters) beside plainly reading and writing the same bytes.

python benchmarks/folder.py
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import parser, spread, table, write

from gptworks.core.config import Model
from gptworks.data.tokenizer import Tokenizer
from gptworks.model import build
from gptworks.model.config import build_config

options = parser(__doc__).parse_args()
shape = Model(family="gpt2", hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
model = build.fresh(build_config(shape, 50257, 1024), 1)
tokenizer = Tokenizer.of_bytes()


def plain_write(path: Path, content: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        view = memoryview(content)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def timed(work: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


times: dict[str, list[float]] = {name: [] for name in ("write", "save", "read", "load")}
with tempfile.TemporaryDirectory(dir=".") as place:
    folder, blob = Path(place) / "model", Path(place) / "blob"
    build.save(folder, model, tokenizer, {})
    weights = (folder / "model.safetensors").read_bytes()
    for _ in range(options.runs):
        blob.unlink(missing_ok=True)
        times["write"].append(timed(plain_write, blob, weights))
        times["save"].append(timed(build.save, Path(place) / f"saved-{len(times['save'])}", model, tokenizer, {}))
        times["read"].append(timed(blob.read_bytes))
        times["load"].append(timed(build.load, folder))
ratios = {
    pair: statistics.median(times[pair[0]]) / statistics.median(times[pair[1]])
    for pair in (("save", "write"), ("load", "read"))
}
table(
    f"a folder of {len(weights) / 1e6:.0f} MB, its files in the page cache — median (range) of {options.runs}",
    [
        ("plain write and fsync, s", spread(times["write"])),
        ("save: hashed, in place by one rename, s", spread(times["save"])),
        ("plain read, s", spread(times["read"])),
        ("load: hashed, checked, a model, s", spread(times["load"])),
        ("save / write", f"{ratios['save', 'write']:.2f}"),
        ("load / read", f"{ratios['load', 'read']:.2f}"),
    ],
)
write(options.json, {"bytes": len(weights), **{f"{name}_s": values for name, values in times.items()}})
