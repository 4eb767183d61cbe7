"""One dial gives a whole run; whatever is set by hand stays."""

from typing import Any

import pytest

from gptworks.core import config as configuration
from gptworks.core.config import Config
from gptworks.core.errors import UsageError
from gptworks.model.config import ModelConfig, parameter_count
from gptworks.planning.choices import Choices
from gptworks.planning.dial import best_batch, derive_shape, derive_training


def load(**values: Any) -> Config:
    return configuration.load(None, {key.replace("__", "."): value for key, value in values.items()})


def whole(vocab: int = 1024, tokens: int = 10_000_000, **values: Any) -> tuple[Config, dict[str, str], ModelConfig]:
    choices = Choices(load(**values))
    architecture = derive_shape(choices, vocab)
    derive_training(choices, architecture, tokens, 0.0)
    return choices.config, choices.reasons, architecture


def shape_of(config: Config, vocab: int) -> ModelConfig:
    return derive_shape(Choices(config), vocab)


@pytest.mark.parametrize(("wish", "vocab"), [("1M", 1024), ("3M", 1024), ("10M", 4096), ("124M", 50257), ("1B", 50257)])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_the_size_wished_for_is_reached_within_a_quarter(wish, vocab, family):
    architecture = shape_of(load(model__parameters=wish, model__family=family), vocab)
    wanted = {"M": 1e6, "B": 1e9}[wish[-1]] * int(wish[:-1])
    assert parameter_count(architecture) == pytest.approx(wanted, rel=0.25)


@pytest.mark.parametrize(
    "parts",
    [{"num_attention_heads": 6}, {"num_attention_heads": 5}, {"head_dim": 128}, {"num_key_value_heads": 3},
     {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24}, {"tie_word_embeddings": False},
     {"hidden_size": 96}, {"num_hidden_layers": 2}],
    ids=str,
)  # fmt: skip
def test_the_size_wished_for_is_reached_beside_parts_set_by_hand(parts):
    asked = {f"model__{key}": value for key, value in parts.items()}
    architecture = shape_of(load(model__parameters="10M", **asked), 1024)
    assert parameter_count(architecture) == pytest.approx(10e6, rel=0.25)
    assert {key: getattr(architecture, key) for key in parts} == parts


def test_heads_that_no_width_holds_are_refused():
    with pytest.raises(UsageError, match="num_attention_heads=99991"):
        shape_of(load(model__parameters="10M", model__num_attention_heads=99991), 1024)


@pytest.mark.parametrize("dial", [{"model__depth": 4}, {"model__parameters": "3M"}, {}], ids=str)
@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adam", "sgd"])
def test_one_dial_derives_everything_with_a_reason(dial, optimizer):
    config, reasons, _ = whole(train__optimizer=optimizer, **dial)
    momentum = ["train.momentum"] if optimizer in ("muon", "sgd") else []
    for key in ("model.hidden_size", "model.num_hidden_layers", "model.num_attention_heads", "model.family",
                "model.intermediate_size", "train.context", "train.batch_tokens", "train.lr", "train.weight_decay",
                "train.warmup", "train.max_tokens", *momentum):  # fmt: skip
        assert configuration.get(config, key) is not None, key
        assert reasons[key], key


DEFAULT, _, _ = whole(model__parameters="3M")
BY_HAND = {
    "model.hidden_size": 96, "model.num_hidden_layers": 3, "model.num_attention_heads": 12, "model.family": "llama",
    "model.intermediate_size": 100, "model.head_dim": 20, "model.num_key_value_heads": 1, "model.dropout": 0.2,
    "train.context": 48, "train.batch_tokens": 4800, "train.lr": 0.5, "train.adam_lr": 0.25, "train.momentum": 0.5,
    "train.weight_decay": 0.01, "train.warmup": 0.3, "train.max_tokens": 123456,
}  # fmt: skip


@pytest.mark.parametrize("key", BY_HAND)
def test_what_is_set_by_hand_stays(key):
    wish = {} if key in ("model.hidden_size", "model.num_hidden_layers") else {"model__parameters": "3M"}
    config, reasons, _ = whole(**wish, **{key.replace(".", "__"): BY_HAND[key]})
    assert configuration.get(config, key) == BY_HAND[key] != configuration.get(DEFAULT, key)
    assert key not in reasons


def test_everything_at_once_by_hand_stays():
    config, _, architecture = whole(**{key.replace(".", "__"): value for key, value in BY_HAND.items()})
    assert {key: configuration.get(config, key) for key in BY_HAND} == BY_HAND
    assert architecture.hidden_size == 96 and architecture.head_dim == 20


def test_a_deeper_dial_is_a_larger_model_and_a_lower_rate():
    runs = [whole(model__depth=depth, train__optimizer="adamw") for depth in (2, 4, 8)]
    sizes = [parameter_count(architecture) for _, _, architecture in runs]
    rates = [config.train.lr for config, _, _ in runs]
    assert sizes == sorted(sizes) and rates == sorted(rates, reverse=True) and len(set(rates)) == 3


@pytest.mark.parametrize(("steps", "higher"), [(60, 2.0), (200, 1.4), (300, 1.0), (5000, 1.0)])
def test_a_short_run_has_higher_rates(steps, higher):
    config, reasons, architecture = whole(train__batch_tokens=1024, train__max_steps=steps, train__optimizer="muon")
    assert config.train.lr == pytest.approx(0.02 * higher)
    assert config.train.adam_lr == pytest.approx(0.008 * higher * (128 / architecture.hidden_size) ** 0.5, rel=1e-3)
    assert ("fewer than" in reasons["train.lr"]) == ("fewer than" in reasons["train.adam_lr"]) == (higher > 1)


def test_an_alphabet_has_half_the_rate_of_a_vocabulary_of_rare_rows():
    rates = []
    for vocab in (65, 4096):
        config, _, architecture = whole(vocab, train__batch_tokens=1024, train__max_steps=1000, train__optimizer="muon")
        rates.append(config.train.adam_lr * architecture.hidden_size**0.5)
    assert rates[1] == pytest.approx(2 * rates[0], rel=1e-3)


def test_batch_grows_with_the_run_and_hits_its_anchors():
    assert best_batch(2.6e5) == 1024 and best_batch(2.2e9) == 524_288
    assert best_batch(1.3e6) == 2048 and best_batch(2.4e6) == 4096  # measured, docs/log.md
    sizes = [best_batch(10.0**e) for e in range(3, 12)]
    assert sizes == sorted(sizes)


def test_a_small_text_is_repeated_four_times_and_a_large_one_read_in_part():
    small, _, _ = whole(tokens=100_000, model__parameters="3M")
    large, _, architecture = whole(tokens=10**9, model__parameters="3M")
    assert small.train.max_tokens == 400_000
    assert large.train.max_tokens == 20 * parameter_count(architecture)


def test_a_width_without_whole_heads_is_refused():
    with pytest.raises(UsageError, match="num_attention_heads"):
        shape_of(load(model__hidden_size=64, model__num_hidden_layers=2, model__num_key_value_heads=3), 1024)


def test_two_dials_at_once_are_refused():
    with pytest.raises(UsageError, match="one dial"):
        load(model__depth=4, model__parameters="3M")


def test_the_rate_of_adapters_falls_with_the_width():
    values = {"model.path": "x", "adapter.kind": "lora", "train.optimizer": "adamw"}
    rates = {}
    for width in (128, 2048):
        shape = shape_of(load(model__hidden_size=width, model__num_hidden_layers=2), 99)
        choices = Choices(configuration.load(None, values))
        derive_training(choices, shape, 10**6, 0.0)
        rates[width] = choices.config.train.lr
        assert "LoRA Without Regret" in choices.reasons["train.lr"]
    assert rates[128] == pytest.approx(4 * rates[2048]) and 4e-4 < rates[2048] < 6e-4
