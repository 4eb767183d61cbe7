"""The Python side of the commands. Overrides are dotted keys: `train("laptop", **{"train.max_steps": 100})`.

Options have the names and defaults of the command's; with `quiet=True` only warnings and errors are told. A stage gives
back a dataclass of `core/results.py`, which can also be indexed as the command's `--json`, and leaves the process as it
was. A wrong argument is a UsageError.
"""

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import wraps
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from gptworks import lifecycle
from gptworks.core import config as configuration
from gptworks.core import runtime
from gptworks.core.config import Config
from gptworks.core.config.messages import shown
from gptworks.core.errors import DataError, UsageError
from gptworks.core.log import count
from gptworks.core.registry import nearest
from gptworks.core.results import (
    ComparedRuns,
    Evaluated,
    Exported,
    Finished,
    Generated,
    Merged,
    Planned,
    Proposed,
    Pushed,
    Reported,
    Trained,
    Verified,
)
from gptworks.data.shards import check_ids, encode_documents
from gptworks.infer.sampling import Sampling
from gptworks.infer.scoring import Score, score
from gptworks.reporting.compare import compare as side_by_side

P = ParamSpec("P")
R = TypeVar("R")


def _public(work: Callable[P, R]) -> Callable[P, R]:
    """Has a function check the names and types of its arguments and then run as a guest in its process."""
    signature, name = inspect.signature(work), work.__qualname__.removesuffix(".__init__")
    kinds = {key: each.kind for key, each in signature.parameters.items() if key != "self"}
    named = [
        key
        for key, kind in kinds.items()
        if kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]
    takes_any = any(each.kind == each.VAR_KEYWORD for each in signature.parameters.values())

    @wraps(work)
    def called(*arguments: P.args, **options: P.kwargs) -> R:
        for key in options:
            misspelt = key not in Config.model_fields and get_close_matches(key, named, cutoff=0.7)
            if key not in named and (misspelt or not takes_any):
                raise UsageError(f"{name}: unknown argument {key!r}: {nearest(key, named)}")
        try:
            bound = signature.bind(*arguments, **options)
        except TypeError as error:
            raise UsageError(f"{name}: {error}") from None
        wanted, values = get_type_hints(work), bound.arguments
        for key, kind in kinds.items():
            if kind == inspect.Parameter.VAR_POSITIONAL:
                values[key] = tuple(_checked(key, each, wanted[key]) for each in values.get(key, ()))
        values |= {key: _checked(key, values[key], wanted[key]) for key in named if key in values}
        with runtime.guest(values.get("quiet", False)):
            return work(*bound.args, **bound.kwargs)

    return called


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


# The types that arguments have: in words, what is of one, and what is passed on (numpy's numbers as Python's).
_TYPES: dict[Any, tuple[str, Callable[[Any], bool], Callable[[Any], Any]]] = {
    str: ("a text", _is_text, str),
    PathLike: ("a path", lambda value: isinstance(value, PathLike) and _is_text(fspath(value)), fspath),
    bool: ("True or False", lambda value: isinstance(value, bool), bool),
    int: ("a whole number", lambda value: _is_number(value, Integral), int),
    float: ("a number", lambda value: _is_number(value, Real), float),
    Sequence: ("a list of texts", lambda value: isinstance(value, Sequence) and all(map(_is_text, value)), tuple),
    NoneType: ("None", lambda value: value is None, lambda value: value),
}


def _checked(name: str, value: Any, wanted: Any) -> Any:
    """The value, of one of the types that an argument takes. Raises UsageError for another."""
    parts = get_args(wanted) if isinstance(wanted, UnionType) else [wanted]
    a_model = ("a loaded model", lambda value: isinstance(value, Model), lambda value: value)
    rows = [_TYPES.get(get_origin(part) or part, a_model) for part in parts]
    for _, fits, passed_on in rows:
        if fits(value):
            return passed_on(value)
    raise UsageError(f"{name}={shown(value)}: must be {' or '.join(words for words, _, _ in rows)}")


class Model:
    """A loaded model folder, on the best device here."""

    @_public
    def __init__(self, path: str | PathLike[str], quiet: bool = False) -> None:
        self._loaded = lifecycle.load(fspath(path))
        self.tokenizer = self._loaded.tokenizer
        self.module = self._loaded.model

    def __repr__(self) -> str:
        config, weights = self.module.config, list(self.module.parameters())
        return (
            f"Model({self._loaded.name!r}: {config.family}, {count(sum(each.numel() for each in weights))} parameters, "
            f"{config.vocab_size:,} tokens, context {config.max_position_embeddings:,}, on {weights[0].device})"
        )

    @_public
    def generate(
        self, prompt: str, max_new_tokens: int = 200, *, temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0,
        min_p: float = 0.0, repetition_penalty: float = 1.0, stop: str | Sequence[str] = (), seed: int | None = None,
        ignore_eos: bool = False,
    ) -> Generated:  # fmt: skip
        """Continues `prompt`, as `gptworks generate` does; the result's `ids` are the new tokens."""
        how = Sampling(repetition_penalty, temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        options: dict[str, Any] = {"stop": _several(stop), "ignore_eos": ignore_eos}
        return lifecycle.generate(self._loaded, [prompt], how, max_new_tokens=max_new_tokens, **options)[0]

    @_public
    def loss(self, text: str) -> Score:
        """The exact loss of one text, as a document: what `evaluate` gives for a file of it. Raises DataError."""
        document = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no character
        stream, _ = encode_documents([document], self.tokenizer)
        if not text or len(stream.tokens) < 2:
            raise DataError("too little text to evaluate")
        check_ids(stream, self.tokenizer, rows=self.module.config.vocab_size, what="the text")
        return score(self.module, stream, self.module.config.max_position_embeddings)


load = Model

Named = str | PathLike[str] | Model  # a model's folder, its name on the hub, or one that is loaded


def _of(model: Named) -> str | Path | lifecycle.Loaded:
    return model._loaded if isinstance(model, Model) else fspath(model)


def _several(texts: str | Sequence[str]) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else tuple(texts)


# -- stages, as the commands of these names ----------------------------------------------------------------------


@_public
def train(
    recipe: str | PathLike[str], out: str | PathLike[str] | None = None, fresh: bool = False, quiet: bool = False,
    **overrides: Any,
) -> Trained | Proposed | None:  # fmt: skip
    """`gptworks train`; returns what result.json has, on the main process of a run. A time budget counts from here."""
    config, folder, name = _asked(recipe, out, overrides)
    return lifecycle.train(config, folder, name, fresh=fresh)


@_public
def continue_run(run: str | PathLike[str], quiet: bool = False, **overrides: Any) -> Trained | Proposed | None:
    """`gptworks continue`: a run goes on, as it was asked for or with what is given here."""
    runtime.restart_clock()
    config, name = configuration.continued(Path(run), _written(overrides))
    return lifecycle.train(config, Path(run), name)


@_public
def plan(
    recipe: str | PathLike[str] = "mine", machine: str | PathLike[str] | None = None, quiet: bool = False,
    **overrides: Any,
) -> Planned:  # fmt: skip
    """`gptworks plan`: what three sizes of model would see, take and reach."""
    return lifecycle.plan(fspath(recipe), _written(overrides), None if machine is None else Path(machine))


@_public
def compare(*runs: str | PathLike[str], quiet: bool = False) -> ComparedRuns:
    """`gptworks compare`: two runs or more side by side, from their files alone."""
    return side_by_side([Path(each) for each in runs])


@_public
def run(
    recipe: str | PathLike[str], out: str | PathLike[str] | None = None, fresh: bool = False, quiet: bool = False,
    **overrides: Any,
) -> Finished | Proposed | None:  # fmt: skip
    """`gptworks run`: every stage of the recipe. A time budget counts from here."""
    config, folder, name = _asked(recipe, out, overrides)
    return lifecycle.run(config, folder, name, fresh=fresh)


def _asked(
    recipe: str | PathLike[str], out: str | PathLike[str] | None, overrides: dict[str, Any]
) -> tuple[Config, Path, str]:
    runtime.restart_clock()
    name = fspath(recipe)
    return configuration.load(name, _written(overrides)), Path(out or configuration.usual_folder(name)), name


def _written(overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides as a recipe would have them."""
    return {key: _as_written(key, value) for key, value in overrides.items()}


def _as_written(key: str, value: Any) -> Any:
    """The value as a recipe would have it: texts in the place of paths. Raises UsageError for what none can have."""
    if isinstance(value, dict):
        return {name: _as_written(f"{key}.{name}", each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_written(key, each) for each in value]
    if isinstance(value, bytes | bytearray | set | frozenset):
        raise UsageError(f"{key}={shown(value)}: must be a text, a number, a list or a mapping")
    return fspath(value) if isinstance(value, PathLike) else value


@_public
def evaluate(
    model: Named, data: str | PathLike[str], against: Named | None = None, *, context: int | None = None,
    stride: int | None = None, batch: int = 16, separator: str | None = None, text_column: str | None = None,
    encoding: str | None = None, quiet: bool = False,
) -> Evaluated:  # fmt: skip
    """`gptworks evaluate`: the exact loss of a model on a text, beside simple baselines or another model."""
    return lifecycle.evaluate(
        _of(model), fspath(data), against=None if against is None else _of(against), context=context, stride=stride,
        rows=batch, separator=separator, text_column=text_column, encoding=encoding,
    )  # fmt: skip


@_public
def generate(
    model: Named, prompts: str | Sequence[str], max_new_tokens: int = 200, *, temperature: float = 0.8, top_k: int = 0,
    top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0, stop: str | Sequence[str] = (),
    seed: int | None = None, ignore_eos: bool = False, quiet: bool = False,
) -> list[Generated]:  # fmt: skip
    """`gptworks generate`: the continuation of each prompt, or of the one."""
    how = Sampling(repetition_penalty, temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    options: dict[str, Any] = {"stop": _several(stop), "ignore_eos": ignore_eos}
    return lifecycle.generate(_of(model), list(_several(prompts)), how, max_new_tokens=max_new_tokens, **options)


@_public
def merge(
    adapter: Named, out: str | PathLike[str], *, data: str | PathLike[str] | None = None, dtype: str = "float32",
    lossy: bool = False, quiet: bool = False,
) -> Merged:  # fmt: skip
    """`gptworks merge`: one plain model of an adapter and its base, compared with the two before it is written."""
    text = None if data is None else fspath(data)
    return lifecycle.merge(_of(adapter), Path(out), data=text, dtype=dtype, lossy=lossy)


@_public
def export(
    model: Named, format: str, out: str | PathLike[str], *, type: str | None = None,
    data: str | PathLike[str] | None = None, tokens: int = 512, dry_run: bool = False, quiet: bool = False,
) -> Exported:  # fmt: skip
    """`gptworks export`: the model in the format of another program, compared with the source."""
    text = None if data is None else fspath(data)
    return lifecycle.export(_of(model), format, Path(out), kind=type, data=text, tokens=tokens, dry_run=dry_run)


@_public
def push(folder: str | PathLike[str], name: str, private: bool = False, quiet: bool = False) -> Pushed:
    """`gptworks push`: a model folder onto the Hugging Face hub."""
    return lifecycle.push(Path(folder), name, private=private)


@_public
def report(run: str | PathLike[str], quiet: bool = False) -> Reported:
    """`gptworks report`: a run's report.html."""
    return lifecycle.report(Path(run))


@_public
def verify(folder: str | PathLike[str], quiet: bool = False) -> Verified:
    """`gptworks verify`: a run replayed, any other folder against its hashes."""
    return lifecycle.verify(Path(folder))
