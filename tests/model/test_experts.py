"""Sparse layers against a loop over experts, and the losses of the router against transformers'."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from gptworks.core.config import Config
from gptworks.core.errors import UsageError
from gptworks.data.batch import Batch
from gptworks.infer.scoring import expert_use
from gptworks.model import build
from gptworks.model.config import active_parameter_count, parameter_count
from gptworks.model.experts import SparseMLP, balance_loss, expert_load
from gptworks.model.transformer import Transformer
from gptworks.planning.cost import flops_per_token
from gptworks.training.objectives import NextToken

SHAPE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def plain(layer: SparseMLP, x: torch.Tensor) -> torch.Tensor:
    """Token by token."""
    out = []
    for row in x.flatten(0, 1):
        shares, experts = torch.softmax(layer.gate.weight @ row, 0).topk(layer.chosen)
        if layer.normalise:
            shares = shares / shares.sum()
        w = layer.experts
        out.append(sum(share * w.down_proj[e] @ (F.silu(w.gate_proj[e] @ row) * (w.up_proj[e] @ row))
                       for share, e in zip(shares, experts, strict=True)))  # fmt: skip
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_sparse_layer_is_the_sum_of_its_experts_and_so_are_its_gradients(rows):
    layer = tiny.model(**SHAPE).model.layers[0].mlp
    assert isinstance(layer, SparseMLP)
    x = torch.randn(1, rows, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = {}
    for name, y in (("ours", layer(x)[0]), ("plain", plain(layer, x))):
        y.square().sum().backward()
        found[name] = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
        x.grad = None
        layer.zero_grad()
    for ours, theirs in zip(found["ours"], found["plain"], strict=True):
        want = torch.zeros_like(ours) if theirs is None else theirs
        assert torch.allclose(ours, want, rtol=1e-4, atol=1e-5)


def test_an_expert_that_gets_every_token_drops_none():
    layer = tiny.model(**SHAPE).model.layers[0].mlp
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[3] = 1.0
    x = torch.rand(2, 30, 32)
    y, logits = layer(x)
    assert torch.allclose(y, plain(layer, x), atol=1e-5)
    shares = expert_load([logits], 2)
    assert shares[0, 3] == 0.5 and shares.shape == (1, 5)


def test_the_balance_loss_is_that_of_transformers():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    for k in (1, 2):
        want = mixtral.load_balancing_loss_func((logits,), 6, k)
        assert balance_loss(logits, k, torch.ones(50)).item() == pytest.approx(float(want), rel=1e-5)
    assert balance_loss(torch.zeros(50, 6), 2, torch.ones(50)).item() >= 2 - 1e-5
    masked = torch.ones(1, 50)
    masked[0, 30:] = 0
    want = mixtral.load_balancing_loss_func((logits,), 6, 2, masked)
    assert balance_loss(logits, 2, masked[0]).item() == pytest.approx(float(want), rel=1e-5)


def test_the_losses_of_the_router_are_added_as_means_over_layers():
    model, ids = tiny.model(**SHAPE), tiny.tokens(4, 20, 32)
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(4, 19))
    routing = model(batch.tokens).routing
    weights = torch.ones(4 * 19)

    def loss(**values: float) -> float:
        train = tiny.settings(**{"router_aux_loss": 0.0, **values})
        return NextToken(train).loss(model, batch).sum.item() / batch.weights.sum().item()

    balance = sum(balance_loss(logits, 2, weights).item() for logits in routing) / 2
    z = sum(logits.logsumexp(-1).square().mean().item() for logits in routing) / 2
    assert loss(router_aux_loss=0.3) - loss() == pytest.approx(0.3 * balance, rel=1e-3)
    assert loss(router_z_loss=0.2) - loss() == pytest.approx(0.2 * z, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_lowers_the_loss_uses_every_expert_and_goes_on_after_a_stop(optimizer):
    train = tiny.settings(optimizer=optimizer, lr=0.02 if optimizer == "muon" else 3e-3)
    started = tiny.state(train, **SHAPE)
    first = NextToken(train).loss(started.model, next(iter(tiny.loader().take(started.cursor)[:1]))).sum.item()
    done = tiny.run(started, train, until=12)
    last = NextToken(train).loss(done.model, tiny.loader().take(tiny.state(train, **SHAPE).cursor)[0]).sum.item()
    assert last < 0.9 * first
    used = expert_use(done.model, tiny.stream(), tiny.CONTEXT)
    assert used["experts_unused"] == 0 and used["expert_busiest"] < 3


def test_the_use_of_experts_is_looked_at_without_dropout():
    model = tiny.model(**SHAPE)
    dropped = Transformer(model.config.with_dropout(0.5)).train()
    dropped.load_state_dict(model.state_dict())
    assert expert_use(dropped, tiny.stream(), tiny.CONTEXT) == expert_use(model, tiny.stream(), tiny.CONTEXT)
    assert dropped.training and not model.training


def test_muon_turns_each_expert_by_itself():
    train = tiny.settings(optimizer="muon", lr=0.02, weight_decay=0.0)
    started = tiny.state(train, **SHAPE)
    before = {name: p.detach().clone() for name, p in started.model.named_parameters()}
    tiny.run(started, train, until=1, total=1)
    name = "model.layers.0.mlp.experts.up_proj"
    moved = before[name] - dict(started.model.named_parameters())[name].detach()
    for matrix in moved:
        values = torch.linalg.svdvals(matrix)
        assert 0.8 < values.max() / 0.02 < 1.25  # turned together, each would have less
    muon, adam = started.optimizers
    router = dict(started.model.named_parameters())["model.layers.0.mlp.gate.weight"]
    assert any(p is router for p in adam.param_groups[0]["params"])
    assert not any(p is router for p in muon.param_groups[0]["params"])


def test_parameters_and_operations_are_counted():
    model = tiny.model(**SHAPE)
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())
    experts = 2 * 3 * 32 * 24
    assert parameter_count(model.config) - active_parameter_count(model.config) == 3 * experts
    dense = tiny.model(intermediate_size=48)
    router = 2 * 5 * 32
    assert active_parameter_count(model.config) == parameter_count(dense.config) + router
    assert flops_per_token(model.config, 16) == flops_per_token(dense.config, 16) + 6 * router


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"family": "qwen3", "num_experts": 4}, "qwen3 cannot hold num_experts: model.family=qwen3_moe can"),
        ({"family": "qwen3_moe"}, "it needs num_experts"),
        ({"family": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok=5"),
        ({"num_experts": 4, "positions": "learned"}, "cannot hold"),
    ],
)
def test_what_no_class_holds_is_refused(values, says):
    with pytest.raises(UsageError, match=says):
        tiny.shape(**values)


def test_experts_choose_their_class_and_a_width():
    config = tiny.shape(num_experts=4, intermediate_size=64)
    assert (config.family, config.num_experts_per_tok, config.moe_intermediate_size) == ("qwen3_moe", 2, 32)
    assert Config.model_validate({"model": {"num_experts": "4"}}).model.num_experts == 4
    assert build.fresh(config, 1).model.layers[1].mlp.experts.down_proj.std() > 0
