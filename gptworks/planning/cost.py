"""The cost of a model and of a step: floating-point operations and memory, from the shape alone. Loads no torch."""

import fnmatch
import math
from dataclasses import dataclass

from gptworks.core.config import Adapter
from gptworks.model.config import ModelConfig, blocks_parameters, logits_rows, parameter_count, parameter_shapes

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of the blocks


@dataclass(frozen=True)
class Trainable:
    """The trained part of a model of which some is frozen."""

    trained: int  # parameters with a gradient
    added: int  # of these, beside those of the architecture: adapters
    multiplied: int  # of these, the architecture's that are multiplied: not the tables that are looked up
    weights: int  # bytes of the whole model

    @classmethod
    def of(
        cls, config: ModelConfig, adapter: Adapter | None, freeze: list[str], bytes_per_weight: float = 4.0
    ) -> "Trainable":
        """Counts from the architecture. With an `adapter`, which alone is trained, the matrices of the blocks take so
        many bytes a weight, and all else is in float32. What `freeze` matches is not trained."""
        shapes = parameter_shapes(config)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        frozen = {name for pattern in freeze for name in fnmatch.filter(shapes, pattern)}
        buffers = config.max_position_embeddings * config.hidden_size if config.positions == "sinusoidal" else 0
        weights = 4.0 * buffers
        added = trained = multiplied = 0
        for name, shape in shapes.items():
            part = name.removesuffix(".weight").rpartition(".")[2]
            inside = adapter is not None and len(shape) == 2 and part in LINEARS
            weights += sizes[name] * (bytes_per_weight if inside else 4.0)
            if adapter is not None and inside and part in (adapter.target_modules or LINEARS):
                sides = {"lora_A": adapter.rank * shape[1], "lora_B": shape[0] * adapter.rank}
                sides |= {"magnitude": shape[0]} if adapter.use_dora else {}
                weights += 4 * sum(sides.values())
                names = {f"{name.removesuffix('.weight')}.{side}": size for side, size in sides.items()}
                added += sum(size for n, size in names.items() if not any(fnmatch.fnmatch(n, f) for f in freeze))
            elif adapter is None and name not in frozen:
                trained += sizes[name]
                table = ".embed_" in name and not (config.tie_word_embeddings and "embed_tokens" in name)
                multiplied += 0 if table else sizes[name]
        return cls(trained + added, added, multiplied, int(weights))


def flops_per_token(config: ModelConfig, context: int, trainable: Trainable | None = None) -> float:
    """Training FLOPs a token: 6 for each parameter that is multiplied (the input tables are looked up, the head is
    not, and of the experts a token meets its own), plus causal attention, 6 * layers * heads * channels * context
    (Chowdhery et al. 2022, appendix B, halved for the causal mask). A layer with a window W counts W (2 - W / context)
    for the context. A frozen parameter has no gradient and costs 4, as if something below it were trained."""
    multiplied = blocks_parameters(config, active=True) + config.vocab_size * config.hidden_size
    windows = (min(config.window(layer) or context, context) for layer in range(config.num_hidden_layers))
    seen = sum(wide * (2 - wide / context) for wide in windows)  # twice the mean of a row
    frozen = max(multiplied - trainable.multiplied, 0) if trainable else 0
    added = trainable.added if trainable else 0
    return 6.0 * (multiplied + added) - 2.0 * frozen + 6 * config.num_attention_heads * config.head_dim * seen


@dataclass(frozen=True)
class Memory:
    """The peak memory of a training step, in bytes: in the passes, more with each row, or in the update."""

    fixed: int  # weights, gradients, optimizer state, and what a pass needs whatever its rows
    row: int  # activations kept for the backward pass of one row
    update: int = 0  # in all, when no activation is left; 0 where `fixed` has it

    def of(self, rows: int) -> int:
        return max(self.fixed + rows * self.row, self.update)

    def rows(self, free: int) -> int:
        """The rows of a forward pass for which so much is enough; none where it is not even for the update."""
        return max((free - self.fixed) // self.row, 0) if free >= self.update else 0


def step_memory(
    config: ModelConfig,
    context: int,
    optimizer: str,
    element: int,  # bytes of a value in the passes; weights are float32
    device: str = "cpu",
    masked: bool = False,  # within documents, by a mask that is written out
    compiled: bool = False,
    trainable: Trainable | None = None,
    copies: int = 0,  # of the trained weights, kept beside: as their average, as the best
) -> Memory:
    """The peak of a step, from the shape alone; on a CPU up to six tenths above what is measured, on a GPU a tenth."""
    slots = {"sgd": 1, "muon": 1}.get(optimizer, 2)
    trained, weights = (
        (trainable.trained, trainable.weights) if trainable else (parameter_count(config), 4 * parameter_count(config))
    )
    scores = logits_rows(config.vocab_size, device) * config.vocab_size
    kept = weights + trained * 4 * (1 + slots + copies)
    if device == "cpu":
        # An update makes copies: Muon turns all matrices of one shape at once, in about four copies of, at most, two
        # thirds of the weights, and where bf16 has units its products are packed besides. The head has its gradient
        # once more, and a chunk of logits with their exponentials.
        update = trained * (14 if optimizer == "muon" else 4)
        head = 2 * config.vocab_size * config.hidden_size * 4 + 12 * scores
        row = context * ((config.num_hidden_layers + 1) * _block_on_cpu(config, context, element=element, masked=masked)
                         + 4 * config.hidden_size * 4)  # fmt: skip
        return Memory(kept + update + head, row)
    # On a GPU what is left is given to the next tensor, so that tensors alone count, to a hundredth or two.
    table = config.vocab_size * config.hidden_size
    head = table * (
        2 * element + (4 if trainable is None or trainable.multiplied else 0)
    )  # in half, its gradient, their sum
    head += (3 * element + 1 if compiled else 16) * scores
    cast = 0 if element == 4 else element * (trainable.multiplied if trainable else blocks_parameters(config))
    block = _block_on_gpu(config, context, element=element, masked=masked, compiled=compiled)
    ends = _norm_input(config, element, compiled=False) + 2 * config.hidden_size * element
    row = context * (config.num_hidden_layers * block + ends)
    update = kept + (5 * 4 * blocks_parameters(config) if optimizer == "muon" and trainable is None else 0)
    return Memory(kept + cast + head, row, update)


def _block_on_cpu(config: ModelConfig, context: int, element: int, masked: bool) -> int:
    """Bytes a token: the residual stream and the outputs of norms, projections, attention and MLP; layer norms keep
    their input in float32. A mask, a window or a cap has the attention matrix written out. (The gradients on their way
    back take about one block more.)"""
    d, f = config.hidden_size, _inner(config)
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
    return block


def _block_on_gpu(config: ModelConfig, context: int, element: int, masked: bool, compiled: bool) -> int:
    """Bytes a token, of the tensors that the backward pass is given: what norms and linear layers read, queries, keys,
    values and output of attention, both sides of the nonlinearity. The compiler makes some of them again instead."""
    d, f = config.hidden_size, _inner(config)
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norms = (4 if config.norm_placement == "both" else 2) * _norm_input(config, element, compiled)
    attention = 2 * q + 2 * kv + (q + kv if config.qk_norm else 0)
    if element == 4 or masked or (config.layer_types and (config.sliding_window or 0) < context):
        attention += 2 * (q - kv)  # beside a mask groups are written out
    mlp = (3 if compiled else 4) * f if config.gated else 2 * f
    block = norms + (2 * d + attention + mlp) * element + 4 * config.num_attention_heads
    if config.residual_dropout:
        block += 2 * d  # a byte for each
    if config.attn_logit_softcapping is not None:
        block += 4 * config.num_attention_heads * context * 4
    elif masked and not compiled:
        block += context * element  # the mask, as numbers
    return block


def _norm_input(config: ModelConfig, element: int, compiled: bool) -> int:
    return config.hidden_size * (4 if config.norm == "layernorm" and not compiled else element)


def _inner(config: ModelConfig) -> int:
    """Width of the MLP; of experts all that a token meets, with its copies."""
    if not config.num_experts:
        return config.intermediate_size
    met = config.num_experts_per_tok * (config.moe_intermediate_size + config.hidden_size)
    return max(config.intermediate_size, met)
