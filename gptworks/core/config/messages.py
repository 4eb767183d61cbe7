"""What is wrong with a configuration, in one line that names the key, what it takes, and the nearest valid one."""

import difflib
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

# What others call our keys: nanoGPT's and Hugging Face's names.
ELSEWHERE = {
    "batch_size": "train.batch_tokens", "beta1": "train.betas", "block_size": "train.context",
    "d_model": "model.hidden_size", "dtype": "train.precision", "epochs": "train.max_epochs",
    "eval_interval": "train.eval_every",
    "gradient_accumulation_steps": "train.micro_batch", "grad_clip": "train.clip", "learning_rate": "train.lr",
    "lr_scheduler_type": "train.schedule", "max_iters": "train.max_steps", "max_seq_length": "train.context",
    "n_embd": "model.hidden_size", "n_head": "model.num_attention_heads", "n_layer": "model.num_hidden_layers",
    "data.file": "data.train", "data.path": "data.train", "dataset": "data.train", "max_length": "train.context",
    "num_train_epochs": "train.max_epochs", "optim": "train.optimizer", "warmup_iters": "train.warmup",
    "warmup_ratio": "train.warmup", "warmup_steps": "train.warmup",
}  # fmt: skip


# What others have a key for, and we do not.
INSTEAD = {
    "device": "the best device here is taken; CUDA_VISIBLE_DEVICES= in the environment takes the CPU",
    "output_dir": "the run folder is named by --out", "out_dir": "the run folder is named by --out",
}  # fmt: skip
NAMES: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true, false"}
TOO_MUCH = 10**9  # a bound above it is there against an overflow, and is told only to who meets it
MOST_TOLD = 5


def takes(annotation: Any, bounds: tuple[Any, ...] | None = None) -> str:
    """The values that an annotation allows, in words; with `bounds`, what a field says of itself, also how large."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return takes(inner[0], None if bounds is None else inner[1:])
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        words = [takes(member, bounds) for member in inner if member is not type(None)]
        return ", ".join(dict.fromkeys(words))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(annotation.model_fields)}}}"
    if origin is list:
        return "list of text" if inner[0] is str else f"list of {takes(inner[0], bounds)}"
    if origin is tuple:
        return f"{len(inner)} numbers" + ("" if bounds is None else _range(get_args(inner[0])[1:]))
    return NAMES.get(annotation, str(annotation)) + ("" if bounds is None else _range(bounds))


def takes_of(field: FieldInfo) -> str:
    """The values that a key takes, in words: 'whole number above 0'."""
    return takes(field.annotation, tuple(field.metadata))


def _range(bounds: tuple[Any, ...]) -> str:
    """The bounds of a number, in words: ' above 0', ' from 0 to below 1'."""
    each = [inner for bound in bounds for inner in (bound.metadata if isinstance(bound, FieldInfo) else [bound])]
    limits = {name: getattr(bound, name) for bound in each for name in ("gt", "ge", "lt", "le") if hasattr(bound, name)}
    if any(getattr(bound, "min_length", 0) for bound in each):
        return " that is not empty"
    low = next((name for name in ("gt", "ge") if name in limits), None)
    high = next((name for name in ("lt", "le") if name in limits and limits[name] < TOO_MUCH), None)
    words = {
        ("gt", None): " above {:,}", ("ge", None): " of {:,} or more", ("gt", "lt"): " above {:,} and below {:,}",
        ("gt", "le"): " above {:,}, at most {:,}", ("ge", "lt"): " from {:,} to below {:,}",
        ("ge", "le"): " from {:,} to {:,}",
    }  # fmt: skip
    return words[low, high].format(*(limits[name] for name in (low, high) if name)) if low else ""


def explain(
    error: ValidationError | RecursionError, known: Mapping[str, FieldInfo], sections: list[str]
) -> list[tuple[str, str]]:
    """Gives each mistake as the key and a message that names it. `known` are the keys, `sections` what groups them."""
    if isinstance(error, RecursionError):
        return [("", "nested too deeply")]
    by_key: dict[str, list[Any]] = {}
    for each in error.errors():
        by_key.setdefault(_key(each, known, sections), []).append(each)
    return [(key, _message(key, errors, known=known, sections=sections)) for key, errors in by_key.items()]


def _key(error: Any, known: Mapping[str, FieldInfo], sections: list[str]) -> str:
    """The dotted key that an error is about, without the names that pydantic gives to the members of a union."""
    inner = ("function-", "constrained-", "literal[", "list[", "tuple[")
    path = [str(part) for part in error["loc"] if isinstance(part, (str, int))]
    key = ".".join(part for part in path if not part.startswith(inner))
    while error["type"] != "extra_forbidden" and key and key not in known and key not in sections and "." in key:
        key = key.rpartition(".")[0]
    return key


def _message(key: str, errors: list[Any], known: Mapping[str, FieldInfo], sections: list[str]) -> str:
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return unknown(key, list(known), sections)
    own = [e["msg"].removeprefix("Value error, ") for e in errors if e["type"] == "value_error"]
    if len(own) == len(errors) or not key:
        text = " or ".join(dict.fromkeys(own or [first["msg"]]))
        return f"{key}={shown(first['input'])}: {text}" if key in known else f"{key}: {text}" if key else text
    inside = [str(part) for part in first["loc"][key.count(".") + 1 :]] if key in known else []
    if first["type"] == "missing" and not inside:
        return f"{key}: is missing"
    if key not in known:
        some = next((name for name in known if name.startswith(f"{key}.")), f"{key}.KEY")
        return f"{key}={shown(first['input'])}: is a section of keys, for example {some}"
    said, field = f"{key}={shown(first['input'])}", known[key]
    entry = (get_args(field.annotation) or (None,))[0]
    if isinstance(entry, type) and issubclass(entry, BaseModel) and inside[-1:] and inside[-1] in entry.model_fields:
        name = inside[-1]
        return f"{key}: {name}={shown(first['input'])}: has to be {_a(takes_of(entry.model_fields[name]))}"
    if len(errors) == 1 and first["type"] in ("less_than", "less_than_equal") and first["ctx"].get("le", 0) > TOO_MUCH:
        return f"{said}: has to be at most {first['ctx']['le']:,}"
    if len(errors) == 1 and first["type"] == "less_than" and first["ctx"]["lt"] > TOO_MUCH:
        return f"{said}: has to be below {first['ctx']['lt']:g}"
    return f"{said}: has to be {_a(takes_of(field))}"


def _a(words: str) -> str:
    """A kind of value as the end of a sentence."""
    if words.startswith(("whole", "number", "list")):
        return f"a {words}"
    *others, last = words.split(", ")
    return " or ".join([*([", ".join(others)] if others else []), f"a {last}" if last.startswith("whole") else last])


def unknown(key: str, known: list[str], sections: list[str]) -> str:
    """A message for a key that is none, with the one that is likely meant."""
    name = key.rpartition(".")[2]
    if name in INSTEAD:
        return f"unknown key {key[:100]!r}: {INSTEAD[name]}"
    close = [ELSEWHERE[key]] if key in ELSEWHERE else []
    close = close or [each for each in known if each.rpartition(".")[2] == name]  # in another section
    close = close or [ELSEWHERE[each] for each in [name] if each in ELSEWHERE]
    close = close or difflib.get_close_matches(key, known + sections, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else "`gptworks keys` lists them"
    return f"unknown key {key[:100]!r}: {hint}"


def told(mistakes: list[str]) -> str:
    """Several mistakes in one line, as many as a person reads."""
    more = len(mistakes) - MOST_TOLD
    return "; ".join([*mistakes[:MOST_TOLD], *([f"and {more} more"] if more > 0 else [])])


def shown(value: Any) -> str:
    """A value for an error line, however large it is."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return "a number of more than 300 digits"
    if isinstance(value, (dict, list, tuple)):
        value = type(value).__name__ if len(value) > 5 or any(isinstance(v, (dict, list)) for v in value) else value
    shown = repr(value[:80] if isinstance(value, str) else value)
    return shown[:80]
