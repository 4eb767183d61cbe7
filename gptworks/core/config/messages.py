"""What is wrong with a configuration, in one line that names the key and the nearest valid one."""

import difflib
from typing import Any

from pydantic import ValidationError

# What others call our keys: nanoGPT's and Hugging Face's names.
ELSEWHERE = {
    "batch_size": "train.batch_tokens", "beta1": "train.betas", "block_size": "train.context",
    "d_model": "model.hidden_size", "dtype": "train.precision", "epochs": "train.max_epochs",
    "eval_interval": "train.eval_every",
    "gradient_accumulation_steps": "train.micro_batch", "grad_clip": "train.clip", "learning_rate": "train.lr",
    "lr_scheduler_type": "train.schedule", "max_iters": "train.max_steps", "max_seq_length": "train.context",
    "n_embd": "model.hidden_size", "n_head": "model.num_attention_heads", "n_layer": "model.num_hidden_layers",
    "num_train_epochs": "train.max_epochs", "optim": "train.optimizer", "warmup_iters": "train.warmup",
    "warmup_ratio": "train.warmup", "warmup_steps": "train.warmup",
}  # fmt: skip


def explain(error: ValidationError | RecursionError, known: list[str], sections: list[str]) -> str:
    """The first problem of a validation. `known` are the dotted keys, `sections` what groups them."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if isinstance(part, (str, int))]
    key = ".".join(
        part for part in path if not part.startswith(("function-", "constrained-", "literal[", "list[", "tuple["))
    )
    if first["type"] == "extra_forbidden":
        close = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]  # in another section
        close = close or [ELSEWHERE[name] for name in [key.rpartition(".")[2]] if name in ELSEWHERE]
        close = close or difflib.get_close_matches(key, known + sections, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else "`gptworks train RECIPE --dry-run` lists every key"
        return f"unknown key {key[:100]!r}: {hint}"
    while key and key not in known and key not in sections and "." in key:
        key = key.rpartition(".")[0]  # drop pydantic's union member names
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if key in known:
        alternatives = [
            e["msg"] for e in error.errors() if e["loc"][: key.count(".") + 1] == first["loc"][: key.count(".") + 1]
        ]
        message = " or ".join(dict.fromkeys(m.removeprefix("Value error, ") for m in alternatives))
        return f"{key}={shown(first['input'])}: {message[0].lower() + message[1:]}"
    return f"{key}: {message}" if key else message


def shown(value: Any) -> str:
    """A value for an error line, however large it is."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return "a number of more than 300 digits"
    if isinstance(value, (dict, list, tuple)):
        value = type(value).__name__ if len(value) > 5 or any(isinstance(v, (dict, list)) for v in value) else value
    shown = repr(value[:80] if isinstance(value, str) else value)
    return shown[:80]
