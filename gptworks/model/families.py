"""Model families: how a config.json and a weight file of each Hugging Face class map onto our decoder, both ways.

A family is one row of `FAMILIES`, at the end. What a row does not say is the same for all and stands above it.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptworks.core.errors import DataError, UsageError
from gptworks.model import rope
from gptworks.model.config import ModelConfig
from gptworks.model.transformer import sinusoids

Raw = dict[str, Any]  # what config.json has
Tensors = dict[str, Tensor]

FULL, SLIDING = "full_attention", "sliding_attention"

# What the classes take where config.json lacks a key; a row may say otherwise. A key in neither is needed.
USUAL: Raw = {
    "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False,
    "attention_dropout": 0.0, "tie_word_embeddings": False, "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}  # fmt: skip
# Keys that say something with a null. Elsewhere a null is a value left out.
NULLS = ("num_key_value_heads", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
# Keys by which some class computes something else, and the values that change nothing. Where a family does not read
# one, any other value is refused. (What adds weights, like biases, is found where the weights are compared.)
CHANGING: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,), "attention_multiplier": (), "attn_logit_softcapping": (), "clip_qkv": (),
    "embedding_multiplier": (1,), "final_logit_softcapping": (), "logit_scale": (1,), "logits_scaling": (1,),
    "query_pre_attn_scalar": (), "residual_multiplier": (1,), "rotary_pct": (1,),
    "num_experts": (), "num_local_experts": (), "router_jitter_noise": (0,),
    "scale_attn_by_inverse_layer_idx": (False,), "scale_attn_weights": (True,), "sliding_window": (),
    "use_bidirectional_attention": (False,), "use_parallel_residual": (False,), "use_sliding_window": (False,),
}  # fmt: skip
ALSO = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}  # one key to transformers
EXPERT = re.compile(r"(.+\.experts)\.(0|[1-9][0-9]{0,5})\.(\w+)")
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class Family:
    """One class of models. Reading and writing are inverse and lose nothing."""

    architecture: str
    parts: Raw  # of ModelConfig: what every model of the class has
    keys: dict[str, tuple[str, ...]]  # of config.json: the fields of ModelConfig that each sets
    defaults: Raw = field(default_factory=dict)  # where they are not USUAL
    act: str = "hidden_act"  # the key of the activation
    acts: dict[str, str] = field(default_factory=lambda: {"silu": "swiglu"})  # what it may say, in our words
    # The layers that see a window, where config.json does not list them in layer_types. none; all; upper: those from
    # max_window_layers on; most: all but each sliding_window_pattern-th.
    sliding: str = "none"
    local_theta: bool = False  # sliding layers turn by a theta of their own
    theta: str = "rope_theta"  # the key, where it is not in rope_parameters, as in files of earlier years
    share: str | None = None  # the same for partial_rotary_factor; None: all channels turn
    scalings: tuple[str, ...] = tuple(rope.SCALINGS)
    root: str = "model."  # what the names of weights begin with, but the head's
    layers: str = "layers."  # what comes before a block's number
    names: dict[str, str] = field(default_factory=dict)  # of weights, theirs to ours, within a block or outside
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)  # their matrix that has several of ours, in order
    by_head: bool = False  # one head of each after the other
    transposed: bool = False  # the matrices of blocks
    experts: dict[str, str] = field(default_factory=dict)  # of an expert's matrices, theirs to ours

    # -- config.json -------------------------------------------------------------------------------------------------

    def read_config(self, raw: Raw) -> ModelConfig:
        """Raises DataError and the errors that `from_hf_config` makes one of."""
        values: Raw = {"family": raw["model_type"], **self.parts}
        for key, names in self.keys.items():
            values |= dict.fromkeys(names, self._said(raw, key))
        act = raw.get(self.act) or next(iter(self.acts))
        if act not in self.acts:
            raise DataError(
                f"config.json has {self.act} {act!r}; {raw['model_type']} is read with {', '.join(self.acts)}"
            )
        values["activation"] = self.acts[act]
        width, heads = values["hidden_size"], values["num_attention_heads"]
        usual = {"num_key_value_heads": heads, "head_dim": width // heads, "intermediate_size": 4 * width}
        if values.get("head_dim") is None and width % heads:
            raise ValueError(f"{width} channels do not divide among {heads} heads")
        values |= {name: value for name, value in usual.items() if values.get(name) is None}
        values |= self._read_layer_types(raw, values) | self._read_dense_layers(raw, values)
        if values.get("positions", "rotary") == "rotary":
            values |= self._read_rope(raw, values["max_position_embeddings"])
        self._refuse_unread(raw, values)
        return ModelConfig(**values)

    def write_config(self, config: ModelConfig) -> Raw:
        raw: Raw = {key: getattr(config, names[0]) for key, names in self.keys.items()}
        raw[self.act] = next(act for act, ours in self.acts.items() if ours == config.activation)
        types = list(config.layer_types or [FULL] * config.num_hidden_layers)
        if "use_sliding_window" in self.defaults:
            raw["use_sliding_window"] = SLIDING in types
        if self.sliding in ("upper", "most"):
            raw["layer_types"] = types
            if self.sliding == "upper":
                raw["max_window_layers"] = types.index(SLIDING) if SLIDING in types else len(types)
        if "decoder_sparse_step" in self.defaults:
            raw |= {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}
        if config.positions == "rotary":
            here = {"rope_type": "default", **config.rope_scaling, "rope_theta": config.rope_theta}
            if self.share:
                here["partial_rotary_factor"] = config.partial_rotary_factor
            raw |= {self.theta: config.rope_theta, "rope_parameters": here}
            if self.local_theta:
                raw["rope_local_base_freq"] = config.rope_local_theta
                local = {"rope_type": "default", "rope_theta": config.rope_local_theta}
                raw["rope_parameters"] = {FULL: here, SLIDING: local}
        return raw | {"use_cache": True}

    def _said(self, raw: Raw, key: str) -> Any:
        """The value of a key, or what the class takes in its place. Raises KeyError where there is none."""
        if key not in raw and key in ALSO:
            key = ALSO[key] if ALSO[key] in raw else key
        if raw.get(key) is not None or (key in raw and key in NULLS):
            return raw[key]
        return self.defaults[key] if key in self.defaults else USUAL[key]

    def _read_layer_types(self, raw: Raw, values: Raw) -> Raw:
        layers, window, listed = values["num_hidden_layers"], values.get("sliding_window"), raw.get("layer_types")
        if "use_sliding_window" in self.defaults and not self._said(raw, "use_sliding_window"):
            window = None
        if self.sliding == "most":
            fixed = raw["model_type"] == "gemma2"  # whose class does not read the key
            each = self.defaults["sliding_window_pattern"] if fixed else self._said(raw, "sliding_window_pattern")
            slide = [(n + 1) % each != 0 for n in range(layers)]
        elif self.sliding == "none" or window is None:
            slide = [False] * layers
        else:
            first = 0 if self.sliding == "all" else self._said(raw, "max_window_layers")
            slide = [n >= first for n in range(layers)]
        types = [SLIDING if slides else FULL for slides in slide]
        if listed is not None and listed != types:
            if self.sliding not in ("upper", "most"):
                raise ValueError(f"layer_types is not what a {raw['model_type']} model does")
            if not isinstance(listed, list) or len(listed) != layers or not {FULL, SLIDING}.issuperset(listed):
                raise ValueError(f"layer_types does not name {FULL} or {SLIDING} for each of {layers} layers")
            types = listed
        if SLIDING not in types:
            return {"sliding_window": window}
        if window is None:
            raise ValueError("layers are to see a window, and no sliding_window says how wide")
        return {"sliding_window": window, "layer_types": tuple(types)}

    def _read_dense_layers(self, raw: Raw, values: Raw) -> Raw:
        if "decoder_sparse_step" not in self.defaults:
            return {}
        layers, step = values["num_hidden_layers"], self._said(raw, "decoder_sparse_step")
        dense = raw.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(n) is int and 0 <= n < layers for n in dense):
            raise ValueError(f"mlp_only_layers {str(dense)[:80]} does not name some of {layers} layers")
        return {"dense_layers": tuple(n for n in range(layers) if n in dense or (n + 1) % step)}

    def _read_rope(self, raw: Raw, length: int) -> Raw:
        values: Raw = {}
        parameters: Raw = raw.get("rope_parameters") or {}
        scaling: Raw = raw.get("rope_scaling") or parameters
        if self.local_theta:
            local: Raw = parameters.get(SLIDING) or {}
            theta = _number(local, "rope_theta", raw=raw, key="rope_local_base_freq", default=10_000.0)
            if rope.checked(local, theta, length):
                raise ValueError("sliding layers scale their rotary positions, which this version does not")
            values["rope_local_theta"] = theta
            if FULL in scaling or SLIDING in scaling:
                scaling = scaling.get(FULL) or {}
        theta = _number(scaling, "rope_theta", raw=raw, key=self.theta, default=self.defaults.get(self.theta, 10_000.0))
        key = self.share or "partial_rotary_factor"
        share = _number(scaling, "partial_rotary_factor", raw=raw, key=key, default=self.defaults.get(key, 1.0))
        if share > 1 or (share != 1 and self.share is None):
            raise ValueError(f"{key} {share:g}: a {raw['model_type']} model turns every channel")
        first = raw.get("original_max_position_embeddings")
        if first is not None and scaling.get("rope_type", scaling.get("type")) in (
            "llama3",
            "yarn",
        ):  # it goes first there
            scaling = {**scaling, "original_max_position_embeddings": first}
        scaling = rope.checked(scaling, theta, length)
        if scaling and scaling["rope_type"] not in self.scalings:
            raise ValueError(f"a {raw['model_type']} model with {scaling['rope_type']} rotary positions is not read")
        return values | {"rope_theta": theta, "rope_scaling": scaling, "partial_rotary_factor": share}

    def _refuse_unread(self, raw: Raw, values: Raw) -> None:
        read = {*self.keys, *(ALSO[key] for key in self.keys if key in ALSO), self.share}
        read |= {"use_sliding_window"} & self.defaults.keys()
        expected = CHANGING | {"head_dim": (values["head_dim"],)}
        for key in raw.keys() & (expected.keys() - read):
            if raw[key] is not None and raw[key] not in expected[key]:
                raise ValueError(f"{key} {str(raw[key])[:80]} is not applied to {raw['model_type']} by this version")

    # -- weights -----------------------------------------------------------------------------------------------------

    def read_weights(self, weights: Tensors, config: ModelConfig) -> Tensors:
        """Theirs under our names. Raises ValueError, IndexError or RuntimeError for what does not come apart."""
        ours: Tensors = {}
        stacks: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for name, value in weights.items():
            if name.endswith(BUFFERS):
                continue
            number, part, leaf = _split(name.removeprefix(self.root), self.layers)
            if (expert := EXPERT.fullmatch(part)) and leaf == "weight" and expert[3] in self.experts:
                place = f"model.layers.{number}.{self.parts_of(expert[1])[0]}.{self.experts[expert[3]]}"
                stacks[place][int(expert[2])] = value
                continue
            if number and self.transposed and value.ndim == 2:
                value = value.t().contiguous()
            parts = self.parts_of(part)
            pieces = self.apart(value, parts, config)
            for part, piece in zip(parts, pieces, strict=True):
                place = "" if part == "lm_head" else f"model.layers.{number}." if number else "model."
                if f"{place}{part}.{leaf}" in ours:
                    raise ValueError(f"two tensors are {place}{part}.{leaf}"[:200])
                ours[f"{place}{part}.{leaf}"] = piece
        for name, each in stacks.items():
            if sorted(each) != list(range(config.num_experts)):
                raise ValueError(f"{name} has {len(each)} experts, the configuration {config.num_experts}")
            ours[name] = torch.stack([each[number] for number in range(config.num_experts)])
        if config.positions == "sinusoidal":  # the fixed table
            ours.pop("model.embed_positions.weight", None)
        return ours

    def write_weights(self, weights: Tensors, config: ModelConfig) -> Tensors:
        """Ours under their names."""
        if config.positions == "sinusoidal":
            table = sinusoids(config.max_position_embeddings, config.hidden_size)
            weights = {**weights, "model.embed_positions.weight": table}
        theirs: Tensors = {}
        back = {ours: name for name, ours in self.names.items()}
        first = {parts[0]: (name, parts) for name, parts in self.joined.items()}
        later = {part for parts in self.joined.values() for part in parts[1:]}
        for name, value in weights.items():
            number, part, leaf = _split(name.removeprefix("model."), "layers.")
            if value.ndim == 3:
                module = f"{self.root}{self.layers}{number}.{self.module_of(part)}"
                their = next(theirs for theirs, ours in self.experts.items() if ours == leaf)
                theirs |= {f"{module}.{expert}.{their}.weight": matrix for expert, matrix in enumerate(value)}
                continue
            if part in later or (part == "lm_head" and config.tie_word_embeddings):
                continue
            if part in first:
                part, parts = first[part]
                value = self.together([weights[f"model.layers.{number}.{p}.{leaf}"] for p in parts], config)
            if number and self.transposed and value.ndim == 2:
                value = value.t().contiguous()
            place = "" if part == "lm_head" else f"{self.root}{self.layers}{number}." if number else self.root
            theirs[f"{place}{back.get(part, part)}.{leaf}"] = value
        return theirs

    def module_of(self, part: str) -> str:
        """Their name within a block of the module that has one of our parts."""
        joined = next((name for name, parts in self.joined.items() if part in parts), None)
        return joined or next((name for name, ours in self.names.items() if ours == part), part)

    def parts_of(self, module: str) -> tuple[str, ...]:
        """The parts that one of their modules within a block has."""
        return self.joined.get(module) or (self.names.get(module, module),)

    def apart(self, value: Tensor, parts: tuple[str, ...], config: ModelConfig) -> list[Tensor]:
        """The rows of a joined matrix by the parts that they belong to."""
        if len(parts) == 1:
            return [value]
        heads, channels = config.num_attention_heads, config.head_dim
        if self.by_head:
            pieces = [piece.flatten(0, 1) for piece in value.unflatten(0, (heads, len(parts), channels)).unbind(1)]
        else:
            few = config.num_key_value_heads * channels
            sizes = {"self_attn.q_proj": heads * channels, "self_attn.k_proj": few, "self_attn.v_proj": few}
            pieces = list(value.split([sizes.get(part, config.intermediate_size) for part in parts]))
        return [piece.clone(memory_format=torch.contiguous_format) for piece in pieces]

    def together(self, pieces: list[Tensor], config: ModelConfig) -> Tensor:
        """The inverse of `apart`."""
        if len(pieces) == 1:
            return pieces[0]
        if not self.by_head:
            return torch.cat(pieces)
        return torch.stack([p.unflatten(0, (config.num_attention_heads, -1)) for p in pieces], dim=1).flatten(0, 2)


def _split(name: str, layers: str) -> tuple[str, str, str]:
    """A block's number ("" outside of them), the part and the leaf: "layers.3.mlp.up_proj.weight" gives "3",
    "mlp.up_proj", "weight"."""
    stem, _, leaf = name.rpartition(".")
    number, _, part = stem.removeprefix(layers).partition(".") if stem.startswith(layers) else ("", "", stem)
    return number, part, leaf


def _number(inner: Raw, name: str, raw: Raw, key: str, default: float) -> float:
    """The first that is there of inner[name], raw[key] and the default."""
    value = next((v for v in (inner.get(name), raw.get(key)) if v is not None), default)
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{name} {str(value)[:80]} is not a number above 0")
    return float(value)


# -- checks of a config.json before it is read -----------------------------------------------------------------------


def from_hf_config(raw: Raw) -> ModelConfig:
    """The architecture a config.json describes. Raises DataError for what the decoder cannot express."""
    kind = raw.get("model_type")
    _check_values(raw)
    known = isinstance(kind, str) and kind in FAMILIES  # what auto_map names is then not run, as in transformers
    if raw.get("auto_map") and not known:
        raise DataError(
            f"config.json has model_type {str(kind)[:80]!r} and its own code (auto_map); gptworks runs no code "
            f"from a model folder and reads {', '.join(FAMILIES)}"
        )
    if raw.get("quantization_config"):
        raise DataError("config.json describes quantised weights, which this version does not read")
    if not known:
        raise DataError(f"config.json has model_type {kind!r}; this version reads {', '.join(FAMILIES)}")
    try:
        return FAMILIES[str(kind)].read_config(raw)
    except KeyError as error:
        raise DataError(f"config.json lacks {error}") from None
    except (TypeError, ValueError, AttributeError, UsageError) as error:
        raise DataError(f"config.json: {error}") from None


MOST = 10**12  # of anything, so that what is computed from sizes stays a number
MOST_LAYERS = 10**5  # so that a list of them may be made
_SIZES = {
    "vocab_size": MOST, "hidden_size": MOST, "intermediate_size": MOST, "num_hidden_layers": MOST_LAYERS,
    "num_attention_heads": MOST, "num_key_value_heads": MOST, "head_dim": MOST, "max_position_embeddings": MOST,
    "n_embd": MOST, "n_layer": MOST_LAYERS, "n_head": MOST, "n_inner": MOST, "n_positions": MOST,
    "sliding_window": MOST, "sliding_window_pattern": MOST, "num_experts": 10**5, "num_local_experts": 10**5,
    "num_experts_per_tok": 10**5, "moe_intermediate_size": MOST, "decoder_sparse_step": MOST,
}  # fmt: skip
_NUMBERS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "max_window_layers")
_SHARES = ("attention_dropout", "hidden_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop")
_ABOVE_ZERO = (
    "rope_theta", "rope_local_base_freq", "rotary_emb_base", "rotary_pct", "partial_rotary_factor",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip
_FLAGS = (
    "norm_topk_prob",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "use_parallel_residual",
)


def _check_values(raw: Raw) -> None:
    """Raises DataError for a size that is no size and a number that is none; a null is a value left out."""
    for key, most in _SIZES.items():
        value = raw.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise DataError(f"config.json has {key} {str(value)[:80]}; it must be a whole number from 1 to {most:,}")
    for key in (*_NUMBERS, *_SHARES, *_ABOVE_ZERO):
        value = raw.get(key)
        if value is None:
            continue
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            raise DataError(f"config.json has {key} {value!r}; it must be a number of at least 0")
        if (value == 0 and key in _ABOVE_ZERO) or (value >= 1 and key in _SHARES):
            raise DataError(f"config.json has {key} {value!r}; it must be {'below 1' if value else 'above 0'}")
    for key in _FLAGS:
        if not isinstance(raw.get(key), (bool, type(None))):
            raise DataError(f"config.json has {key} {raw[key]!r}; it must be true or false")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(key), (dict, type(None))):
            raise DataError(f"config.json has {key} {raw[key]!r}; it must be an object")


# -- the families ----------------------------------------------------------------------------------------------------


def _same(*names: str) -> dict[str, tuple[str, ...]]:
    """Keys that are spelled as our fields are."""
    return {name: (name,) for name in names}


SIZES = _same(
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
LLAMA = (
    SIZES | _same("num_key_value_heads", "attention_dropout", "tie_word_embeddings") | {"rms_norm_eps": ("norm_eps",)}
)
HEAD = _same("head_dim")
BIAS = {"attention_bias": ("attention_bias", "output_bias")}
EXPERT_PARTS = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GELUS = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
LAYERNORM = {"norm": "layernorm", "mlp_bias": True}
GEMMA = {"norm": "rmsnorm_1p", "norm_placement": "both", "scale_embedding": True}
GEMMA_KEYS = LLAMA | HEAD | BIAS | _same("query_pre_attn_scalar", "sliding_window", "final_logit_softcapping")
GEMMA_DEFAULTS = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096,
                  "query_pre_attn_scalar": 256}  # fmt: skip
GEMMA_NAMES = {
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "mlp_output_norm",
}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        LAYERNORM | {"positions": "learned", "attention_bias": True, "output_bias": True},
        keys={
            "vocab_size": ("vocab_size",),
            "n_embd": ("hidden_size",),
            "n_layer": ("num_hidden_layers",),
            "n_head": ("num_attention_heads",),
            "n_inner": ("intermediate_size",),
            "n_positions": ("max_position_embeddings",),
            "layer_norm_epsilon": ("norm_eps",),
            "embd_pdrop": ("embed_dropout",),
            "attn_pdrop": ("attention_dropout",),
            "resid_pdrop": ("residual_dropout",),
            "tie_word_embeddings": ("tie_word_embeddings",),
        },
        defaults={"n_inner": None, "layer_norm_epsilon": 1e-5, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1,
         "tie_word_embeddings": True},
        act="activation_function",
        acts=GELUS,
        root="transformer.",
        layers="h.",
        names={
            "wte": "embed_tokens",
            "wpe": "embed_positions",
            "ln_f": "norm",
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            "attn.c_proj": "self_attn.o_proj",
            "mlp.c_fc": "mlp.up_proj",
            "mlp.c_proj": "mlp.down_proj",
        },
        joined={"attn.c_attn": QKV},
        transposed=True,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        LAYERNORM,
        keys=SIZES | BIAS | _same("attention_dropout", "tie_word_embeddings", "use_parallel_residual")
        | {"layer_norm_eps": ("norm_eps",), "hidden_dropout": ("residual_dropout", "embed_dropout")},
        defaults={"layer_norm_eps": 1e-5, "hidden_dropout": 0.0, "attention_bias": True, "use_parallel_residual": True,
         "rotary_pct": 0.25},
        acts={"gelu": "gelu", "gelu_fast": "gelu_tanh"} | GELUS,
        theta="rotary_emb_base",
        share="rotary_pct",
        root="gpt_neox.",
        names={
            "embed_in": "embed_tokens",
            "final_layer_norm": "norm",
            "embed_out": "lm_head",
            "attention.dense": "self_attn.o_proj",
            "mlp.dense_h_to_4h": "mlp.up_proj",
            "mlp.dense_4h_to_h": "mlp.down_proj",
        },
        joined={"attention.query_key_value": QKV},
        by_head=True,
    ),
    "llama": Family("LlamaForCausalLM", {}, LLAMA | HEAD | BIAS | _same("mlp_bias")),
    "mistral": Family(
        "MistralForCausalLM",
        {},
        keys=LLAMA | HEAD | _same("sliding_window"),
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        sliding="all",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {},
        keys=LLAMA | _same("sliding_window") | {"embd_pdrop": ("embed_dropout",), "resid_pdrop": ("residual_dropout",)},
        defaults={"rms_norm_eps": 1e-5, "sliding_window": None, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        sliding="all",
        share="partial_rotary_factor",
        scalings=(),
        joined={"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"attention_bias": True},
        keys=LLAMA | _same("sliding_window"),
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False,
         "max_window_layers": 28},
        sliding="upper",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"qk_norm": True},
        keys=LLAMA | HEAD | BIAS | _same("sliding_window"),
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "use_sliding_window": False,
         "max_window_layers": 28},
        sliding="upper",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"qk_norm": True},
        keys=LLAMA | HEAD | BIAS
        | _same("sliding_window", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        defaults={"num_key_value_heads": 4, "sliding_window": 4096, "use_sliding_window": False,
         "num_experts": 128,
         "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False, "decoder_sparse_step": 1},
        sliding="all",
        experts=EXPERT_PARTS,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {},
        keys=LLAMA | HEAD | _same("sliding_window", "num_experts_per_tok")
        | {"num_local_experts": ("num_experts",), "intermediate_size": ("intermediate_size", "moe_intermediate_size")},
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": None, "num_local_experts": 8,
         "num_experts_per_tok": 2, "rope_theta": 1e6},
        sliding="all",
        names={"block_sparse_moe.gate": "mlp.gate", "block_sparse_moe.experts": "mlp.experts"},
        experts={"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {"norm_placement": "post", "qk_norm": True, "qk_norm_per_head": False},
        keys=LLAMA | BIAS,
        defaults={"rms_norm_eps": 1e-5},
        names={"post_attention_layernorm": "attention_output_norm", "post_feedforward_layernorm": "mlp_output_norm"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        GEMMA,
        keys=GEMMA_KEYS | _same("attn_logit_softcapping"),
        defaults=GEMMA_DEFAULTS
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window_pattern": 2},
        act="hidden_activation",
        acts={"gelu_pytorch_tanh": "geglu_tanh"},
        sliding="most",
        names=GEMMA_NAMES,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        GEMMA | {"qk_norm": True},
        keys=GEMMA_KEYS,
        defaults=GEMMA_DEFAULTS | {"rope_theta": 1_000_000.0, "sliding_window_pattern": 6},
        act="hidden_activation",
        acts={"gelu_pytorch_tanh": "geglu_tanh"},
        sliding="most",
        local_theta=True,
        scalings=("linear",),
        names=GEMMA_NAMES,
    ),
}  # fmt: skip
