"""Model families: how a config.json and a weight file of each Hugging Face class map onto our decoder, both ways."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptworks.core.errors import DataError, UsageError
from gptworks.model.config import ModelConfig
from gptworks.model.transformer import sinusoids

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One class of models. The four functions are inverse in pairs and lose nothing."""

    architecture: str
    read_config: Callable[[dict[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    read_weights: Callable[[Tensors, ModelConfig], Tensors]
    write_weights: Callable[[Tensors, ModelConfig], Tensors]


def from_hf_config(raw: dict[str, Any]) -> ModelConfig:
    """The architecture a config.json describes. Raises DataError for what the decoder cannot express."""
    kind = raw.get("model_type")
    _check_values(raw)
    if raw.get("auto_map"):
        raise DataError("config.json asks for code of its own (auto_map); gptworks runs no code from a model folder")
    if raw.get("quantization_config"):
        raise DataError("config.json describes quantised weights, which this version does not read")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise DataError(f"config.json has model_type {kind!r}; this version reads {', '.join(FAMILIES)}")
    try:
        return FAMILIES[kind].read_config(raw)
    except KeyError as error:
        raise DataError(f"config.json lacks {error}") from None
    except (TypeError, ValueError, AttributeError, UsageError) as error:
        raise DataError(f"config.json: {error}") from None


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
    "n_embd", "n_layer", "n_head", "n_inner", "n_positions",
)  # fmt: skip
MOST = 10**12  # of anything, so that what is computed from sizes stays a number
_NUMBERS = (
    "rms_norm_eps", "layer_norm_epsilon", "rope_theta", "attention_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop",
)  # fmt: skip


def _check_values(raw: dict[str, Any]) -> None:
    """Raises DataError for a size that is no size and a number that is none; a null is a value left out."""
    for key in _SIZES:
        value = raw.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= MOST):
            raise DataError(f"config.json has {key} {str(value)[:80]}; it must be a whole number from 1 to {MOST:,}")
    for key in _NUMBERS:
        value = raw.get(key)
        if value is not None and (type(value) not in (int, float) or not 0 <= value < float("inf")):
            raise DataError(f"config.json has {key} {value!r}; it must be a number of at least 0")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(key), (dict, type(None))):
            raise DataError(f"config.json has {key} {raw[key]!r}; it must be an object")


# -- Llama and Qwen3: our own names ------------------------------------------------------------------------------


def _read_llama(raw: dict[str, Any]) -> ModelConfig:
    qwen = raw["model_type"] == "qwen3"
    if raw.get("hidden_act", "silu") != "silu":
        raise DataError(f"config.json has hidden_act {raw['hidden_act']!r}; {raw['model_type']} is read with silu")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise DataError(f"config.json scales rotary positions ({rope.get('rope_type')}), which this version does not")
    if raw.get("use_sliding_window"):
        raise DataError("config.json uses sliding-window attention, which this version does not")
    heads = raw["num_attention_heads"]
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        family=raw["model_type"],
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or (128 if qwen else raw["hidden_size"] // heads),
        intermediate_size=raw["intermediate_size"],
        max_position_embeddings=raw["max_position_embeddings"],
        qk_norm=qwen,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        attention_dropout=raw.get("attention_dropout", 0.0),
    )


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    raw = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "attention_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
    }
    if config.family == "llama":
        raw |= {"mlp_bias": config.mlp_bias, "pretraining_tp": 1}
    else:
        raw |= {"use_sliding_window": False}
    return raw


def _drop_shared_head(weights: Tensors, config: ModelConfig) -> Tensors:
    return {k: v for k, v in weights.items() if not (k == "lm_head.weight" and config.tie_word_embeddings)}


def _same_names(weights: Tensors, config: ModelConfig) -> Tensors:
    inverse_frequencies = (".rotary_emb.inv_freq",)  # a buffer that early Llama files carry
    return _drop_shared_head({k: v for k, v in weights.items() if not k.endswith(inverse_frequencies)}, config)


# -- GPT-2: query, key and value in one matrix, every matrix transposed ------------------------------------------

_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_GPT2_BLOCK = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def _read_gpt2(raw: dict[str, Any]) -> ModelConfig:
    activation = raw.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise DataError(f"config.json has activation_function {activation!r}; known: {', '.join(_GPT2_ACTIVATIONS)}")
    if not raw.get("scale_attn_weights", True) or raw.get("scale_attn_by_inverse_layer_idx", False):
        raise DataError("config.json scales attention in a way the decoder does not")
    width, heads = raw["n_embd"], raw["n_head"]
    return ModelConfig(
        family="gpt2",
        vocab_size=raw["vocab_size"],
        hidden_size=width,
        num_hidden_layers=raw["n_layer"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        intermediate_size=raw.get("n_inner") or 4 * width,
        max_position_embeddings=raw["n_positions"],
        norm="layernorm",
        positions="learned",
        activation=_GPT2_ACTIVATIONS[activation],
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", True)),
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        embed_dropout=raw.get("embd_pdrop", 0.1),
        attention_dropout=raw.get("attn_pdrop", 0.1),
        residual_dropout=raw.get("resid_pdrop", 0.1),
    )


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    activation = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}[config.activation]
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.max_position_embeddings,
        "activation_function": activation,
        "layer_norm_epsilon": config.norm_eps,
        "embd_pdrop": config.embed_dropout,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.residual_dropout,
        "tie_word_embeddings": config.tie_word_embeddings,
        "scale_attn_weights": True,
        "use_cache": True,
    }


def _read_gpt2_weights(weights: Tensors, config: ModelConfig) -> Tensors:
    ours: Tensors = {}
    for name, value in weights.items():
        name = name.removeprefix("transformer.")
        if name.startswith("h."):
            _, layer, rest = name.split(".", 2)
            part, _, leaf = rest.rpartition(".")
            if part == "attn" and leaf in ("bias", "masked_bias"):  # the causal mask, stored by early files
                continue
            prefix = f"model.layers.{layer}."
            transposed = value.t() if value.ndim == 2 else value
            if part == "attn.c_attn":
                for projection, third in zip("qkv", transposed.chunk(3, dim=0), strict=True):
                    ours[f"{prefix}self_attn.{projection}_proj.{leaf}"] = third.contiguous()
            else:
                ours[f"{prefix}{_GPT2_BLOCK.get(part, part)}.{leaf}"] = transposed.contiguous()
        elif name == "wpe.weight" and config.positions == "sinusoidal":
            continue  # the fixed table
        else:
            stem = {"wte": "model.embed_tokens", "wpe": "model.embed_positions", "ln_f": "model.norm"}
            part, _, leaf = name.rpartition(".")
            ours[f"{stem.get(part, part)}.{leaf}"] = value
    return _drop_shared_head(ours, config)


def _write_gpt2_weights(weights: Tensors, config: ModelConfig) -> Tensors:
    back = {ours: theirs for theirs, ours in _GPT2_BLOCK.items()}
    theirs: Tensors = {
        "transformer.wte.weight": weights["model.embed_tokens.weight"],
        "transformer.ln_f.weight": weights["model.norm.weight"],
        "transformer.ln_f.bias": weights["model.norm.bias"],
    }
    if config.positions == "sinusoidal":
        theirs["transformer.wpe.weight"] = sinusoids(config.max_position_embeddings, config.hidden_size)
    else:
        theirs["transformer.wpe.weight"] = weights["model.embed_positions.weight"]
    for layer in range(config.num_hidden_layers):
        ours, prefix = f"model.layers.{layer}.", f"transformer.h.{layer}."
        for leaf in ("weight", "bias"):
            joined = torch.cat([weights[f"{ours}self_attn.{p}_proj.{leaf}"] for p in "qkv"])
            theirs[f"{prefix}attn.c_attn.{leaf}"] = joined.t().contiguous() if leaf == "weight" else joined
            for part, name in back.items():
                value = weights[f"{ours}{part}.{leaf}"]
                theirs[f"{prefix}{name}.{leaf}"] = value.t().contiguous() if value.ndim == 2 else value
    if not config.tie_word_embeddings:
        theirs["lm_head.weight"] = weights["lm_head.weight"]
    return theirs


FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", _read_gpt2, _write_gpt2, _read_gpt2_weights, _write_gpt2_weights),
    "llama": Family("LlamaForCausalLM", _read_llama, _write_llama, _same_names, _drop_shared_head),
    "qwen3": Family("Qwen3ForCausalLM", _read_llama, _write_llama, _same_names, _drop_shared_head),
}
