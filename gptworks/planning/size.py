"""How large a model suits a text and a time, and how often a text may be read: what the forecast says of both."""

import math

from gptworks.core.log import count, duration
from gptworks.model.config import ModelConfig, parameter_count
from gptworks.planning.choices import Choices, Facts, needed
from gptworks.planning.dial import MAX_DEFAULT_EPOCHS, TOKENS_PER_PARAMETER, USUAL_PARAMETERS
from gptworks.planning.forecast import SMALLEST, best_parameters, likely_bits, share_of_counting
from gptworks.planning.machine import Machine

USUAL_TOKEN = 3.5  # bytes
PARAMETER_BYTES = 64  # of memory, for each parameter of a size that is chosen here
MOST_PASSES = 8  # over a text; more make a model worse (docs/log.md)
WORTH_SAYING = 0.05  # how much worse than the best size an asked one has to be
BUDGET_TRAINED = 0.9  # of what is left of a time budget, the part that steps have; the rest is evaluations and saving


def limit_passes(choices: Choices, facts: Facts) -> None:
    """Sets how often a text is read at most, where nothing but time would end the training of a fresh model without
    dropout."""
    train = choices.config.train
    limited = train.max_epochs or train.max_tokens or train.max_steps or train.batch_tokens == "full"
    earlier = facts.measured and facts.measured.rows is None  # a run that was measured without a limit
    other = facts.base or facts.endless or choices.config.model.dropout or choices.config.problem.kind != "pretraining"
    if train.time_budget_s and not (limited or earlier or other):
        choices.set("train.max_epochs", float(MOST_PASSES), "read more often, a text makes a model worse")


def suiting_size(choices: Choices, facts: Facts, machine: Machine) -> tuple[int, str]:
    """The number of parameters that is likely to reach most on this text, in this time or with this many tokens, and
    why; never more than the text has bytes, or than memory holds."""
    train, epoch = choices.config.train, math.inf if facts.endless else needed(facts.epoch_tokens)
    token_bytes = facts.bytes_per_token or USUAL_TOKEN
    limits = [train.max_tokens or math.inf]
    if train.max_steps and isinstance(train.batch_tokens, int):
        limits.append(train.max_steps * train.batch_tokens)
    most = min(machine.free_memory / PARAMETER_BYTES, max(epoch * token_bytes, SMALLEST))
    if budget := train.time_budget_s:

        def seen(parameters: float) -> float:
            flops = budget * BUDGET_TRAINED * machine.flops_per_second(train.precision, parameters)
            return min(flops / (6 * parameters), (train.max_epochs or math.inf) * epoch) * token_bytes

        size, _ = best_parameters(seen, text=epoch * token_bytes, vocab_size=needed(facts.vocab_size), most=most)
        size, why = min(size, min(limits) / TOKENS_PER_PARAMETER), f"likely to reach most in {duration(budget)} here"
    else:
        size = min(*limits, (train.max_epochs or MAX_DEFAULT_EPOCHS) * epoch) / TOKENS_PER_PARAMETER
        size = min(size, USUAL_PARAMETERS, most)
        why = f"{TOKENS_PER_PARAMETER} tokens for each; at most {count(USUAL_PARAMETERS)} where no time is given"
    size = max(size, SMALLEST)
    return int(round(size, 2 - len(f"{size:.0f}"))), why


def weigh_the_wish(choices: Choices, architecture: ModelConfig, facts: Facts, machine: Machine, tokens: int) -> None:
    """Warns where the size that was asked for, which will see so many tokens, is far from the best that the time
    allows."""
    train, token_bytes, unigram = choices.config.train, facts.bytes_per_token, facts.unigram_bits
    if unigram is None or token_bytes is None or facts.epoch_tokens is None:
        return
    parameters, vocab_size = parameter_count(architecture), architecture.vocab_size
    text, here = facts.epoch_tokens * token_bytes, machine.flops_per_second(train.precision, parameters)

    def seen(other: float) -> float:
        faster = machine.flops_per_second(train.precision, other) / here
        return min(tokens * faster * parameters / other, _most_tokens(choices, facts)) * token_bytes

    best, reached = best_parameters(seen, text, vocab_size, most=max(text, SMALLEST))
    expected = share_of_counting(parameters, tokens * token_bytes, text)
    if expected < (1 + WORTH_SAYING) * reached:
        return

    def told(share: float) -> str:
        return f"{likely_bits(share, unigram, vocab_size=vocab_size, bytes_per_token=token_bytes):.2f}"

    choices.warnings.append(
        f"{count(parameters)} parameters will see {count(tokens)} tokens in train.time_budget_s="
        f"{train.time_budget_s:g}, {tokens / parameters:.2g} for each, and reach about {told(expected)} "
        f"bits/byte; model.parameters={count(best)} would reach about {told(reached)}"
    )


def say_time_left(choices: Choices, passes: float) -> None:
    """Warns where the time is enough for many more passes over the text than `limit_passes` allows."""
    train = choices.config.train
    if "train.max_epochs" in choices.reasons and passes > 1.25 * MOST_PASSES:
        choices.warnings.append(
            f"train.time_budget_s={train.time_budget_s:g} is time for {passes:.0f} passes over the text, and "
            f"{MOST_PASSES} are made, since more make a model worse; a larger model or more text would use the time "
            f"(train.max_epochs={passes:.0f} makes them all)"
        )


def _most_tokens(choices: Choices, facts: Facts) -> float:
    """The tokens that the epochs of a run come to."""
    return (choices.config.train.max_epochs or math.inf) * (facts.epoch_tokens or math.inf)
