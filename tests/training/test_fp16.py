"""fp16: the loss is scaled, the gradient is not, and what leaves the range costs a step and no more.

A CPU computes in fp16 too, only slowly, so the loop is given that precision; a run may ask for it on a GPU alone.
"""

import json
import math

import pytest
import tiny
import torch

from gptworks import lifecycle
from gptworks.core.errors import NotFinite, UsageError
from gptworks.training import loop
from gptworks.training.gradients import accumulate
from gptworks.training.objectives import Loss, NextToken
from gptworks.training.state import restore, save

HALF = torch.float16


def trained(state, train, until, **options):
    seen = []
    tiny.run(state, train, until, dtype=HALF, hooks=[lambda s, m: seen.append(m)], **options)
    return seen


@pytest.mark.parametrize("reduce", ["sum", "canonical"])
def test_the_scale_is_in_every_gradient_and_not_in_the_loss(reduce):
    train, found = tiny.settings(reduce=reduce), []
    for scale in (1.0, 1024.0):
        state, objective = tiny.state(train), NextToken(train)
        batch = tiny.loader().take(state.cursor)[0]
        weight = objective.weight(batch)
        loss = accumulate(
            state.model, batch, objective, weight=weight, train=train, micro_batch=2, step=0, scale=scale
        ).mean
        found.append((loss, [p.grad / scale for p in state.model.parameters()]))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_in_fp16_is_near_one_in_fp32(optimizer):
    train = tiny.settings(optimizer=optimizer)
    half = trained(tiny.state(train), train, 10, micro_batch=3)
    whole = []
    tiny.run(tiny.state(train), train, 10, hooks=[lambda s, m: whole.append(m)])
    assert [m.loss for m in half] == pytest.approx([m.loss for m in whole], rel=2e-3)
    assert [m.grad_norm for m in half] == pytest.approx([m.grad_norm for m in whole], rel=2e-2)
    assert not any(m.skipped for m in half)


def test_a_gradient_beyond_the_range_moves_nothing_and_halves_the_scale():
    train = tiny.settings(ema=0.9, skip_spikes=6.0)
    state = tiny.state(train)
    trained(state, train, 2)
    state.scale = 2.0**40
    before, norms = state.groups(), list(state.norms)
    kept = {group: {name: t.clone() for name, t in tensors.items()} for group, tensors in before.items()}
    (first,) = trained(state, train, 3)
    assert first.skipped and math.isinf(first.grad_norm) and state.scale == 2.0**39 and state.skipped == 1
    for group, tensors in state.groups().items():
        assert all(torch.equal(t, kept[group][name]) for name, t in tensors.items()), group
    assert state.norms == norms and state.step == 3 and not state.steps_since_scaled
    rest = trained(state, train, 40, total=40)
    assert rest[0].skipped and not rest[-1].skipped and state.scale < 2.0**24


def test_the_scale_doubles_after_many_steps_without(monkeypatch):
    monkeypatch.setattr(loop, "SCALE_STEPS", 3)
    train = tiny.settings()
    state = tiny.state(train)
    trained(state, train, 7)
    assert (state.scale, state.steps_since_scaled) == (2.0**18, 1)


def test_a_gradient_that_no_scale_helps_ends_the_run():
    train = tiny.settings()
    state = tiny.state(train)
    state.scale = 1.0
    objective = NextToken(train)
    objective.loss = lambda model, batch: Loss(NextToken(train).loss(model, batch).sum * 1e30)  # type: ignore[method-assign]
    with pytest.raises(NotFinite, match="gradient norm"):
        trained(state, train, 1, objective=objective)


def test_a_resumed_run_has_the_bits_of_a_straight_one(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SCALE_STEPS", 4)
    train = tiny.settings()
    straight = tiny.state(train)
    straight.scale = 2.0**40
    trained(straight, train, 3)
    path = save(straight, tmp_path, {})
    resumed = tiny.state(train)
    restore(resumed, path)
    assert resumed.scale == straight.scale < 2.0**40
    for state in (straight, resumed):
        trained(state, train, 40, total=40)
    assert straight.difference(resumed) is None and straight.fingerprint() == resumed.fingerprint()


def test_a_checkpoint_of_an_earlier_version_has_no_scale_and_opens(tmp_path):
    train = tiny.settings()
    state = tiny.state(train)
    tiny.run(state, train, 2)
    path = save(state, tmp_path, {})
    facts = json.loads((path / "state.json").read_text())
    del facts["scale"], facts["steps_since_scaled"], facts["values"]
    facts["best_loss"] = facts.pop("best_figure")
    (path / "state.json").write_text(json.dumps(facts))
    other = tiny.state(train)
    restore(other, path)
    assert state.difference(other) is None


def test_a_cpu_refuses_it(tiny_config, tmp_path):
    with pytest.raises(UsageError, match="no units for it; use auto"):
        lifecycle.train(tiny_config(**{"train.precision": "fp16"}), tmp_path / "run")
