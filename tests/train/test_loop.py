"""The loop: how a batch is cut does not matter, bad numbers reach nothing, and it stops where it is told to."""

import math
from dataclasses import replace

import pytest
import tiny
import torch

from gptworks.core.errors import DataError, NotFinite
from gptworks.data.loader import Batch, Cursor
from gptworks.train import loop
from gptworks.train.objectives import NextToken


def gradients(micro_batch: int, **values) -> tuple[float, float, list[torch.Tensor]]:
    train = tiny.settings(clip=values.pop("clip", 0.0), **values)
    state = tiny.state(train, family="gpt2")
    batch, _ = tiny.loader().take(Cursor())
    assert batch.weights.sum(dim=1).unique().numel() > 1  # rows of ragged length
    layout = replace(tiny.LAYOUT, micro_batch=micro_batch)
    objective = NextToken()
    loss, norm = loop._gradients(state, batch, objective.loss_sum, objective.weight(batch), train, layout)
    return loss, norm, [p.grad for p in state.model.parameters()]


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
def test_accumulation_changes_neither_loss_nor_gradient(micro_batch):
    whole, parts = gradients(8), gradients(micro_batch)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6) and parts[1] == pytest.approx(whole[1], rel=1e-5)
    for one, two in zip(whole[2], parts[2], strict=True):
        assert (one - two).abs().max() < 1e-6


def test_the_loss_is_the_mean_over_the_targets_of_the_whole_batch():
    """Not the mean of the rows' means, which ragged rows would tell apart."""
    train = tiny.settings()
    state = tiny.state(train)
    batch, _ = tiny.loader().take(Cursor())
    with torch.no_grad():
        logp = state.model.logits(state.model(batch.tokens)).log_softmax(-1)
    each = -logp.gather(-1, batch.targets[..., None])[..., 0]
    seen: list[loop.StepMetrics] = []
    tiny.run(state, train, 1, hooks=[lambda s, m: seen.append(m)])
    wanted = (each * batch.weights).sum() / batch.weights.sum()
    assert seen[0].loss == pytest.approx(float(wanted), rel=1e-6)
    assert seen[0].weight == float(batch.weights.sum()) == state.tokens


def test_padding_changes_nothing():
    train = tiny.settings()
    batch, _ = tiny.loader().take(Cursor())
    other = Batch(batch.tokens.clone(), batch.targets.clone(), batch.weights)
    empty = batch.weights == 0
    other.tokens[empty], other.targets[empty] = 7, 9
    losses = []
    for given in (batch, other):
        state = tiny.state(train)
        losses.append(loop._gradients(state, given, NextToken().loss_sum, 100.0, train, tiny.LAYOUT))
    assert empty.any() and losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_clipping_shortens_the_gradient_to_the_limit_and_no_further():
    _, norm, free = gradients(8)
    _, reported, clipped = gradients(8, clip=norm / 2)
    _, _, untouched = gradients(8, clip=norm * 2)
    assert reported == pytest.approx(norm, rel=1e-6)  # the norm that is logged is from before clipping
    assert float(torch.stack([g.norm() for g in clipped]).norm()) == pytest.approx(norm / 2, rel=1e-4)
    assert all(torch.allclose(a, b) for a, b in zip(free, untouched, strict=True))


# -- numbers that are none -------------------------------------------------------------------------------------------


class Broken(NextToken):
    """Next-token loss that turns bad at a step."""

    def __init__(self, value: float, at: int) -> None:
        self.value, self.at, self.calls = value, at, 0

    def loss_sum(self, model, batch):
        self.calls += 1
        return super().loss_sum(model, batch) * (self.value if self.calls > self.at else 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_loss_that_is_not_finite_reaches_no_weight(value, optimizer):
    train = tiny.settings(optimizer=optimizer)
    state = tiny.state(train)
    tiny.run(state, train, 3)
    before = state.fingerprint()
    with pytest.raises(NotFinite, match="step 3: the loss is") as stopped:
        tiny.run(state, train, 6, objective=Broken(value, 0))
    assert stopped.value.code == 76
    assert state.fingerprint() == before and state.step == 3


def test_one_bad_micro_batch_is_enough():
    train = tiny.settings()
    state = tiny.state(train)
    before = state.fingerprint()
    with pytest.raises(NotFinite):
        tiny.run(state, train, 1, micro_batch=2, objective=Broken(math.nan, 3))
    assert state.fingerprint() == before


def test_a_gradient_that_is_not_finite_reaches_no_weight():
    class Steep(NextToken):
        def loss_sum(self, model, batch):
            return super().loss_sum(model, batch) + (model.model.norm.weight * 0).abs().sqrt().sum()  # 0 * inf

    train = tiny.settings()
    state = tiny.state(train)
    before = state.fingerprint()
    with pytest.raises(NotFinite, match="the gradient norm is"):
        tiny.run(state, train, 1, objective=Steep())
    assert state.fingerprint() == before


def test_a_rate_that_blows_up_is_stopped():
    train = tiny.settings(optimizer="sgd", lr=1e25, clip=0.0)
    with pytest.raises(NotFinite):
        tiny.run(tiny.state(train), train, 12)


def test_a_batch_without_targets_is_an_error():
    class Empty:
        def take(self, cursor):
            batch, cursor = tiny.loader().take(cursor)
            return replace(batch, weights=torch.zeros_like(batch.weights)), cursor

    train = tiny.settings()
    state = tiny.state(train)
    before = state.fingerprint()
    with pytest.raises(DataError, match="no trainable token") as stopped:
        tiny.run(state, train, 1, loader=Empty())
    assert stopped.value.code == 65 and state.fingerprint() == before


# -- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("adamw", 3e-3), ("adam", 3e-3), ("muon", 0.02)])
def test_every_optimizer_learns(optimizer, lr):
    train = tiny.settings(optimizer=optimizer, lr=lr, schedule="constant")
    losses: list[float] = []
    tiny.run(tiny.state(train), train, 25, total=25, hooks=[lambda s, m: losses.append(m.loss)])
    assert losses[0] == pytest.approx(math.log(32), abs=0.3)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.3


def test_full_batch_descent_goes_down_every_step():
    train = tiny.settings(optimizer="sgd", momentum=0.0, nesterov=False, lr=0.1, schedule="constant", warmup=0.0,
                          weight_decay=0.0, clip=0.0)  # fmt: skip
    losses: list[float] = []
    state = tiny.run(tiny.state(train), train, 8, loader=tiny.loader(None), hooks=[lambda s, m: losses.append(m.loss)])
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
    assert state.cursor == Cursor(8, 0)  # a step is an epoch
    assert state.tokens == 8 * (len(tiny.stream().tokens) - 1)


def test_a_full_batch_is_every_token_once():
    batch, _ = tiny.loader(None).take(Cursor())
    assert sorted(batch.targets[batch.weights > 0].tolist()) == sorted(tiny.stream().tokens[1:].tolist())


def test_a_hook_can_end_the_run_and_says_why():
    train = tiny.settings()
    state = tiny.run(tiny.state(train), train, 9, hooks=[lambda s, m: "enough" if s.step == 4 else None])
    assert state.step == 4 and state.stopped == "enough"
    assert tiny.run(state, train, 9).step == 4
