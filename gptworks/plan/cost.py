"""What a model and a step cost: floating-point operations and memory, from the shape alone."""

from dataclasses import dataclass

from gptworks.model.adapters import adapters
from gptworks.model.config import LOGITS_BYTES, LOGITS_ROWS, ModelConfig, blocks_parameters, parameter_count
from gptworks.model.transformer import Transformer


@dataclass(frozen=True)
class Part:
    """What of a model is trained, where that is not all of it."""

    trained: int  # parameters with a gradient
    added: int  # of these, beside those of the architecture: adapters
    multiplied: int  # of these, the architecture's that are multiplied: not the tables that are looked up
    weights: int  # bytes of all

    @classmethod
    def of(cls, model: Transformer) -> "Part":
        own = {id(p) for layer in adapters(model).values() for p in (layer.lora_A, layer.lora_B, layer.magnitude)}
        trained = [p for p in model.parameters() if p.requires_grad]
        tables = {id(p) for name, p in model.named_parameters() if ".embed_" in name} - {id(model.lm_head.weight)}
        tensors = [*model.parameters(), *model.buffers()]
        return cls(
            sum(p.numel() for p in trained),
            sum(p.numel() for p in trained if id(p) in own),
            sum(p.numel() for p in trained if id(p) not in own | tables),
            sum(t.numel() * t.element_size() for t in tensors),
        )


def flops_per_token(config: ModelConfig, context: int, part: Part | None = None) -> float:
    """Training FLOPs a token: 6 for each parameter that is multiplied (the input tables are looked up, the head is
    not, and of the experts a token meets its own), plus causal attention, 6 * layers * heads * channels * context
    (Chowdhery et al. 2022, appendix B, halved for the causal mask). A layer with a window W counts W (2 - W / context)
    for the context. A frozen parameter has no gradient and costs 4, as if something below it were trained."""
    multiplied = blocks_parameters(config, active=True) + config.vocab_size * config.hidden_size
    windows = (min(config.window(layer) or context, context) for layer in range(config.num_hidden_layers))
    seen = sum(wide * (2 - wide / context) for wide in windows)  # twice the mean of a row
    frozen = max(multiplied - part.multiplied, 0) if part else 0
    added = part.added if part else 0
    return 6.0 * (multiplied + added) - 2.0 * frozen + 6 * config.num_attention_heads * config.head_dim * seen


def state_bytes(
    config: ModelConfig, optimizer: str, device: str = "cpu", part: Part | None = None, copies: int = 0
) -> int:
    """Weights, gradients and optimizer state in float32, and the copies an update or a checkpoint makes: Muon turns all
    matrices of one shape at once, in about four copies of, at most, two thirds of the weights. Then what the loss of
    the head needs whatever the rows: its gradient once more, and a chunk of logits with their exponentials. `copies` is
    how often the trained weights are kept beside: as their average, as the best."""
    slots = {"sgd": 1, "muon": 1}.get(optimizer, 2)
    chunk = max(LOGITS_BYTES.get(device, LOGITS_BYTES["cuda"]), LOGITS_ROWS * config.vocab_size * 4)
    head = 2 * config.vocab_size * config.hidden_size * 4 + 3 * chunk
    trained, weights = (part.trained, part.weights) if part else (parameter_count(config), 4 * parameter_count(config))
    return weights + trained * 4 * (1 + slots + copies + (3 if optimizer == "muon" else 1)) + head


def row_bytes(config: ModelConfig, context: int, element: int, masked: bool) -> int:
    """Activations kept for the backward pass of one row of `context` tokens; `element` is bytes per value.

    Per token and block: the residual stream and the outputs of norms, projections, attention and MLP; layer norms keep
    their input in float32. A mask, a window or a cap has the attention matrix written out. The gradients on their way
    back take about one block more.
    """
    d, f = config.hidden_size, config.intermediate_size
    if config.num_experts:  # with the copies of a token
        f = max(f, config.num_experts_per_tok * (config.moe_intermediate_size + d))
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    mlp = 4 * f if config.gated else 3 * f
    dropped = 2 * d if config.residual_dropout else 0
    turned = config.positions == "rotary" or config.qk_norm
    stream = (8 if config.norm_placement == "both" else 6) * d
    block = (stream + (2 + turned) * (q + kv) + mlp + dropped) * element
    if config.norm == "layernorm" and element < 4:
        block += 2 * d * 4
    matrix = config.num_attention_heads * context
    if config.attn_logit_softcapping is not None:
        block += 4 * matrix * 4
    elif config.attention_dropout or masked or (config.layer_types and (config.sliding_window or 0) < context):
        block += 4 * matrix * element
    return context * ((config.num_hidden_layers + 1) * block + 4 * d * 4)


def step_bytes(
    config: ModelConfig,
    context: int,
    rows: int,
    optimizer: str,
    element: int,
    masked: bool = False,
    device: str = "cpu",
    part: Part | None = None,
    copies: int = 0,
) -> int:
    """Peak memory of a training step with `rows` rows in each forward pass."""
    return state_bytes(config, optimizer, device, part, copies) + rows * row_bytes(config, context, element, masked)
