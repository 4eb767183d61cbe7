"""The dial: from `model.depth` or `model.parameters` to every size, rate and count of a run, each with its reason.

Whatever the user set by hand stays; what is left to us is derived here, once, and written into config.yaml.
"""

import math

from gptworks.core.config import Config, Model
from gptworks.core.errors import UsageError
from gptworks.core.log import count
from gptworks.model.config import ModelConfig, build_config, parameter_count
from gptworks.planning.choices import Choices, needed

TOKENS_PER_PARAMETER = 20  # compute-optimal (Hoffmann et al. 2022; Epoch's refit of 2024 gives 18 to 27)
# Of Adam at a width of 128, for low-rank adapters with alpha = 2 * rank; 5e-4 at 2000. Schulman et al. fit exponents of
# the width of 0.78 for Llama and 0.08 for Qwen; the square root lies between.
ADAPTER_LR = 0.002
USUAL_PARAMETERS = 3_000_000
# Of Muon, and of Adam beside it at a width of 128: for a vocabulary of which most rows are rare, and for an alphabet of
# which all are met at each step. How much higher they are where a run has fewer steps. All measured, docs/log.md.
MUON_LR, TABLE_LR, ALPHABET_LR, RARE = 0.02, 0.008, 0.004, 512
SHORT = ((100, 2.0), (250, 1.4))
MAX_DEFAULT_EPOCHS = 4  # repeating text up to so often is nearly as good as new text (Muennighoff et al. 2023)

EXPERTS = ("num_experts_per_tok", "moe_intermediate_size")


def derive_shape(choices: Choices, vocab_size: int, wanted: tuple[int, str] | None = None) -> ModelConfig:
    """Sets context, width, depth and heads where they are open; gives the architecture. `wanted` are parameters, and
    why so many, where nothing of the size was asked for. Raises UsageError."""
    model = choices.config.model
    width_given, heads_given = model.hidden_size, model.num_attention_heads
    if width_given and heads_given and not model.head_dim and width_given % heads_given:
        raise UsageError(f"model.hidden_size={width_given} is not divisible by model.num_attention_heads={heads_given}")
    context = choices.config.train.context or choices.set("train.context", 256, "our default")
    if model.hidden_size is None or model.num_hidden_layers is None:
        _size(model, vocab_size, context=context, choices=choices, parameters=wanted)
    width = needed(choices.config.model.hidden_size)
    if model.num_attention_heads is None:
        heads, head_dim = _heads(model, width)
        if model.head_dim is None and width % heads:
            raise UsageError(
                f"model.hidden_size={width} has no whole heads beside num_key_value_heads="
                f"{model.num_key_value_heads}; set num_attention_heads"
            )
        choices.set("model.num_attention_heads", heads, f"{head_dim} channels a head")
    architecture = build_config(choices.config.model, vocab_size, context)
    for key in ("family", "norm", "positions", "activation", "qk_norm", "tie_word_embeddings", "num_key_value_heads",
                "head_dim", "intermediate_size", "rope_theta", *EXPERTS):  # fmt: skip
        if key in EXPERTS and not architecture.num_experts:
            continue
        if getattr(model, key) is None and not (key == "rope_theta" and architecture.positions != "rotary"):
            why = "holds every part asked for" if key == "family" else f"{architecture.family}'s default"
            choices.set(f"model.{key}", getattr(architecture, key), why)
    if model.bias is None:
        choices.set("model.bias", architecture.mlp_bias, f"{architecture.family}'s default")
    if model.dropout is None:
        choices.set("model.dropout", 0.0, "none where nobody asks for it")
    return architecture


def _size(model: Model, vocab_size: int, context: int, choices: Choices, parameters: tuple[int, str] | None) -> None:
    """Width and depth from the dial, or from whichever of the two is given."""
    if model.depth or (model.num_hidden_layers and not model.parameters):
        depth = model.depth or model.num_hidden_layers or 0
        if model.hidden_size is None:
            choices.set("model.hidden_size", 64 * depth, "64 for each layer, the shape that scales well")
        if model.num_hidden_layers is None:
            choices.set("model.num_hidden_layers", depth, "model.depth")
        return
    suits, because = parameters or (USUAL_PARAMETERS, "")
    wanted = model.parameters or suits
    why = f"nearest to {count(wanted)} parameters{because and ', ' + because}"
    best: tuple[float, int, int] | None = None
    widths = [model.hidden_size] if model.hidden_size else range(32, 32 * 1024 + 1, 32)
    for width in widths:
        for depth in [model.num_hidden_layers] if model.num_hidden_layers else range(1, 257):
            if not model.hidden_size and not model.num_hidden_layers and not 24 <= width / depth <= 96:
                continue
            total = _try_count(model, width, depth=depth, vocab_size=vocab_size, context=context)
            if total is None:
                break
            # A factor off the wish costs most; off the aspect ratio of 48, a little.
            miss = abs(math.log(total / wanted)) + 0.03 * abs(math.log(width / depth / 48))
            if best is None or miss < best[0]:
                best = (miss, width, depth)
            if total > 4 * wanted:
                break
        if best and (_try_count(model, width, depth=1, vocab_size=vocab_size, context=context) or 0) > 4 * wanted:
            break
    if best is None:
        raise UsageError(
            f"no width gives whole heads with model.num_attention_heads={model.num_attention_heads}, "
            f"num_key_value_heads={model.num_key_value_heads}; set model.hidden_size and model.head_dim too"
        )
    if model.hidden_size is None:
        choices.set("model.hidden_size", best[1], why)
    if model.num_hidden_layers is None:
        choices.set("model.num_hidden_layers", best[2], why)


def _heads(model: Model, width: int) -> tuple[int, int]:
    """Query heads for a width, in whole groups, and the channels aimed at in each."""
    head_dim = model.head_dim or next((c for c in (64, 32) if width % c == 0 and width >= 4 * c), None)
    if head_dim is None:
        head_dim = next(c for c in range(min(64, width), 0, -1) if width % c == 0)
        if (
            head_dim % 2
            and model.positions in (None, "rotary")
            and model.family != "gpt2"
            and not model.num_attention_heads
        ):
            raise UsageError(
                f"model.hidden_size={width} divides into no heads of an even width, which rotary positions need: take "
                "a multiple of 32, or set model.head_dim"
            )
    heads, groups = max(width // head_dim, 1), model.num_key_value_heads or 1
    return max(heads // groups, 1) * groups, head_dim


def _try_count(model: Model, width: int, depth: int, vocab_size: int, context: int) -> int | None:
    """Parameters of a shape; None where its heads are not whole."""
    heads = model.num_attention_heads or _heads(model, width)[0]
    if model.head_dim is None and width % heads:
        return None
    trial = model.model_copy(update={"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads})
    return parameter_count(build_config(trial, vocab_size, context))


def derive_training(
    choices: Choices, architecture: ModelConfig, epoch_tokens: float | None, budget_tokens: float = math.inf
) -> None:
    """Sets batch, rates, decay and the length of the run, where open.

    `epoch_tokens` is one epoch, infinite for data without end; what follows from it stays open where it is None.
    `budget_tokens` is what a time budget is likely to hold.
    """
    config, train = choices.config, choices.config.train
    context = train.context or architecture.max_position_embeddings
    parameters, width = parameter_count(architecture), architecture.hidden_size
    horizon = (
        None
        if epoch_tokens is None
        else _horizon(config, architecture, epoch_tokens=epoch_tokens, budget_tokens=budget_tokens)
    )
    unread = "decided once the data is counted"

    batch = train.batch_tokens
    if batch is None and (horizon is None or epoch_tokens is None):
        choices.leave("train.batch_tokens", unread)
    elif batch is None:
        batch = max(context, int(min(best_batch(needed(horizon)), needed(epoch_tokens) / 20)) // context * context)
        seen = "that suit the model" if train.max_steps else "the run is likely to see"
        reason = f"grows with the {count(needed(horizon))} tokens {seen}"
        choices.set("train.batch_tokens", batch, reason)
    falling = f"falls with the square root of the width, {width}"
    steps = None
    if horizon is not None and epoch_tokens is not None and batch is not None:
        steps = horizon / (epoch_tokens if batch == "full" else batch)
    short, shortly = (1.0, "") if steps is None else _shortness(steps)
    if train.lr is None:
        if config.adapter.kind and train.optimizer in ("adamw", "adam"):
            why = f"about ten times what suits all weights, whatever the rank (LoRA Without Regret, 2025); {falling}"
            choices.set("train.lr", _by_width(ADAPTER_LR, width), why)
        elif train.optimizer == "muon":
            why = f"Muon's update has the same size at every width{shortly}"
            choices.set("train.lr", round(MUON_LR * short, 4), why)
        else:
            choices.set("train.lr", 0.1 if train.optimizer == "sgd" else _by_width(0.003, width), falling)
    if train.optimizer == "muon" and train.adam_lr is None:
        rate = TABLE_LR if architecture.vocab_size >= RARE else ALPHABET_LR
        choices.set("train.adam_lr", _by_width(rate * short, width), falling + shortly)
    if train.momentum is None and train.optimizer in ("muon", "sgd"):
        if steps is None:
            choices.leave("train.momentum", unread)
        else:
            brief = train.optimizer != "muon" or steps < 1000
            why = "a short run gains from a short memory" if brief else "Muon's usual"
            choices.set("train.momentum", 0.9 if brief else 0.95, why)
    if train.weight_decay is None and config.adapter.kind:
        choices.set("train.weight_decay", 0.0, "adapters start at nothing, and stay small by themselves")
    elif train.weight_decay is None:
        decay = 0.1 if train.optimizer in ("muon", "adamw") else 0.0
        choices.set("train.weight_decay", decay, f"{train.optimizer}'s usual, decoupled")
    if train.warmup is None:
        warmup = 0.02 if train.optimizer == "muon" else 0.05
        choices.set("train.warmup", warmup, "the first updates are the riskiest")
    if not any((train.max_steps, train.max_tokens, train.max_epochs, train.time_budget_s)):
        if batch == "full":
            choices.set("train.max_epochs", 100.0, "one step each")
        elif horizon is None or epoch_tokens is None:
            choices.leave("train.max_tokens", unread)
        else:
            choices.set("train.max_tokens", int(horizon), _horizon_reason(parameters, int(horizon), epoch_tokens))


def _shortness(steps: float) -> tuple[float, str]:
    """Tells how much higher the rates of a short run are, which ends before they do harm, and why (docs/log.md)."""
    for most, factor in SHORT:
        if steps < most:
            return factor, f"; higher, as the run has fewer than {most} steps"
    return 1.0, ""


def best_batch(horizon: float) -> int:
    """Tokens a step for a run of `horizon` tokens: a power law through 1,024 at 260 thousand tokens (measured on
    character-level Shakespeare, docs/log.md) and 524,288 at 2.2 billion (nanochat's tuned depth 12). The power of two
    below it: a batch half as large as the best costs less than one twice as large (docs/log.md)."""
    exponent = math.log(524_288 / 1024) / math.log(2.2e9 / 2.6e5)
    return 2 ** int(math.log2(max(1024 * (horizon / 2.6e5) ** exponent, 1)) + 1e-6)


def _by_width(rate: float, width: int) -> float:
    """A rate tuned at width 128."""
    return round(rate * (128 / width) ** 0.5, 6)


def _horizon(config: Config, architecture: ModelConfig, epoch_tokens: float, budget_tokens: float) -> float:
    """Tokens the run is likely to see; where nothing limits it, should see."""
    train = config.train
    limits: list[float] = [budget_tokens] if train.time_budget_s else []
    if train.max_tokens:
        limits.append(train.max_tokens)
    if train.max_epochs:
        limits.append(train.max_epochs * epoch_tokens)
    if train.max_steps and isinstance(train.batch_tokens, int):
        limits.append(train.max_steps * train.batch_tokens)
    ideal = min(TOKENS_PER_PARAMETER * parameter_count(architecture), MAX_DEFAULT_EPOCHS * epoch_tokens)
    return min(limits, default=ideal)


def _horizon_reason(parameters: int, tokens: int, epoch_tokens: float) -> str:
    if tokens == TOKENS_PER_PARAMETER * parameters:
        return f"{TOKENS_PER_PARAMETER} for each of {count(parameters)} parameters, the compute-optimal ratio"
    return f"{MAX_DEFAULT_EPOCHS} passes over {count(epoch_tokens)} tokens; more repetition helps little"
