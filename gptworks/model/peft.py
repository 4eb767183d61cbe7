"""Adapters as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors.

Where a family joins several of our matrices in one, their adapters are written as one of the sum of the ranks: A
stacked, B in blocks, which is the same product. One that is read is shared out among the matrices, each with all of A.
"""

import math
import re
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from gptworks.core.config import Adapter
from gptworks.core.errors import DataError
from gptworks.model.adapters import LoRALinear
from gptworks.model.families import FAMILIES
from gptworks.model.linear import BlockLinear
from gptworks.model.lowbit import hold
from gptworks.model.transformer import Transformer

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
KEY = re.compile(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)(?:\.weight)?")
# Keys of adapter_config.json by which PEFT computes something else, and the values that change nothing.
CHANGING: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "lora_bias": (False, None), "modules_to_save": (None, []),
    "trainable_token_indices": (None,), "target_parameters": (None, []), "layer_replication": (None,),
    "alora_invocation_tokens": (None,), "use_qalora": (False, None), "use_bdlora": (None, False),
    "arrow_config": (None,), "kasa_config": (None,), "velora_config": (None,), "monteclora_config": (None,),
    # Other ways to begin change the base, and the adapter then goes with another than the one it names.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}  # fmt: skip
Raw = dict[str, Any]


# -- writing -----------------------------------------------------------------------------------------------------


def write(model: Transformer, adapter: Adapter, base: str) -> tuple[Raw, dict[str, Tensor]]:
    """Makes the content of adapter_config.json and the tensors of adapter_model.safetensors."""
    every = _by_module(model)
    adapted = {name: parts for name, parts in every.items() if any(isinstance(p, LoRALinear) for p in parts.values())}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, parts in adapted.items():
        leaves, scale = _joined(model, parts)
        rank = len(leaves[A])
        ranks[name] = rank
        alphas[name] = scale * (math.sqrt(rank) if adapter.use_rslora else rank)
        for leaf, value in leaves.items():
            tensors[f"base_model.model.{name}.{leaf}"] = value.detach().cpu().float().contiguous()
    rank, alpha = _commonest(list(ranks.values())), _commonest(list(alphas.values()))
    last = {name.rpartition(".")[2] for name in adapted}
    all_of_them = {name for name in every if name.rpartition(".")[2] in last} == adapted.keys()
    raw = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": adapter.dropout, "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora, "bias": "none", "fan_in_fan_out": FAMILIES[model.config.family].transposed,
        "target_modules": sorted(last if all_of_them else adapted),
        "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {name: other for name, other in alphas.items() if other != alpha},
    }  # fmt: skip
    return raw, tensors


def _commonest(values: list[Any]) -> Any:
    return max(values, key=values.count)


def _by_module(model: Transformer) -> dict[str, dict[str, BlockLinear]]:
    """Every linear layer of the blocks: by the name of the module that has it in transformers, and by our part."""
    family, modules = FAMILIES[model.config.family], defaultdict[str, dict[str, BlockLinear]](dict)
    for name, layer in model.linears().items():
        number, _, part = name.removeprefix("model.layers.").partition(".")
        modules[f"{family.root}{family.layers}{number}.{family.module_of(part)}"][part] = layer
    return modules


def _joined(model: Transformer, parts: dict[str, BlockLinear]) -> tuple[dict[str, Tensor], float]:
    """One adapter for all parts of a module, and its scale. A part without one gets rows of zeros."""
    family, lora = FAMILIES[model.config.family], {n: l for n, l in parts.items() if isinstance(l, LoRALinear)}
    total, place, rows, lengths = sum(len(layer.lora_A) for layer in lora.values()), 0, [], []
    for layer in parts.values():
        if isinstance(layer, LoRALinear):
            rows.append(F.pad(layer.lora_B.detach(), (place, total - place - len(layer.lora_A))))
            place += len(layer.lora_A)
            lengths.append(layer.magnitude)
        else:
            rows.append(torch.zeros(layer.out_features, total, device=next(iter(lora.values())).lora_A.device))
            lengths.append(layer.plain_weight().norm(dim=1))
    scales = {layer.scale for layer in lora.values()}
    assert len(scales) == 1, "the parts of a module are adapted alike"
    leaves = {A: torch.cat([layer.lora_A for layer in lora.values()]), B: family.together(rows, model.config)}
    known = [length for length in lengths if length is not None]
    if len(known) == len(lengths):
        leaves[MAGNITUDE] = family.together([length[:, None] for length in known], model.config)[:, 0]
    return leaves, scales.pop()


# -- reading -----------------------------------------------------------------------------------------------------


def read_settings(raw: Raw) -> Adapter:
    """Reads adapter_config.json as our settings. Raises DataError."""
    for key, allowed in CHANGING.items():
        if key in raw and raw[key] not in allowed:
            raise DataError(f"adapter_config.json has {key} {str(raw[key])[:80]}, which this version does not read")
    ours = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "use_rslora": "use_rslora",
            "use_dora": "use_dora"}  # fmt: skip
    usual = {"r": 8, "lora_alpha": 8}  # PEFT's
    said = {name: raw.get(key, usual.get(key)) for name, key in ours.items()}
    try:
        return Adapter.model_validate({"kind": "lora"} | {k: v for k, v in said.items() if v is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        raise DataError(f"adapter_config.json: {ours[str(problem['loc'][0])]}: {problem['msg']}") from None


def read(model: Transformer, raw: Raw, tensors: dict[str, Tensor], base: str | None) -> Transformer:
    """A frozen copy of a plain model with a PEFT folder's adapters; `base` is as in `adapter.base`.

    Raises DataError for an adapter of another model, and for what PEFT can do and we do not.
    """
    settings, family = read_settings(raw), FAMILIES[model.config.family]
    frozen = hold(model, base)
    modules = _by_module(frozen)
    leaves = {A, B, MAGNITUDE} if settings.use_dora else {A, B}
    for name, tensors_of in _by_name(tensors).items():
        if name not in modules:
            raise DataError(f"the adapter is for another model: a {model.config.family} has no layer {name[:200]}")
        if tensors_of.keys() != leaves:
            raise DataError(
                f"the adapter of {name} has {', '.join(sorted(tensors_of))} and not {', '.join(sorted(leaves))}"
            )
        parts = modules[name]
        columns, outputs = next(iter(parts.values())).in_features, sum(p.out_features for p in parts.values())
        if tensors_of[A].ndim != 2 or not len(tensors_of[A]):
            raise DataError(f"{A} of {name} is {list(tensors_of[A].shape)[:8]}, which has no rank")
        rank = len(tensors_of[A])
        expected = {A: (rank, columns), B: (outputs, rank), MAGNITUDE: (outputs,)}
        for leaf, value in tensors_of.items():
            if value.shape != expected[leaf]:
                raise DataError(
                    f"the adapter is for another model: {leaf} of {name} is {list(value.shape)[:8]}, and the layer "
                    f"takes {list(expected[leaf])}"
                )
        alpha = _by_pattern(raw.get("alpha_pattern") or {}, name, settings.alpha)
        scale = alpha / (math.sqrt(rank) if settings.use_rslora else rank)
        rows = family.apart(tensors_of[B], tuple(parts), model.config)
        lengths = family.apart(tensors_of[MAGNITUDE][:, None], tuple(parts), model.config) if settings.use_dora else []
        for index, (part, layer) in enumerate(parts.items()):
            lora = LoRALinear(layer, rank, scale=scale, dropout=settings.dropout, dora=settings.use_dora)
            lora.lora_A.data.copy_(tensors_of[A])
            lora.lora_B.data.copy_(rows[index])
            if lora.magnitude is not None:
                lora.magnitude.data.copy_(lengths[index][:, 0])
            number = name.removeprefix(f"{family.root}{family.layers}").partition(".")[0]
            frozen.set_submodule(f"model.layers.{number}.{part}", lora)
    return frozen


def _by_name(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each adapted module. Raises DataError."""
    modules = defaultdict[str, dict[str, Tensor]](dict)
    for key, value in tensors.items():
        match = KEY.fullmatch(key)
        if not match:
            raise DataError(f"the adapter has {key[:200]}, which this version does not read")
        modules[match[1]][match[2]] = value
    return modules


def _by_pattern(patterns: Any, name: str, usual: float) -> float:
    """The value of the first pattern that matches a module's name as in PEFT; here a pattern is a name."""
    if not isinstance(patterns, dict):
        raise DataError("adapter_config.json: alpha_pattern is not an object")
    for pattern, value in patterns.items():
        if not re.fullmatch(r"\^?[\w.]+\$?", pattern) or type(value) not in (int, float) or not 0 < value < 1e12:
            raise DataError(
                f"adapter_config.json has alpha_pattern {pattern[:80]}: {str(value)[:80]}, which is not read"
            )
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(value)
    return usual
