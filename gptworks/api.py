"""The Python side of the commands. Overrides are dotted keys: `train("laptop", **{"train.max_steps": 100})`."""

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from gptworks import lifecycle
from gptworks.core import config as configuration
from gptworks.core import runtime
from gptworks.core.config import Config
from gptworks.core.errors import DataError
from gptworks.data.shards import encode_documents
from gptworks.infer.engine import Generation
from gptworks.infer.sampling import Sampling
from gptworks.infer.scoring import Score, score


class Model:
    """A loaded model folder, on the best device here."""

    def __init__(self, path: str | Path) -> None:
        self._loaded = lifecycle.load(path)
        self.tokenizer = self._loaded.tokenizer
        self.module = self._loaded.model

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> Generation:
        """Continues `prompt`; `sampling` takes Sampling's fields (temperature, top_k, top_p, min_p, seed, ...)."""
        ends = (stop,) if isinstance(stop, str) else tuple(stop)
        engine = lifecycle.engine_of(self._loaded)
        return engine.generate(prompt, Sampling(**sampling), max_new_tokens, stop=ends, ignore_eos=ignore_eos)

    def loss(self, text: str) -> Score:
        """The exact loss of one text, as a document: what `evaluate` gives for a file of it. Raises DataError."""
        stream, _ = encode_documents([text], self.tokenizer)
        if not text or len(stream.tokens) < 2:
            raise DataError("too little text to evaluate")
        return score(self.module, stream, self.module.config.max_position_embeddings)


load = Model


def train(
    recipe: str | PathLike[str], out: str | PathLike[str] | None = None, fresh: bool = False, **overrides: Any
) -> dict[str, Any]:
    """`gptworks train`; returns what result.json has. A time budget counts from this call."""
    return lifecycle.train(*_asked(recipe, out, overrides), fresh)


def run(
    recipe: str | PathLike[str], out: str | PathLike[str] | None = None, fresh: bool = False, **overrides: Any
) -> dict[str, Any]:
    """`gptworks run`: every stage of the recipe. A time budget counts from this call."""
    return lifecycle.run(*_asked(recipe, out, overrides), fresh)


def _asked(
    recipe: str | PathLike[str], out: str | PathLike[str] | None, overrides: dict[str, Any]
) -> tuple[Config, Path, str]:
    runtime.restart_clock()
    name = fspath(recipe)
    paths = {key: fspath(value) if isinstance(value, PathLike) else value for key, value in overrides.items()}
    return configuration.load(name, paths), Path(out or f"runs/{Path(name).stem}"), name


def evaluate(
    model: str | Path | Model, data: str | PathLike[str], against: str | Path | Model | None = None, **options: Any
) -> dict[str, Any]:
    """`gptworks evaluate`; `options` are its options: context, stride, rows, separator, text_column."""
    one, other = (each._loaded if isinstance(each, Model) else each for each in (model, against))
    assert one is not None
    return lifecycle.evaluate(one, fspath(data), against=other, **options)
