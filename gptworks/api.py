"""The Python side of the commands. Overrides are dotted keys: `train("laptop", **{"train.max_steps": 100})`."""

from pathlib import Path
from typing import Any

from gptworks import lifecycle
from gptworks.core import config as configuration
from gptworks.data.shards import Stream
from gptworks.infer.engine import Generation
from gptworks.infer.sampling import Sampling
from gptworks.infer.scoring import Score, score
from gptworks.model import build


class Model:
    """A loaded model folder."""

    def __init__(self, path: str | Path) -> None:
        self._loaded = build.load(path)
        self.tokenizer = self._loaded.tokenizer
        self.module = self._loaded.model

    def generate(self, prompt: str, max_new_tokens: int = 200, **sampling: Any) -> Generation:
        """Continues `prompt`; `sampling` takes Sampling's fields (temperature, top_k, top_p, min_p, seed, ...)."""
        return lifecycle.engine_of(self._loaded).generate(prompt, Sampling(**sampling), max_new_tokens)

    def loss(self, text: str) -> Score:
        """The exact loss of one text, as a document."""
        import numpy as np

        ids = np.array([self.tokenizer.start_id or 0, *self.tokenizer.encode(text)])
        stream = Stream(ids, np.zeros(1, dtype=np.int64), len(text.encode("utf-8", "replace")))
        return score(self.module, stream, self.module.config.max_position_embeddings)


load = Model


def train(recipe: str, out: str | Path | None = None, fresh: bool = False, **overrides: Any) -> dict[str, Any]:
    """`gptworks train`; returns what result.json has."""
    config = configuration.load(recipe, overrides)
    return lifecycle.train(config, Path(out or f"runs/{Path(recipe).stem}"), recipe, fresh)


def run(recipe: str, out: str | Path | None = None, fresh: bool = False, **overrides: Any) -> dict[str, Any]:
    """`gptworks run`: every stage of the recipe."""
    config = configuration.load(recipe, overrides)
    return lifecycle.run(config, Path(out or f"runs/{Path(recipe).stem}"), recipe, fresh)


evaluate = lifecycle.evaluate
