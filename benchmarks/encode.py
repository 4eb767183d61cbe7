"""From a text file to finished, hashed shards: MB/s and peak memory of the whole process.

GPTWORKS_DATA=... python benchmarks/encode.py            # enwiki/enwiki_100mb.txt in that folder
python benchmarks/encode.py --file TEXT --vocab 16384
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from common import child, parser, spread, table, write

WORK = """
import json, sys, time
from pathlib import Path
from gptworks.core.config import Data, Tokenizer
from gptworks.data.shards import prepare
text, out, tokenizer, vocab = sys.argv[1:]
asked = Tokenizer(path=tokenizer) if tokenizer else Tokenizer(vocab_size=vocab)
start = time.perf_counter()
made = prepare(Data(train=text), asked, Path(out))
print(json.dumps({"seconds": time.perf_counter() - start, "engine": made.tokenizer.engine,
                  "tokens": len(made.train.tokens) + len(made.eval.tokens)}))
"""
arguments = parser(__doc__)
arguments.add_argument("--file", default=os.path.join(os.environ.get("GPTWORKS_DATA", ""), "enwiki/enwiki_100mb.txt"))
arguments.add_argument("--vocab", default="16384")
options = arguments.parse_args()
if not Path(options.file).is_file():
    sys.exit(f"{options.file}: no such file; give --file TEXT or set GPTWORKS_DATA")
size = Path(options.file).stat().st_size

with tempfile.TemporaryDirectory(dir=".") as folder:

    def made(out: str, tokenizer: str) -> dict:
        done = child([sys.executable, "-c", WORK, options.file, f"{folder}/{out}", tokenizer, options.vocab])
        return {**json.loads(done["stdout"]), "peak_bytes": done["peak_bytes"], "process_seconds": done["seconds"]}

    first = made("first", "")
    runs = [made(f"run{number}", f"{folder}/first") for number in range(options.runs)]
rates = [size / 1e6 / run["seconds"] for run in runs]
table(
    f"{Path(options.file).name}, {size / 1e6:.0f} MB, {options.vocab} ids, {first['engine']} — "
    f"median (range) of {len(runs)}",
    [
        ("text to finished shards, MB/s", spread(rates, 1)),
        ("the same, s", spread([run["seconds"] for run in runs])),
        ("peak resident, GB", spread([run["peak_bytes"] / 1e9 for run in runs])),
        ("with training the tokenizer, once, s", f"{first['seconds']:.2f}"),
        ("its peak resident, GB", f"{first['peak_bytes'] / 1e9:.2f}"),
        ("bytes a token", f"{size / runs[0]['tokens']:.3f}"),
    ],
)
write(options.json, {"file": Path(options.file).name, "bytes": size, "first": first, "runs": runs})
