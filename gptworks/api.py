"""The Python side of the commands. Overrides are dotted keys: `train("laptop", **{"train.max_steps": 100})`.

What a stage gives back is a dataclass of `core/results.py`, which can also be indexed as the command's `--json`.
"""

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from gptworks import lifecycle
from gptworks.core import config as configuration
from gptworks.core import runtime
from gptworks.core.config import Config
from gptworks.core.errors import DataError
from gptworks.core.results import (
    Evaluated,
    Exported,
    Finished,
    Generated,
    Merged,
    Proposed,
    Pushed,
    Reported,
    Trained,
    Verified,
)
from gptworks.data.shards import check_ids, encode_documents
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
        check_ids(stream, self.tokenizer, rows=self.module.config.vocab_size, what="the text")
        return score(self.module, stream, self.module.config.max_position_embeddings)


load = Model

Named = str | PathLike[str] | Model  # a model's folder, its name on the hub, or one that is loaded


def _of(model: Named) -> str | Path | lifecycle.Loaded:
    return model._loaded if isinstance(model, Model) else fspath(model)


# -- stages, as the commands of these names ----------------------------------------------------------------------


def train(
    recipe: str | PathLike[str], out: str | PathLike[str] | None = None, fresh: bool = False, **overrides: Any
) -> Trained | Proposed | None:
    """`gptworks train`; returns what result.json has, on the main process of a run. A time budget counts from here."""
    config, folder, name = _asked(recipe, out, overrides)
    return lifecycle.train(config, folder, name, fresh=fresh)


def run(
    recipe: str | PathLike[str], out: str | PathLike[str] | None = None, fresh: bool = False, **overrides: Any
) -> Finished | Proposed | None:
    """`gptworks run`: every stage of the recipe. A time budget counts from here."""
    config, folder, name = _asked(recipe, out, overrides)
    return lifecycle.run(config, folder, name, fresh=fresh)


def _asked(
    recipe: str | PathLike[str], out: str | PathLike[str] | None, overrides: dict[str, Any]
) -> tuple[Config, Path, str]:
    runtime.restart_clock()
    name = fspath(recipe)
    paths = {key: fspath(value) if isinstance(value, PathLike) else value for key, value in overrides.items()}
    return configuration.load(name, paths), Path(out or f"runs/{Path(name).stem}"), name


def evaluate(model: Named, data: str | PathLike[str], against: Named | None = None, **options: Any) -> Evaluated:
    """`gptworks evaluate`; `options` are its options: context, stride, rows, separator,
    text_column, encoding."""
    return lifecycle.evaluate(_of(model), fspath(data), against=None if against is None else _of(against), **options)


def generate(model: Named, prompts: str | Sequence[str], max_new_tokens: int = 200, **sampling: Any) -> list[Generated]:
    """`gptworks generate`: the continuation of each prompt, or of the one; `sampling` takes Sampling's fields."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    return lifecycle.generate(_of(model), texts, Sampling(**sampling), max_new_tokens=max_new_tokens)


def merge(adapter: Named, out: str | PathLike[str], **options: Any) -> Merged:
    """`gptworks merge`; `options` are its options: data, dtype, lossy."""
    return lifecycle.merge(_of(adapter), Path(out), **options)


def export(model: Named, format: str, out: str | PathLike[str], **options: Any) -> Exported:
    """`gptworks export`; `options` are its options: kind (its --type), data, tokens, dry_run."""
    return lifecycle.export(_of(model), format, Path(out), **options)


def push(folder: str | PathLike[str], name: str, private: bool = False) -> Pushed:
    """`gptworks push`: a model folder onto the Hugging Face hub."""
    return lifecycle.push(Path(folder), name, private=private)


def report(run: str | PathLike[str]) -> Reported:
    """`gptworks report`: a run's report.html."""
    return lifecycle.report(Path(run))


def verify(folder: str | PathLike[str]) -> Verified:
    """`gptworks verify`: a run replayed, any other folder against its hashes."""
    return lifecycle.verify(Path(folder))
