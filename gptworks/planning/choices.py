"""The facts that a run is decided from, and the decisions: each value with its reason, in one place."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from gptworks.core.config import Adapter, Chosen, Config, build
from gptworks.core.errors import DataError, UsageError
from gptworks.model.config import ModelConfig
from gptworks.planning.cost import Trainable

T = TypeVar("T")
# What stays open until rows are counted and steps are timed.
PROVISIONAL = {
    "train.max_steps": 1, "train.eval_every": 1, "train.log_every": 1, "train.checkpoint_every": 1,
    "train.compile": False,
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """The model that a run starts from, as far as decisions depend on it."""

    name: str
    architecture: ModelConfig
    adapter: Adapter | None = None  # of a folder that holds an adapter
    sha256: str | None = None  # of its weights; earlier runs did not keep it


@dataclass(frozen=True)
class Measured:
    """Measurements that only the text and a clock can give; there once both were asked."""

    rows: int | None = None  # in train.max_epochs
    step_seconds: float = 0.0  # median; these and the next two where there is a time budget
    eval_seconds: float = 0.0
    left_seconds: float = 0.0  # of the budget, when the timing ended
    fill: float = 1.0  # share of the places of a row that are trained on, where train.max_tokens counts them
    step_tokens: int | None = None  # of the steps that were timed; earlier runs did not keep it

    def with_steps_of(self, tokens: int) -> "Measured":
        """The measurements for steps of so many tokens, which take as much longer as they are larger."""
        if not self.step_tokens or self.step_tokens == tokens:
            return self
        return replace(self, step_seconds=self.step_seconds * tokens / self.step_tokens, step_tokens=tokens)


@dataclass(frozen=True)
class Facts:
    """The known facts of a run's data and of the model it starts from. None: not known yet, as in a dry run."""

    vocab_size: int | None = None  # ids of the tokenizer
    vocabulary: int | None = None  # the size that was wanted of a tokenizer made for the text
    epoch_tokens: int | None = None  # of the training data
    unigram_bits: float | None = None  # a byte, that counting its tokens leaves of the text
    bytes_per_token: float | None = None  # of the text
    endless: bool = False  # data that has no epochs
    eval_tokens: int | None = None  # of an evaluation
    prompts: list[str] | None = None  # beginnings of held-out lines, where no others were asked for
    base: Base | None = None
    unit: int = 1  # rows that are never divided
    beside_bytes: int = 0  # of a second model, which is not trained
    bytes_per_weight: float | None = None  # of a frozen matrix, where `adapter.base` names a low-bit form
    measured: Measured | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the run's folder."""
        tree: dict[str, Any] = asdict(replace(self, base=None))
        if self.base:
            adapter = self.base.adapter.model_dump(mode="json") if self.base.adapter else None
            tree["base"] = {
                "name": self.base.name, "architecture": asdict(self.base.architecture), "adapter": adapter,
                "sha256": self.base.sha256,
            }  # fmt: skip
        return tree

    @classmethod
    def of(cls, tree: dict[str, Any]) -> "Facts":
        """Makes the facts from the plain values of `as_dict`. Raises DataError."""
        try:
            values = dict(tree)
            if (base := values.pop("base")) is not None:
                sizes = base["architecture"]
                listed = {name: tuple(sizes[name]) for name in ("layer_types", "dense_layers")}
                adapter = Adapter.model_validate(base["adapter"]) if base["adapter"] else None
                values["base"] = Base(
                    base["name"], ModelConfig(**{**sizes, **listed}), adapter, sha256=base.get("sha256")
                )
            if (measured := values.pop("measured")) is not None:
                values["measured"] = Measured(**measured)
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not the facts of a run: {type(error).__name__}: {error}") from None


@dataclass
class Choices:
    """A configuration that is being decided. `set` writes a value with its reason; nothing else changes it."""

    config: Config  # what was asked, and what was decided so far
    reasons: dict[str, str] = field(default_factory=dict)  # by dotted key
    open: dict[str, str] = field(default_factory=dict)  # keys that cannot be decided yet, and why
    warnings: list[str] = field(default_factory=list)
    architecture: ModelConfig | None = None  # None where the vocabulary is not known
    trainable: Trainable | None = None  # where not all of the model is trained

    def set(self, key: str, value: T, reason: str) -> T:
        """Decides a key. The value is checked once, by `chosen`."""
        section, name = key.split(".")
        part = getattr(self.config, section).model_copy(update={name: value})
        self.config = self.config.model_copy(update={section: part})
        self.reasons[key] = reason
        return value

    def leave(self, key: str, why: str) -> None:
        """Notes that a key stays open, and why."""
        self.open[key] = why

    @property
    def provisional(self) -> Chosen:
        """A configuration to build and time a run with, before its length is known: what follows from that is 1."""
        filled = replace(self, reasons=dict(self.reasons), open={})
        for key in self.open:
            filled.set(key, PROVISIONAL[key], "")
        return filled.chosen

    @property
    def chosen(self) -> Chosen:
        """The whole configuration, checked. Raises UsageError where something is still open."""
        if self.open:
            key, why = next(iter(self.open.items()))
            raise UsageError(f"{key} is open: {why}")
        return build(self.config.model_dump(mode="json"), "the chosen configuration", Chosen)


def needed(value: T | None) -> T:
    """A value that was decided before it is read."""
    assert value is not None, "decided before"
    return value
