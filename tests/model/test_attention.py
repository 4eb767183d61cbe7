"""The decoder against what it is defined to compute."""

import math
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F

from gptworks.data.batch import Batch, Cursor
from gptworks.data.loader import Loader
from gptworks.infer.scoring import token_losses
from gptworks.model import build
from gptworks.model.attention import Attention, KeyValueCache, padding_mask, rotate
from gptworks.model.config import parameter_count
from gptworks.model.rope import rotary_table
from gptworks.model.transformer import Transformer
from gptworks.training.objectives import NextToken

SHAPES: list[dict[str, Any]] = [
    {"family": "gpt2"},
    {"family": "gpt2", "positions": "sinusoidal", "activation": "relu"},
    {"family": "llama", "bias": True},
    {"family": "qwen3", "num_key_value_heads": 2},
    {"family": "qwen3", "num_key_value_heads": 1, "head_dim": 16},
]
each = pytest.mark.parametrize("parts", SHAPES, ids=str)


@torch.no_grad()
def logits(model: Transformer, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.scores(ids, **options)


@each
def test_cached_logits_equal_uncached(parts):
    model, ids = tiny.model(**parts), tiny.tokens(2, tiny.CONTEXT)
    whole = logits(model, ids)
    for cuts in ([1] * 32, [5, 1, 1, 9, 16], [32], [31, 1]):
        cache, made = KeyValueCache(2, tiny.CONTEXT), []
        for part in ids.split(cuts, dim=1):
            made.append(logits(model, part, cache=cache))
        assert (torch.cat(made, dim=1) - whole).abs().max() < 1e-5, cuts


@each
@pytest.mark.parametrize("window", [None, 5])
def test_a_step_of_a_fixed_cache_has_the_logits_of_a_growing_one(parts, window):
    """Its tensors stay where they are until they are full, as a recorded step on a GPU needs them."""
    model, ids = tiny.model(**parts), tiny.tokens(2, tiny.CONTEXT)
    if window:
        kinds = ("sliding_attention", "full_attention")
        model.config = model.model.config = replace(model.config, sliding_window=window, layer_types=kinds)
    whole = logits(model, ids)
    cache = KeyValueCache(2, tiny.CONTEXT)
    logits(model, ids[:, :3], cache=cache)
    cache.fix()
    place, keys = cache.place, cache._keys[0]
    for i in range(3, tiny.CONTEXT):
        found = logits(model, ids[:, i : i + 1], cache=cache)
        assert (found - whole[:, i : i + 1]).abs().max() < 1e-5
        assert cache.place is place and cache._keys[0] is keys and cache.length == i + 1


def test_a_fixed_cache_that_is_full_grows_when_it_is_fixed_again():
    model, ids = tiny.model(context=256), tiny.tokens(1, 200)
    whole, cache = logits(model, ids), KeyValueCache(2, 256)
    logits(model, ids[:, :60], cache=cache)
    rooms = set()
    for i in range(60, 200):
        if not cache.place or cache.length >= cache.room:
            cache.fix()
        rooms.add(cache.room)
        assert (logits(model, ids[:, i : i + 1], cache=cache) - whole[:, i]).abs().max() < 1e-5
    assert rooms == {120, 242}


@each
def test_the_future_does_not_change_the_past(parts):
    model, ids = tiny.model(**parts), tiny.tokens(1, 32)
    other = ids.clone()
    other[0, 20] = (other[0, 20] + 1) % 31
    one, two = logits(model, ids), logits(model, other)
    assert torch.allclose(one[:, :20], two[:, :20], atol=1e-6)
    assert (one[:, 20:] - two[:, 20:]).abs().amax(-1).min() > 1e-4  # and everything after it sees the change


@each
def test_packed_documents_score_as_if_alone(parts):
    model, stream = tiny.model(**parts), tiny.stream()
    loader = Loader(stream, tiny.CONTEXT, 16, seed=1, mask_documents=True)
    batch, _ = loader.take(Cursor())
    assert batch.segments is not None and batch.segments.max() > 1
    with torch.no_grad():
        packed = token_losses(model, batch)
    compared = 0
    for row in range(len(batch.tokens)):
        for segment in batch.segments[row].unique():
            here = batch.segments[row] == segment
            if batch.weights[row, here].sum() == 0:
                continue
            alone = Batch(*(t[row, here][None] for t in (batch.tokens, batch.targets, batch.weights)))
            with torch.no_grad():
                expected = token_losses(model, alone)
                assert (logits(model, alone.tokens) - logits(model, batch.tokens[row : row + 1],
                        segments=batch.segments[row : row + 1])[:, here]).abs().max() < 1e-5  # fmt: skip
            assert (packed[row, here] - expected[0]).abs().max() < 1e-5
            compared += 1
    assert compared > 16


def test_attention_is_the_softmax_of_scaled_products_times_values():
    torch.manual_seed(0)
    config = tiny.shape(family="llama")
    layer = Attention(config, 0).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, (T, H, C) = torch.randn(2, 9, 32), (9, 4, 8)
    expected = []
    for row in x:
        heads = []
        for h in range(H):
            q, k, v = (row @ p.weight[h * C : (h + 1) * C].T for p in (layer.q_proj, layer.k_proj, layer.v_proj))
            scores = q @ k.T / math.sqrt(C)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v)
        expected.append(torch.cat(heads, dim=-1) @ layer.o_proj.weight.T)
    with torch.no_grad():
        assert (layer(x, None, None, None) - torch.stack(expected)).abs().max() < 1e-5


def test_grouped_queries_equal_repeated_key_value_heads():
    grouped = tiny.model(family="llama", num_key_value_heads=2)
    full = tiny.model(family="llama", num_key_value_heads=4)
    weights = grouped.state_dict()
    for name, value in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = value.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(weights)
    ids = tiny.tokens(2, 32)
    assert (logits(grouped, ids) - logits(full, ids)).abs().max() < 1e-5


def test_rotary_products_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(at: int, other: int) -> float:
        turned = [rotate(x, rotary_table(torch.tensor([[p]]), 16, 10_000.0)) for x, p in ((q, at), (k, other))]
        return float((turned[0] * turned[1]).sum())

    assert product(7, 3) == pytest.approx(product(107, 103), abs=1e-4)
    assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-5)
    assert abs(product(7, 3) - product(8, 3)) > 1e-3


def test_rotary_models_do_not_see_absolute_position():
    model = tiny.model(family="qwen3")
    ids = tiny.tokens(1, 12)
    shifted = torch.cat((torch.zeros(1, 7, dtype=torch.int64), ids), dim=1)
    segments = torch.tensor([[0] * 7 + [1] * 12])
    assert (logits(model, shifted, segments=segments)[:, 7:] - logits(model, ids)).abs().max() < 1e-5


@each
def test_parameter_count_is_the_number_of_parameters(parts):
    for tied in (True, False):
        model = tiny.model(**parts, tie_word_embeddings=tied)
        assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


def test_a_tied_head_is_the_embedding():
    model = tiny.model(family="qwen3")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_fresh_weights_are_a_function_of_the_seed():
    one, two, three = (tiny.build.fresh(tiny.shape(), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], three["model.embed_tokens.weight"])


def test_dropout_acts_in_training_only():
    model = Transformer(tiny.shape(dropout=0.5))
    model.initialise(1)
    ids = tiny.tokens(1, 16)
    model.eval()
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [({"dropout": 0.5}, (0.5, 0.5)), ({"dropout": 0.5, "attention_dropout": 0}, (0.5, 0)),
     ({"attention_dropout": 0.25}, (0, 0.25))],
)  # fmt: skip
def test_attention_weights_may_have_a_dropout_of_their_own(parts, expected):
    config = tiny.shape(**parts)
    assert (config.residual_dropout, config.attention_dropout) == expected
    assert config.embed_dropout == config.residual_dropout


class Flexible(Transformer):
    """Leaves attention to FlexAttention wherever it is compiled."""

    def can_flex(self, segments):
        return self.compiling


@pytest.mark.parametrize("parts", [{}, {"num_key_value_heads": 1, "layer_types": True}], ids=str)
def test_flex_attention_sees_what_the_mask_allows(parts, monkeypatch):
    """On a CPU it has no backward pass, so the forward pass alone, traced as a compiled step is."""
    config = tiny.shape(**{"num_attention_heads": 2} | {k: v for k, v in parts.items() if k != "layer_types"})
    if parts.get("layer_types"):
        config = replace(config, sliding_window=5, layer_types=("sliding_attention", "full_attention"))
    model, flexible = Transformer(config), Flexible(config)
    model.initialise(3)
    flexible.load_state_dict(model.state_dict())
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    tiny.compile_with(monkeypatch, backend)
    flexible.train().compiles = True
    for seed, cuts in ((0, [(7, 25), (20, 5, 7)]), (1, [(32,), (1, 30, 1)]), (2, [(3, 29), (16, 16)])):
        ids = tiny.tokens(2, 32, seed=seed)
        segments = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in cuts])
        with torch.no_grad():
            expected = model(ids, segments=segments).hidden
            assert (expected - model(ids).hidden).abs().max() > 1e-3
            assert (flexible(ids, segments=segments).hidden - expected).abs().max() < 1e-5
    assert len(made) == 1 + bool(parts.get("layer_types"))  # masks of other documents are not compiled anew


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward pass on GPUs only")
def test_flex_attention_has_the_gradients_of_the_mask():
    config, train = tiny.shape(hidden_size=64, num_attention_heads=2), tiny.settings()
    segments = torch.tensor([[0] * 7 + [1] * 25, [0] * 20 + [1] * 5 + [2] * 7])
    batch = Batch(tiny.tokens(2, 32), tiny.tokens(2, 32, seed=1), torch.ones(2, 32), segments).to(torch.device("cuda"))
    found = []
    for compiled in (False, True):
        model = build.fresh(config, 3).cuda().train()
        model.compiles = compiled
        NextToken(train).loss(model, batch).sum.backward()
        found.append([p.grad for p in model.parameters()])
    for plain, flex in zip(*found, strict=True):
        assert (plain - flex).norm() <= 1e-2 * plain.norm()


# -- positions and masks from outside ----------------------------------------------------------------------------

PADDED = {
    "rotary": {"family": "qwen3", "num_key_value_heads": 2},
    "learned": {"family": "gpt2"},
    "sinusoidal": {"family": "gpt2", "positions": "sinusoidal"},
}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("parts", PADDED.values(), ids=PADDED)
def test_rows_padded_on_the_left_have_the_scores_that_each_has_alone(parts, cached):
    model, long, short = tiny.model(**parts), tiny.tokens(1, 12), tiny.tokens(1, 7, seed=1)
    rows, there = torch.cat((long, F.pad(short, (5, 0)))), torch.ones(2, 12, dtype=torch.int64)
    there[1, :5] = 0
    positions = (there.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        if cached:
            cache, parts_of = KeyValueCache(model.config.num_hidden_layers, tiny.CONTEXT), []
            for begin, end in ((0, 8), (8, 11), (11, 12)):
                mask = padding_mask(there[:, :end], end - begin)
                part, where = rows[:, begin:end], positions[:, begin:end]
                parts_of.append(model.scores(part, positions=where, mask=mask, cache=cache))
            scores = torch.cat(parts_of, 1)
        else:
            scores = model.scores(rows, positions=positions, mask=padding_mask(there, 12))
        torch.testing.assert_close(scores[:1], model.scores(long), atol=1e-5, rtol=0)
        torch.testing.assert_close(scores[1:, 5:], model.scores(short), atol=1e-5, rtol=0)


def test_a_prefix_that_sees_itself_both_ways_is_only_a_mask():
    model, ids, prefix = tiny.model(), tiny.tokens(1, 16), 6
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    mask[:prefix, :prefix] = True
    other = ids.clone()
    other[0, prefix - 1] = (ids[0, prefix - 1] + 1) % 31
    with torch.no_grad():
        first, second = (model.scores(tokens, mask=mask[None, None])[0] for tokens in (ids, other))
        causal = model.scores(ids)[0]
    assert (first - second).abs().amax(-1).min() > 1e-4  # what ends the prefix is seen by its beginning too
    assert (first[:prefix] - causal[:prefix]).abs().amax(-1)[:-1].min() > 1e-4


@pytest.mark.parametrize("parts", [{}, {"family": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}])
def test_blocks_computed_again_for_the_backward_pass_give_the_same_gradient(parts):
    from torch.utils.checkpoint import checkpoint

    batch, train = tiny.loader().take(Cursor())[0], tiny.settings(router_aux_loss=0.1, router_z_loss=0.1)
    losses, gradients = [], []
    for again in (False, True):
        model = tiny.model(**parts).train()
        if again:
            for block in model.model.layers:
                usual = block.forward
                block.forward = lambda *a, usual=usual: checkpoint(usual, *a, use_reentrant=False)
        loss = NextToken(train).loss(model, batch).sum
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert len(model(batch.tokens).routing) == (2 if parts else 0)
    assert losses[0] == losses[1]
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())
