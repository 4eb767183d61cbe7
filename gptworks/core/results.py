"""What each stage gives back: figures by name, which can also be indexed as `--json` prints them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from reprlib import Repr
from typing import Any, ClassVar

from gptworks.core import folder
from gptworks.core.errors import DataError

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class Result(Mapping[str, Any]):
    """The base of all results: `result.loss` and `result["loss"]` are the same; `as_dict()` is its JSON."""

    shown: ClassVar[tuple[str, ...]] = ()  # names of what its line in an interpreter tells

    def as_dict(self) -> dict[str, Any]:
        """The values by name, as JSON has them. A value that is None by default is left out while it is None."""
        values: dict[str, Any] = {}
        for item in fields(self):  # type: ignore[arg-type]  # every result is a dataclass
            value = getattr(self, item.name)
            if value is not None or item.default is not None:
                values[item.name] = _plain(value)
        return values

    def __getitem__(self, name: str) -> Any:
        return self.as_dict()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.as_dict())

    def __len__(self) -> int:
        return len(self.as_dict())

    def __repr__(self) -> str:
        there = self.as_dict()
        told = [f"{name}={_brief(getattr(self, name, there[name]))}" for name in self.shown or there if name in there]
        return f"{type(self).__name__}({', '.join(told)})"


def _brief(value: Any) -> str:
    """A value in a few characters, a number in six digits."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_brief(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list) and any(isinstance(each, Result) for each in value):
        return "[" + ", ".join(map(repr, value)) + "]"
    if isinstance(value, Result):
        return repr(value)
    return f"{value:.6g}" if isinstance(value, float) else _SHORT.repr(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.as_dict()
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


# -- of the stages -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Trained(Result):
    """A training, as result.json has it. Seconds and bytes are those of the process that trained."""

    shown = ("steps", "tokens", "seconds", "parameters", "eval", "stopped", "model")

    steps: int
    tokens: int
    seconds: float  # of the whole process
    train_seconds: float
    tokens_per_second: float
    mfu: float  # of the rate that a product of matrices reaches here
    matmul_gflops: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int | None
    processes: int
    parameters: int
    trained_parameters: int
    stopped: str  # why it ended
    weights: str  # which the model folder has: the last, an average, those of the best evaluation
    skipped_steps: int
    changes: list[str]  # on the way, in words
    train: dict[str, float | None]
    sources: list[dict[str, Any]]
    eval: dict[str, float]
    model: str = ""
    recipe: str = ""
    others: dict[str, Any] = field(default_factory=dict)  # what result.json has besides: of later stages

    @classmethod
    def read(cls, path: Path) -> "Trained":
        """Reads a result.json; what an earlier version did not write is None. Raises DataError."""
        values = folder.read_json(path)
        if not isinstance(values, dict) or not isinstance(values.get("steps"), int):
            raise DataError(f"{path}: not the result of a training; move it away and train again")
        names = [item.name for item in fields(cls) if item.name != "others"]
        others = {name: value for name, value in values.items() if name not in names}
        return cls(**{name: values.get(name) for name in names}, others=others)  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, Any]:
        values = super().as_dict()
        return values | values.pop("others")


@dataclass(frozen=True, eq=False, repr=False)
class Proposed(Result):
    """The rates that a range test proposes, and the page with its curve."""

    lr: float
    adam_lr: float | None
    reason: str
    report: str


@dataclass(frozen=True, eq=False, repr=False)
class Compared(Result):
    """Another model on the same text: its figures, and the difference, model minus this one."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    lost_bytes: int  # of these, that decoding the ids does not give back
    method: str
    tokens_per_second: float
    model: str
    difference_bits_per_byte: float
    interval: list[float] | None  # of 95 %
    pairs: int
    better: str | None  # the model's name, where a difference is shown
    reason: str | None  # where none is


@dataclass(frozen=True, eq=False, repr=False)
class Evaluated(Result):
    """A model on a text. `loss` is in nats a token."""

    shown = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes", "method", "model", "data")

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    lost_bytes: int  # of these, that decoding the ids does not give back
    method: str
    tokens_per_second: float
    baselines: dict[str, dict[str, float] | None]
    model: str
    data: str
    against: Compared | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Generated(Result):
    """The continuation of a prompt: its text, and as `ids`, which are not in its JSON, its tokens."""

    shown = ("prompt", "text", "tokens", "finish_reason")

    prompt: str
    text: str
    tokens: int
    finish_reason: str
    tokens_per_second: float
    prompt_tokens_per_second: float
    ids: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        values = super().as_dict()
        del values["ids"]
        return values


@dataclass(frozen=True, eq=False, repr=False)
class Merged(Result):
    """A plain model made of an adapter and its base, and how far it is from them."""

    model: str
    dtype: str
    data: str
    tokens: int
    bits_per_byte: float
    adapter_bits_per_byte: float
    difference_bits_per_byte: float


@dataclass(frozen=True, eq=False, repr=False)
class Exported(Result):
    """A model in the format of another program. Without `bytes` and `parity` nothing was written."""

    shown = ("out", "format", "type", "estimated_bytes", "bytes")

    out: str
    format: str
    type: str
    estimated_bytes: int
    notes: list[str]
    bytes: int | None = None
    parity: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Pushed(Result):
    """The address of a model on the hub."""

    url: str


@dataclass(frozen=True, eq=False, repr=False)
class Reported(Result):
    """The page that was written."""

    report: str


@dataclass(frozen=True, eq=False, repr=False)
class ComparedRun(Result):
    """A run beside others: what it gave so far. What its files do not tell is None."""

    run: str
    recipe: str
    finished: bool
    steps: int
    planned_steps: int
    parameters: int | None
    tokens: float | None
    seconds: float | None  # of training
    loss: float | None  # nats a token, of the last evaluation
    bits_per_byte: float | None


@dataclass(frozen=True, eq=False, repr=False)
class ComparedRuns(Result):
    """Runs side by side, and the value of each in every configuration key in which they differ."""

    runs: list[ComparedRun]
    differences: dict[str, list[Any]]


@dataclass(frozen=True, eq=False, repr=False)
class PlannedSize(Result):
    """A size of model for a text: what it would see, take and reach."""

    shown = ("name", "parameters", "tokens", "passes", "memory_bytes", "seconds", "bits_per_byte")

    name: str  # smaller | chosen | larger
    parameters: int
    width: int
    layers: int
    context: int
    batch_tokens: int
    steps: int
    tokens: int
    tokens_per_parameter: float
    passes: float  # over the training text
    memory_bytes: int
    flops: float  # of training
    seconds: float  # here, of the whole process
    bits_per_byte: float  # expected of the held-out text
    command: str = ""  # that starts it
    seconds_there: float | None = None  # of training alone, on the machine that was described


@dataclass(frozen=True, eq=False, repr=False)
class Planned(Result):
    """A plan: a text, the time for it, and what three sizes of model would do with both."""

    data: list[str]
    bytes: int
    exact: bool  # false where bytes and tokens are estimates, from a part of the text
    tokens: int  # of the training text
    bytes_per_token: float
    vocab_size: int
    time_budget_s: float | None
    machine: str
    matmul_gflops: float  # of a large product on it
    sizes: list[PlannedSize]  # from smaller to larger
    notes: list[str]  # on what the figures are worth
    left_out: list[str]  # sizes that do not fit, and why
    there: str | None = None  # the machine that was described, and the rate that is counted with


@dataclass(frozen=True, eq=False, repr=False)
class Verified(Result):
    """The verdict on a folder compared with its manifest, or on a run that was trained again."""

    verdict: str
    identical: bool
    files: int | None = None
    from_step: int | None = None
    to_step: int | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Finished(Result):
    """All stages of a recipe: the training's figures, and beside them what each later stage gave."""

    shown = (*Trained.shown, "report")

    training: Trained | None
    evaluation: Evaluated | None = None
    generation: list[Generated] | None = None
    report: str | None = None

    def as_dict(self) -> dict[str, Any]:
        values = super().as_dict()
        return (values.pop("training") or {}) | values
