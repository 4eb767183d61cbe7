"""The sections of a configuration: every key with its type, its default, its meaning, and what a continued run may do.

Beside each key stands whether a run that exists may continue with another value: `fixed` keys may not change;
`flexible` ones may, and what changed is kept with the step it holds from; `free` ones do not touch the result.

A Config is what was asked: what it leaves open is None. A Chosen is what a run has: every such key is a value.
"""

import codecs
import encodings
import re
from functools import cache
from importlib.util import find_spec
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)  # fmt: skip

from gptworks.core import folder
from gptworks.core.config.messages import explain, shown
from gptworks.core.errors import UsageError
from gptworks.core.registry import class_of

NUMBER = r"[+-]?(?:[0-9](?:_?[0-9])*\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"  # 1_000, 3e-4, .5
UNITS = {"k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def _number(value: Any) -> Any:
    """'10M' -> 10000000, '3e-4' -> 0.0003; a boolean is not a number."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    if isinstance(value, str):
        match = re.fullmatch(rf"({NUMBER})([kMBGT]?)", value, re.ASCII)
        if match:
            scaled = float(match[1].replace("_", "")) * UNITS.get(match[2], 1)
            return int(scaled) if scaled.is_integer() and "." not in match[1] and "e" not in match[1] else scaled
    return value


def _whole(value: Any) -> Any:
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


# An upper bound far above any real use, so that an absurd value is refused here and not by an overflow elsewhere.
Count = Annotated[int, BeforeValidator(_whole), Field(gt=0, le=10**15)]
Threads = Annotated[int, BeforeValidator(_whole), Field(gt=0, le=1024)]  # thousands use up a system's processes
Natural = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=10**15)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, lt=1e30)]
NonNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1e30)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
Fraction = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]

# The name of a file or folder, or of something else, which stays as it is.
Place = Annotated[str, AfterValidator(folder.expanded)]
NO_TEXT = ("idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "charmap", "mbcs", "oem")


def _encoding(name: str) -> str:
    """Gives Python's own name of a text encoding. Only what the standard library has is looked up, since a codec is a
    module that is loaded by its name."""
    plain = encodings.normalize_encoding(name).lower()
    module = encodings.aliases.aliases.get(plain, plain)
    known = re.fullmatch("[a-z0-9_]+", module, re.ASCII) and module not in NO_TEXT
    if known and find_spec(f"encodings.{module}"):
        try:
            codec = codecs.lookup(module)
        except LookupError:  # a module there that is no codec
            codec = None
        if codec and codec._is_text_encoding:
            return codec.name
    raise ValueError("not the name of a text encoding, such as utf-8, gb18030, utf-16-le, cp1252, shift_jis or big5")


def fixed(default: Any, help: str) -> Any:
    """A key that shapes the result: a run continues only with the value it was started with."""
    return Field(default, description=help, json_schema_extra={"resume": "fixed"})


def flexible(default: Any, help: str) -> Any:
    """A key that may change when a run is continued: the result differs from there on, and the run records it."""
    return Field(default, description=help, json_schema_extra={"resume": "flexible"})


def free(default: Any, help: str) -> Any:
    """A key that does not touch the result: it may differ whenever a run is continued."""
    return Field(default, description=help, json_schema_extra={"resume": "free"})


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and re.search("[\ud800-\udfff]", text):
                raise ValueError("not valid Unicode text")
        return value


class Weighted(Section):
    """A source of a mixture: its share of the training tokens is its weight over the sum of all weights."""

    path: Annotated[Place, Field(min_length=1)]
    weight: Positive

    def __repr__(self) -> str:
        return f"{{path: {self.path}, weight: {self.weight:g}}}"


class Data(Section):
    train: Place | list[Place] | list[Weighted] = fixed(
        "shakespeare", "file, folder, glob or built-in name, a list of them, or a list of {path, weight}"
    )
    eval: Place | None = fixed(None, "validation text; None holds some of the training documents out")
    text_column: str | None = fixed(None, "the field of a row that holds the text; None finds it")
    separator: str | None = fixed(None, "cuts a text file into documents; None: a file is one document")
    eval_fraction: Annotated[float, BeforeValidator(_number), Field(gt=0, lt=1)] | None = fixed(
        None, "share of the text held out, in bytes"
    )
    eval_bytes: Count | None = fixed(None, "at most so many bytes of validation text")
    encoding: Annotated[str, AfterValidator(_encoding)] | None = fixed(
        None, "of text files, by Python's name (gb18030, cp1252, ...); None: UTF-8, or what a byte order mark says"
    )
    newlines: Literal["lf", "keep"] = fixed("lf", "line ends of a text: CRLF becomes LF, or stays")
    invalid_utf8: Literal["replace", "error"] = fixed(
        "replace", "bytes that cannot be decoded: U+FFFD and counted, or stop"
    )
    max_bad_rows: Share = fixed(0.0, "share of a source's rows that may be unreadable: skipped and counted; 0: none")
    mask_documents: bool = fixed(False, "attention stays within a document, positions restart with it")
    shards: Place | None = fixed(None, "folder of tokenizer and shards shared between runs; None: the run's own")

    @field_validator("train", mode="before")
    @classmethod
    def _mixture(cls, value: Any) -> Any:
        """Checks a mixture by itself, so that its errors name the entry and not every type `train` could have."""
        if not isinstance(value, list) or not any(isinstance(entry, (dict, Weighted)) for entry in value):
            return value
        if not all(isinstance(entry, (dict, Weighted)) for entry in value):
            raise ValueError("some entries have a weight and some have none: give every entry {path, weight}, or none")
        entries = []
        for entry in value:
            try:
                entries.append(Weighted.model_validate(entry))
            except ValidationError as error:
                problems = [text for _, text in explain(error, Weighted.model_fields, [])]
                worst = min(problems, key=lambda text: not text.startswith("unknown"))  # a misspelt key before all
                raise ValueError(f"{shown(entry.get('path'))}: {worst}") from None
        paths = [entry.path for entry in entries]
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise ValueError(f"{twice[0][:80]!r} is named twice: add the weights up")
        return entries

    @property
    def places(self) -> list[str]:
        """The places of the training text, one entry a source."""
        entries = self.train if isinstance(self.train, list) else [self.train]
        return [entry.path if isinstance(entry, Weighted) else entry for entry in entries]

    @property
    def weights(self) -> list[float] | None:
        """The weight of every source, or None where the text is taken as it lies."""
        entries = self.train if isinstance(self.train, list) else []
        return [entry.weight for entry in entries if isinstance(entry, Weighted)] or None


class Tokenizer(Section):
    kind: Literal["bpe", "char", "bytes"] = fixed("bpe", "byte-level BPE, one token a character, or one a byte")
    path: Place | None = fixed(
        None,
        "a tokenizer to use as it is: tokenizer.json, a .tiktoken file, SentencePiece's tokenizer.model, "
        "vocab.json with merges.txt, or a folder",
    )
    vocab_size: Annotated[int, BeforeValidator(_whole), Field(ge=260, le=1_000_000)] | None = fixed(
        None, "BPE vocabulary, the 256 bytes and the reserved tokens included; by default it follows the text's size"
    )
    pattern: Literal["gpt-2", "llama-bpe", "qwen2", "gpt-4o"] = fixed(
        "qwen2", "how text is split before BPE, by llama.cpp's name"
    )
    sample_bytes: Count = fixed(
        16_000_000, "BPE is trained on a sample of at most so many bytes, spread over the corpus"
    )


class Model(Section):
    path: Place | None = fixed(None, "a model folder to start from (continued pretraining)")
    add_tokens: list[str] = fixed([], "control tokens that its tokenizer is to have too; a row starts as the mean row")
    family: str | None = fixed(None, "gpt2, llama, qwen3 or qwen3_moe: the class that the saved folder opens as")
    depth: Annotated[int, BeforeValidator(_whole), Field(gt=0, le=1000)] | None = fixed(
        None, "one dial: this many layers, all else follows"
    )
    parameters: Annotated[int, BeforeValidator(_whole), Field(ge=1000, le=10**13)] | None = fixed(
        None, "the other form of the dial: about this many parameters"
    )
    hidden_size: Annotated[int, BeforeValidator(_whole), Field(gt=0, le=1_000_000)] | None = fixed(None, "width")
    num_hidden_layers: Annotated[int, BeforeValidator(_whole), Field(gt=0, le=10_000)] | None = fixed(None, "layers")
    num_attention_heads: Annotated[int, BeforeValidator(_whole), Field(gt=0, le=100_000)] | None = fixed(
        None, "query heads"
    )
    num_key_value_heads: Annotated[int, BeforeValidator(_whole), Field(gt=0, le=100_000)] | None = fixed(
        None, "key-value heads"
    )
    head_dim: Annotated[int, BeforeValidator(_whole), Field(gt=0, le=100_000)] | None = fixed(None, "width of one head")
    intermediate_size: Annotated[int, BeforeValidator(_whole), Field(gt=0, le=10_000_000)] | None = fixed(
        None, "feed-forward width"
    )
    num_experts: Annotated[int, BeforeValidator(_whole), Field(gt=0, le=10_000)] | None = fixed(
        None, "MLPs a layer, of which a router chooses for each token (qwen3_moe)"
    )
    num_experts_per_tok: Annotated[int, BeforeValidator(_whole), Field(gt=0, le=10_000)] | None = fixed(
        None, "experts for each token"
    )
    moe_intermediate_size: Annotated[int, BeforeValidator(_whole), Field(gt=0, le=10_000_000)] | None = fixed(
        None, "feed-forward width of an expert"
    )
    norm: Literal["layernorm", "rmsnorm"] | None = fixed(None, "normalisation before each part")
    positions: Literal["learned", "sinusoidal", "rotary"] | None = fixed(None, "how the model knows token order")
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu"] | None = fixed(None, "the MLP's nonlinearity")
    qk_norm: bool | None = fixed(None, "RMS-normalise queries and keys per head")
    bias: bool | None = fixed(None, "biases in the linear layers")
    tie_word_embeddings: bool | None = fixed(None, "one matrix for input embedding and head")
    rope_theta: Positive | None = fixed(None, "base of the rotary frequencies")
    dropout: Share | None = fixed(None, "on embeddings, attention weights and residual branches")
    attention_dropout: Share | None = fixed(None, "on attention weights, if other than model.dropout; 0 is faster")


class Adapter(Section):
    kind: Literal["lora"] | None = fixed(None, "train small matrices beside the frozen ones of model.path; None: all")
    rank: Annotated[int, BeforeValidator(_whole), Field(gt=0, le=100_000)] = fixed(16, "of each pair of matrices")
    alpha: Positive = fixed(32.0, "their product counts alpha/rank times")
    dropout: Share = fixed(0.0, "on what an adapter reads")
    target_modules: list[str] | None = fixed(
        None, "of the blocks: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; None: all"
    )
    use_rslora: bool = fixed(False, "rank-stabilised: alpha/sqrt(rank) times")
    use_dora: bool = fixed(False, "learn the length of each row of the sum apart")
    base: str | None = fixed(None, "how frozen layers are held: fp32, bf16, int8, int4 or nf4; None: as they multiply")


class Change(Section):
    """A change of a run's plan from a step on: see `training/schedule.py`."""

    step: Natural  # steps done before it
    length: Count | None = None  # steps in the whole run from now on
    decay: bool = False  # the rate falls from here to the end, whatever the schedule says
    lr: NonNegative | None = None
    adam_lr: NonNegative | None = None
    pace: bool = False  # the length alone: rates and intervals stay as they were planned by share of the run
    evaluations: bool = True  # of a pace: whether those before the last are made
    in_steps: bool = False  # of a pace: evaluations stay at the steps that train.eval_every asked for
    stretch: bool = False  # a pace of version 0.1.0: rates bend, intervals grow with the length
    values: dict[str, Any] = {}  # of other keys, by dotted name
    why: str = ""


class ProblemSettings(Section):
    """The name of the problem that a run solves. A problem may have keys of its own beside these
    (`training/problem.py`)."""

    kind: str = fixed("pretraining", "what the run learns: pretraining (or file.py:Name)")


# Torch is not loaded before a problem is opened: its file imports it where it needs it.
PROBLEMS = {"pretraining": "gptworks.training.pretraining:Pretraining"}


class Train(Section):
    seed: Natural = fixed(1, "initial weights, data order and dropout follow from it")
    max_steps: Count | None = flexible(None, "stop after so many optimizer steps")
    max_tokens: Count | None = flexible(None, "stop after about so many tokens that are trained on")
    max_epochs: Positive | None = flexible(
        None, "stop after so many passes over the training text; 8 where time alone is given"
    )
    target_loss: Positive | None = flexible(None, "stop once the evaluation loss (nats a token) is at or below this")
    time_budget_s: Positive | None = fixed(None, "seconds from process start to the model folder; becomes a step count")
    patience: Count | None = flexible(
        None, "stop after so many evaluations without improvement, and keep the best weights"
    )
    batch_tokens: Literal["full"] | Count | None = fixed(None, "tokens per optimizer step; 'full': the whole corpus")
    micro_batch: Count | None = fixed(None, "rows per forward pass; None: as many as fit and gain")
    context: Annotated[int, BeforeValidator(_whole), Field(ge=2, le=10_000_000)] | None = fixed(
        None, "tokens a row sees at once"
    )
    optimizer: str = fixed("muon", "muon, adamw, adam or sgd (or file.py:Name)")
    lr: NonNegative | None = flexible(None, "peak learning rate (muon: of the matrices)")
    adam_lr: NonNegative | None = flexible(None, "muon only: peak learning rate of embeddings, head, norms and biases")
    momentum: Share | None = fixed(None, "muon and sgd")
    nesterov: bool = fixed(True, "muon and sgd: look ahead along the momentum")
    betas: tuple[Share, Share] = fixed((0.9, 0.95), "Adam's averaging of gradient and squared gradient")
    weight_decay: NonNegative | None = fixed(None, "decoupled: w shrinks by lr times this, matrices only")
    l2: NonNegative = fixed(0.0, "penalty l2/2 * sum(w^2) in the loss, matrices only")
    l1: NonNegative = fixed(0.0, "penalty l1 * sum(|w|) in the loss, matrices only")
    clip: NonNegative = fixed(1.0, "largest norm of the whole gradient; 0 never clips")
    freeze: list[str] = fixed([], "parameters that stay as they are, by patterns: ['*.mlp.*', 'model.embed_tokens.*']")
    skip_spikes: Positive | None = fixed(None, "skip a step whose gradient norm is so many deviations above the usual")
    ema: Share | None = fixed(None, "keep, evaluate and save an average of the weights that forgets at this rate")
    z_loss: NonNegative = fixed(0.0, "penalty z_loss * log(sum(exp(logits)))^2, which keeps logits small")
    router_aux_loss: NonNegative = fixed(0.01, "experts: weight of the loss that keeps them used alike")
    router_z_loss: NonNegative = fixed(0.0, "experts: penalty router_z_loss * log(sum(exp(router)))^2")
    label_smoothing: Share = fixed(0.0, "share of each target that is spread over the vocabulary")
    schedule: str = fixed("wsd", "constant, linear, cosine, step, inverse_sqrt or wsd (or file.py:Name)")
    warmup: Fraction | None = fixed(None, "share of the steps over which the rate rises from zero")
    cooldown: Fraction = fixed(0.5, "wsd: share of the steps over which the rate falls")
    min_lr: Fraction = fixed(0.0, "where decay ends, as a share of the peak")
    decay_now: bool = flexible(False, "begin the decay of a run at the step it stands at")
    changes: list[Change] = fixed([], "what holds from a step on, as [{step: 300, lr: 0.01}]; later ones are kept here")
    find_lr: bool = free(False, "no training: try rising learning rates, draw the losses, propose one")
    step_every: Fraction = fixed(0.25, "step: the rate drops each time this share of the run has passed")
    step_gamma: Fraction = fixed(0.3, "step: the factor of each drop")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = fixed(
        "auto",
        "of the forward and backward pass; fp16: for GPUs without bf16, with a scale of the loss; fp8: bf16 with the "
        "blocks' products in float8 (H100 and later)",
    )
    compile: Literal["auto"] | bool = fixed("auto", "torch.compile; auto: where it saves more than it costs")
    deterministic: Literal["auto"] | bool = fixed("auto", "repeatable to the bit, where kernels are; auto: on a CPU")
    threads: Threads | None = fixed(None, "CPU threads; part of a bitwise promise, so a run keeps its number")
    workers: Threads | None = fixed(None, "of these, how many compute micro-batches of their own, side by side")
    reduce: Literal["sum", "canonical"] = fixed(
        "sum", "how gradients are added up; canonical: the same bits on 1, 2, 4, ... processes"
    )
    timeout_s: Positive = free(300.0, "several processes: end them all where one makes no progress for so long")
    checkpoint_every: Count | None = free(None, "steps between checkpoints")
    eval_every: Count | None = flexible(None, "steps between evaluations")
    log_every: Count | None = free(None, "steps between logged lines; None: a hundred in a run, ten steps at most")
    tensorboard: bool = free(True, "write tensorboard/ beside metrics.jsonl")
    wandb: str | None = free(None, "also log to this Weights & Biases project")


class Generate(Section):
    prompts: list[str] | None = free(
        None, "continued by the samples of train, generate and report; empty: a text's beginning; None: held-out lines"
    )
    max_new_tokens: Count = free(200, "length of a sample")
    temperature: NonNegative = free(0.8, "0 is greedy")
    top_k: Natural = free(0, "0: all")
    top_p: Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)] = free(1.0, "nucleus")
    min_p: Fraction = free(0.0, "drop tokens less likely than this share of the likeliest")
    repetition_penalty: Positive = free(1.0, "1: none")


def _differing(section: Section) -> set[str]:
    """The keys that do not have their default: a config.yaml spells every key, so being spelled says nothing."""
    return {name for name, field in type(section).model_fields.items() if getattr(section, name) != field.default}


BESIDE_PATH = {"path", "add_tokens", "dropout"}  # keys of the model section that go with model.path
STAGES = Literal["train", "evaluate", "generate", "report"]


class Config(Section):
    """A whole recipe. `gptworks train RECIPE --dry-run` prints it resolved."""

    data: Data = Data()
    tokenizer: Tokenizer = Tokenizer()
    model: Model = Model()
    adapter: Adapter = Adapter()
    problem: ProblemSettings = ProblemSettings()
    train: Train = Train()
    generate: Generate = Generate()
    license: str | None = free(None, "the model's licence as the hub names it, for its card; None: its parent's")
    stages: list[STAGES] = free(["train", "evaluate", "generate", "report"], "what `gptworks run` does, in order")

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        if self.model.depth and self.model.parameters:
            raise ValueError(
                "model.depth and model.parameters are two forms of one dial: give one, and null for the other"
            )
        if self.model.path and (beside := _differing(self.model) - BESIDE_PATH):
            raise ValueError(f"model.path={self.model.path[:80]} brings its own shape; remove model.{min(beside)}")
        if self.model.path and (beside := _differing(self.tokenizer)):
            raise ValueError(
                f"model.path={self.model.path[:80]} brings its own tokenizer; remove tokenizer.{min(beside)}"
            )
        if self.model.add_tokens and (self.model.path is None or self.adapter.kind):
            raise ValueError("model.add_tokens adds rows to the whole model of model.path: set that, and no adapter")
        if self.adapter.kind is None and (beside := _differing(self.adapter)):
            raise ValueError(f"adapter.{min(beside)} says nothing without adapter=lora")
        if self.adapter.kind and self.model.path is None:
            raise ValueError("adapter=lora trains beside the weights of a model: add model=FOLDER")
        if self.train.batch_tokens == "full" and self.train.max_tokens:
            raise ValueError("train.batch_tokens=full counts epochs: use train.max_epochs in place of train.max_tokens")
        order = list(get_args(STAGES))
        if self.stages != sorted(set(self.stages), key=order.index):
            raise ValueError(f"stages={','.join(self.stages)}: each comes once, in the order {', '.join(order)}")
        return self


class ChosenTrain(Train):
    """The settings of a run that has begun: what was left open is decided."""

    batch_tokens: Literal["full"] | Count
    micro_batch: Count
    context: int
    max_steps: Count
    lr: NonNegative
    weight_decay: NonNegative
    warmup: Fraction
    precision: Literal["fp32", "bf16", "fp16", "fp8"]
    compile: bool
    deterministic: bool
    threads: Threads
    workers: Threads
    checkpoint_every: Count
    eval_every: Count
    log_every: Count


class ChosenGenerate(Generate):
    """The samples of a run that has begun."""

    prompts: list[str] = [""]

    @field_validator("prompts", mode="before")
    @classmethod
    def _at_least_a_beginning(cls, value: Any) -> Any:
        return [""] if value is None else value


class Chosen(Config):
    """A configuration of which nothing is open."""

    train: ChosenTrain
    generate: ChosenGenerate = ChosenGenerate()


C = TypeVar("C", bound=Config)


@cache
def with_problem(kind: type[C], settings: type[ProblemSettings]) -> type[C]:
    """`kind` with the settings of a problem as its section `problem`."""
    if settings is ProblemSettings:
        return kind
    for name, field in settings.model_fields.items():
        if not isinstance(field.json_schema_extra, dict) or "resume" not in field.json_schema_extra:
            raise UsageError(
                f"problem.{name}: a key is declared by fixed(), flexible() or free(), which say its default"
            )
    defaults = settings()
    try:
        settings.model_validate({name: getattr(defaults, name) for name in settings.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"problem.{first['loc'][0]}: {class_of(settings)} declares the default {first['input']!r}: {first['msg']}"
        ) from None
    return create_model(kind.__name__, __base__=kind, problem=(settings, defaults))


def keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a configuration with its field, sections left out."""
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            fields |= keys(field.annotation, f"{prefix}{name}.")
        else:
            fields[prefix + name] = field
    return fields


def keys_of_kind(kind: str, section: type[BaseModel] = Config) -> list[str]:
    """The dotted keys that are "fixed", "flexible" or "free": whether a continued run may change them."""
    return [key for key, field in keys(section).items() if field.json_schema_extra["resume"] == kind]


def get(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def is_unset(config: Config, key: str) -> bool:
    """True where null was asked for by name, and a run that has begun may have it so."""
    *path, name = key.split(".")
    section: Any = config
    for part in path:
        section = getattr(section, part)
    in_run = keys(Chosen).get(key)
    required = in_run is not None and type(None) not in (get_args(in_run.annotation) or (in_run.annotation,))
    return getattr(section, name) is None and name in section.model_fields_set and not required
