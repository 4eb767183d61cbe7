"""What a decoder is made of: the resolved architecture, named as Hugging Face's configurations name it."""

from dataclasses import dataclass, field, replace
from typing import Any

from gptworks.core.config import Model
from gptworks.core.errors import UsageError

# Of float32 scores over the vocabulary that are made at a time: what stays in a processor's cache; what fills a GPU.
# Fewer rows than these, and reading the head once for each chunk would cost more than it saves.
LOGITS_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
LOGITS_ROWS = 512


def logits_rows(vocab_size: int, device: str) -> int:
    """Rows of scores that are made at a time."""
    rows = max(LOGITS_ROWS, LOGITS_BYTES.get(device, LOGITS_BYTES["cuda"]) // (4 * vocab_size))
    return rows if device == "cpu" else 1 << rows.bit_length() - 1  # all of one size, as compiled code wants them


@dataclass(frozen=True)
class ModelConfig:
    """One decoder. Sizes are counts; dropouts are probabilities; `family` is the class its folder opens as."""

    family: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    norm: str = "rmsnorm"  # layernorm | rmsnorm | rmsnorm_1p (times 1 + weight)
    norm_placement: str = "pre"  # pre | post | both: of what attention and MLP read, of what they give, of either
    use_parallel_residual: bool = False  # the MLP reads what attention reads
    positions: str = "rotary"  # learned | sinusoidal | rotary
    activation: str = "swiglu"  # gelu | gelu_tanh | relu | swiglu | geglu_tanh
    qk_norm: bool = False
    qk_norm_per_head: bool = True  # else over all heads together
    attention_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    tie_word_embeddings: bool = True
    norm_eps: float = 1e-6
    scale_embedding: bool = False  # by sqrt(hidden_size)
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None  # of sliding layers, which are then not scaled; None: as the others
    rope_scaling: dict[str, Any] = field(default_factory=dict)  # see `rope.checked`; {}: none
    partial_rotary_factor: float = 1.0  # of the channels of a head, from the first, those that turn
    sliding_window: int | None = None  # tokens that a sliding layer attends to, its own included
    layer_types: tuple[str, ...] = ()  # full_attention | sliding_attention, for each layer; (): all full
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: by head_dim's
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    num_experts: int = 0  # of a sparse layer; 0: none is
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0  # of each expert
    norm_topk_prob: bool = True  # the shares of a token's experts add up to 1
    dense_layers: tuple[int, ...] = ()  # that have one MLP for all
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"model.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UsageError(
                f"model.num_experts_per_tok={self.num_experts_per_tok}: a token gets 1 to all of the "
                f"{self.num_experts} experts"
            )
        if self.positions == "rotary" and (self.rotary_dim % 2 or not self.rotary_dim):
            of = "" if self.partial_rotary_factor == 1 else f", of which {self.rotary_dim} turn,"
            raise UsageError(f"model.head_dim={self.head_dim}{of} is odd; rotary positions turn pairs")
        if self.positions == "sinusoidal" and self.hidden_size % 2:
            raise UsageError(f"model.hidden_size={self.hidden_size} is odd; sinusoids come in pairs of sine and cosine")

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that turn."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def gated(self) -> bool:
        """True where the MLP has three matrices."""
        return self.activation in ("swiglu", "geglu_tanh")

    def sparse(self, layer: int) -> bool:
        """True where a layer has experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    def window(self, layer: int) -> int | None:
        """The tokens that a layer attends to, its own included; None: all that came before."""
        slides = bool(self.layer_types) and self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides else None

    def with_dropout(self, dropout: float, attention: float | None = None) -> "ModelConfig":
        """A copy with this dropout everywhere, or another on attention weights."""
        attention = dropout if attention is None else attention
        return replace(self, embed_dropout=dropout, attention_dropout=attention, residual_dropout=dropout)


# What a family is if nothing else is said: the parts its published models have.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layernorm", "positions": "learned", "activation": "gelu_tanh", "qk_norm": False, "bias": True,
             "tie_word_embeddings": True, "norm_eps": 1e-5},
    "llama": {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "qk_norm": False, "bias": False,
              "tie_word_embeddings": False, "norm_eps": 1e-5},
    "qwen3": {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "qk_norm": True, "bias": False,
              "tie_word_embeddings": True, "norm_eps": 1e-6},
    "qwen3_moe": {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "qk_norm": True, "bias": False,
                  "tie_word_embeddings": True, "norm_eps": 1e-6},
}  # fmt: skip

# What each family's class can hold beside its defaults. A part not named here must be the default.
ALLOWED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {"positions": ("learned", "sinusoidal"), "activation": ("gelu", "gelu_tanh", "relu"),
             "tie_word_embeddings": (True, False)},
    "llama": {"bias": (False, True), "tie_word_embeddings": (True, False)},
    "qwen3": {"tie_word_embeddings": (True, False)},
    "qwen3_moe": {"tie_word_embeddings": (True, False)},
}  # fmt: skip
PARTS = ("norm", "positions", "activation", "qk_norm", "bias", "tie_word_embeddings")


def _conflicts(family: str, parts: dict[str, Any]) -> list[str]:
    """The parts that the family's class cannot hold, as `key=value`."""
    bad = []
    for part, value in parts.items():
        if part in PARTS and value not in ALLOWED[family].get(part, (DEFAULTS[family][part],)):
            bad.append(f"{part}={str(value).lower()}")
    if parts.get("experts", False) != (family == "qwen3_moe"):
        bad.append("num_experts" if parts.get("experts") else "one MLP a layer (it needs num_experts)")
    if parts.get("grouped") and family == "gpt2":
        bad.append("num_key_value_heads below num_attention_heads")
    if parts.get("free_head_dim") and family == "gpt2":
        bad.append("head_dim other than hidden_size / num_attention_heads")
    return bad


def choose_family(asked: Model, grouped: bool, free_head_dim: bool) -> str:
    """The family that holds every part asked for. Raises UsageError with the nearest where none does."""
    parts: dict[str, Any] = {name: getattr(asked, name) for name in PARTS if getattr(asked, name) is not None}
    parts |= {"grouped": grouped, "free_head_dim": free_head_dim, "experts": asked.num_experts is not None}
    if asked.family is not None and asked.family not in DEFAULTS:
        from gptworks.core.registry import nearest

        raise UsageError(f"model.family={asked.family!r}: {nearest(asked.family, list(DEFAULTS))}")
    wanted = [asked.family] if asked.family else ["qwen3", "llama", "gpt2", "qwen3_moe"]
    for family in wanted:
        if not _conflicts(family, parts):
            return family
    named = asked.family or "any standard class"
    closest = min(DEFAULTS, key=lambda family: len(_conflicts(family, parts)))
    here = _conflicts(asked.family or closest, parts)
    fit = [family for family in DEFAULTS if not _conflicts(family, parts)]
    if fit:  # only where a family was asked for by name
        own = DEFAULTS[named]
        nearest_fit = min(fit, key=lambda family: sum(DEFAULTS[family][part] != own[part] for part in PARTS))
        advice = f"model.family={nearest_fit} can"
    else:
        advice = f"the nearest is model.family={closest} without {', '.join(_conflicts(closest, parts))}"
    raise UsageError(f"{named} cannot hold {', '.join(here)}: {advice}")


def build_config(asked: Model, vocab_size: int, context: int) -> ModelConfig:
    """The architecture of a model whose sizes are all set (see `planning.dial`). Raises UsageError."""
    width, layers, heads = asked.hidden_size, asked.num_hidden_layers, asked.num_attention_heads
    if not (width and layers and heads):
        raise UsageError("model.hidden_size, model.num_hidden_layers or model.num_attention_heads is missing")
    if asked.head_dim is None and width % heads:
        raise UsageError(f"model.hidden_size={width} is not divisible by model.num_attention_heads={heads}")
    head_dim = asked.head_dim or width // heads
    kv_heads = asked.num_key_value_heads or heads
    family = choose_family(asked, kv_heads != heads, head_dim * heads != width)
    parts = DEFAULTS[family] | {n: getattr(asked, n) for n in PARTS if getattr(asked, n) is not None}
    bias = parts.pop("bias")
    inner = asked.intermediate_size or default_intermediate(width, parts["activation"])
    experts: dict[str, Any] = {}
    if asked.num_experts:
        chosen = asked.num_experts_per_tok or min(2, asked.num_experts)
        experts = {"num_experts": asked.num_experts, "num_experts_per_tok": chosen,
                   "moe_intermediate_size": asked.moe_intermediate_size or -(-inner // chosen // 16) * 16}  # fmt: skip
    config = ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        max_position_embeddings=context,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        rope_theta=asked.rope_theta or 10_000.0,
        **experts,
        **parts,
    )
    return config.with_dropout(asked.dropout or 0.0, asked.attention_dropout)


def default_intermediate(width: int, activation: str) -> int:
    """Four times the width; two thirds of that for SwiGLU, whose three matrices then cost the same (Shazeer 2020)."""
    return -(-width * 8 // 3 // 32) * 32 if activation == "swiglu" else 4 * width


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a plain decoder by name, with its shape; a shared matrix under the name of the embedding."""
    c, d, v = config, config.hidden_size, config.vocab_size
    biased = c.norm == "layernorm"
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    if c.positions == "learned":
        shapes["model.embed_positions.weight"] = (c.max_position_embeddings, d)

    def norm(name: str, size: int, bias: bool = biased) -> None:
        shapes[f"{name}.weight"] = (size,)
        if bias:
            shapes[f"{name}.bias"] = (size,)

    def linear(name: str, out: int, into: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for layer in range(c.num_hidden_layers):
        block = f"model.layers.{layer}"
        if c.norm_placement in ("pre", "both"):
            norm(f"{block}.input_layernorm", d)
            norm(f"{block}.post_attention_layernorm", d)
        if c.norm_placement in ("post", "both"):
            norm(f"{block}.attention_output_norm", d)
            norm(f"{block}.mlp_output_norm", d)
        for name, size in (("q", q), ("k", kv), ("v", kv)):
            linear(f"{block}.self_attn.{name}_proj", size, d, c.attention_bias)
        linear(f"{block}.self_attn.o_proj", d, q, c.output_bias)
        if c.qk_norm:
            norm(f"{block}.self_attn.q_norm", c.head_dim if c.qk_norm_per_head else q, bias=False)
            norm(f"{block}.self_attn.k_norm", c.head_dim if c.qk_norm_per_head else kv, bias=False)
        if c.sparse(layer):
            e, f = c.num_experts, c.moe_intermediate_size
            shapes[f"{block}.mlp.gate.weight"] = (e, d)
            for name, shape in (("gate", (e, f, d)), ("up", (e, f, d)), ("down", (e, d, f))):
                shapes[f"{block}.mlp.experts.{name}_proj"] = shape
        else:
            for name in ("gate", "up") if c.gated else ("up",):
                linear(f"{block}.mlp.{name}_proj", c.intermediate_size, d, c.mlp_bias)
            linear(f"{block}.mlp.down_proj", d, c.intermediate_size, c.mlp_bias)
    norm("model.norm", d)
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (v, d)
    return shapes


def parameter_count(config: ModelConfig) -> int:
    """Trainable parameters, shared ones once, fixed sinusoids not counted."""
    return blocks_parameters(config) + outer_parameters(config)


def active_parameter_count(config: ModelConfig) -> int:
    """Parameters that one token uses: of a layer's experts only those it is routed to."""
    return blocks_parameters(config, active=True) + outer_parameters(config)


def blocks_parameters(config: ModelConfig, active: bool = False) -> int:
    """Parameters of all blocks; of the experts all, or those that one token uses."""
    layers = config.num_hidden_layers
    sparse = sum(config.sparse(layer) for layer in range(layers))
    experts = config.num_experts_per_tok if active else config.num_experts
    d = config.hidden_size
    other = 3 * d * config.moe_intermediate_size * experts + d * config.num_experts - _mlp_parameters(config)
    return layers * _block_parameters(config) + sparse * other


def _block_parameters(config: ModelConfig) -> int:
    d, h = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads, config.num_key_value_heads
    attention = d * h * (q + 2 * kv) + q * h * d
    attention += config.attention_bias * h * (q + 2 * kv) + config.output_bias * d
    norms = (4 if config.norm_placement == "both" else 2) * norm_parameters(config)
    if config.qk_norm:
        norms += 2 * h if config.qk_norm_per_head else h * (q + kv)
    return attention + _mlp_parameters(config) + norms


def _mlp_parameters(config: ModelConfig) -> int:
    d, f = config.hidden_size, config.intermediate_size
    biases = (2 * f if config.gated else f) + d if config.mlp_bias else 0
    return (3 if config.gated else 2) * d * f + biases


def norm_parameters(config: ModelConfig) -> int:
    return config.hidden_size * (2 if config.norm == "layernorm" else 1)


def outer_parameters(config: ModelConfig) -> int:
    table = config.vocab_size * config.hidden_size
    positions = config.max_position_embeddings * config.hidden_size if config.positions == "learned" else 0
    return table * (1 if config.tie_word_embeddings else 2) + positions + norm_parameters(config)
