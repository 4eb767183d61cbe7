"""The task of a run, as a value: where its rows come from, what they cost, and how it is measured.

A problem is a class, named by `problem=pretraining` or `problem=mine.py:Name`. It lives in four moments: `check`,
before anything is read; `prepare`, in the main process, into the run's data folder; `open`, in every process, and when
a run is replayed; `start`, with the model on its device. `examples/own_problem.py` is a whole one.

This file and a problem's own import torch where they use it: a recipe is checked before torch is loaded.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from gptworks.core.config import Chosen, Config, ProblemSettings
from gptworks.core.errors import UsageError
from gptworks.core.registry import class_of

if TYPE_CHECKING:
    from gptworks.core.folder import Verifying
    from gptworks.core.ranks import Group
    from gptworks.data.batch import Batches
    from gptworks.data.tokenizer import Tokenizer
    from gptworks.model.build import Loaded
    from gptworks.model.transformer import Transformer
    from gptworks.training.objectives import Objective


T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """The folder in which a problem keeps what it prepares, and the model it is prepared beside."""

    data: Path  # the run's data folder
    base: "Loaded | None" = None  # the model that the run starts from
    begun: bool = False  # whether the run has checkpoints, and so keeps the rows it began with


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. `figures` are logged as eval/NAME and kept in result.json; the problem watches
    one."""

    figures: dict[str, float]
    shown: Sequence[str]  # for a person, the most important first: "loss 1.4697", "2.120 bits/byte"
    logged: dict[str, float] | None = None  # where that is not the same as `figures`


class Evaluator(ABC):
    """Measures a model. Called by every process, each of which may do its share; the main one's figures count."""

    @abstractmethod
    def __call__(self, model: "Transformer") -> Evaluation: ...

    def part(self, model: "Transformer") -> float:
        """Computes a part of an evaluation, to be timed; gives its share of what this process does of a whole one."""
        self(model)
        return 1.0

    def passage(self, model: "Transformer") -> list[tuple[str, list[float]]]:
        """A piece of the held-out text, to be shown: pieces of it with the losses of their tokens. None by default."""
        return []


@dataclass(frozen=True)
class Parent:
    """A model or a folder that a run depends on, by what it is to it."""

    role: str  # base | teacher | reference | ...
    path: str
    sha256: str


@dataclass(frozen=True)
class Beside:
    """A second model that is held beside the trained one, and is not trained."""

    bytes: int = 0
    flops_per_token: float = 0.0


def checked(value: T, kind: type[Any], what: str) -> T:
    """The value that a problem's own code gave, if it is of the kind that is asked of it. Raises UsageError."""
    if not isinstance(value, kind):
        raise UsageError(
            f"{what} gives {type(value).__name__} and not {kind.__name__}: see gptworks/training/problem.py"
        )
    return value


def check_names(names: Iterable[str], what: str, taken: Set[str] = frozenset()) -> None:
    """Raises UsageError for names of figures that are no plain text, or that the run itself logs."""
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise UsageError(f"{what} has {name!r}: the name of a figure is a text that can be printed")
        if name in taken:
            raise UsageError(f"{what} has {name!r}, under which the run logs its own: choose another name")


@dataclass
class Work:
    """A started problem: what the loop needs."""

    batches: "Batches"
    objective: "Objective"
    evaluate: Evaluator
    lines: list[str] = field(default_factory=list)  # about the data, for a person


class Problem(ABC):
    """The task that a run is to solve. Subclasses have `open` and `start`; the rest has defaults.

    An opened problem has a `tokenizer`, and an `identity` that a checkpoint must agree with.
    """

    Settings: ClassVar[type[ProblemSettings]] = ProblemSettings  # its section `problem.*` of a configuration
    sections: ClassVar[frozenset[str]] = frozenset()  # of data, tokenizer and generate those that it uses
    watched: ClassVar[str] = "loss"  # the figure of an evaluation that early stopping goes by
    lower_is_better: ClassVar[bool] = True
    unit: ClassVar[int] = 1  # rows that belong together and are never divided
    saved_as: ClassVar[str | None] = None  # config.json's `architectures`; None: the family's causal language model

    tokenizer: "Tokenizer"
    identity: str
    epoch_tokens: int | None = None  # None: the data has no end
    eval_tokens: int | None = None  # of an evaluation; None: what one costs is not known
    vocabulary: int | None = None  # the size that was wanted of a tokenizer made for its text
    unigram_bits: float | None = None  # a byte, that counting its tokens leaves of the text
    bytes_per_token: float | None = None  # of text, where the loss can be told in bits per byte
    lost_per_token: float = 0.0  # of these bytes, that decoding does not give back
    parents: tuple[Parent, ...] = ()
    beside: Beside = Beside()

    @classmethod  # noqa: B027
    def check(cls, config: Config) -> None:
        """Raises UsageError for what is wrong whatever the data is."""

    @classmethod
    def prepare(cls, config: Config, place: Place) -> "Verifying | None":
        """Makes what `open` opens, in the main process, or continues to; says what was made. Raises DataError.

        What is large may still be compared with its hashes when this returns; no checkpoint is kept before that ends.
        """
        return None

    @classmethod
    def verify(cls, config: Config, place: Place) -> "Verifying | None":
        """Compares what was prepared with its hashes, where `prepare` did not run: on other machines, and before a
        replay. Raises DataError."""
        return None

    @classmethod
    def edited(cls, config: Config, place: Place) -> str | None:
        """The name of a file that is not what the run was begun from; it goes on with what was prepared then."""
        return None

    @classmethod
    @abstractmethod
    def open(cls, config: Config, place: Place) -> "Problem":
        """Opens what was prepared. Raises DataError."""

    @abstractmethod
    def start(self, model: "Transformer", config: Chosen, group: "Group", values: dict[str, Any]) -> Work:
        """Batches, objective and evaluation for a model on its device.

        `group` says which rows are this process's. `values` are plain ones of the problem's own that a checkpoint
        keeps: empty at first, and only to be changed by batches that are not made ahead.
        """

    def prompts(self, most_tokens: int) -> list[str]:
        """Beginnings of a few words for samples, each of so many tokens at most, out of what was held out."""
        return []

    def lineage(self, config: Chosen) -> dict[str, Any]:
        """Plain values that the model's folder tells of the data."""
        return {}


def opened(kind: type[Problem], config: Config, place: Place) -> Problem:
    """The problem of a run, with all that the run asks of it. Raises DataError, and UsageError for what it lacks."""
    problem = checked(kind.open(config, place), Problem, f"{class_of(kind)}.open")
    for name in ("tokenizer", "identity"):
        if not hasattr(problem, name):
            raise UsageError(f"{class_of(kind)} has no {name} once it is open: see gptworks/training/problem.py")
    checked(problem.identity, str, f"{class_of(kind)}.identity")
    for name in ("unit", "epoch_tokens", "eval_tokens", "bytes_per_token"):
        value = getattr(problem, name)
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise UsageError(f"{class_of(kind)}.{name} is {value!r}: it has to be a number above 0")
    return problem
