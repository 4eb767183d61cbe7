"""How a step is cut changes neither its loss, nor its gradient, nor its figures; no pair of rows is divided."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from gptworks.core.errors import UsageError
from gptworks.core.workers import side_by_side
from gptworks.data.batch import Batch
from gptworks.training import loop
from gptworks.training.gradients import accumulate
from gptworks.training.objectives import Loss, NextToken

ROWS = 8


def batch() -> Batch:
    """Rows with 1 to 29 targets each, so that a mean of means is not the mean, and a number for each row."""
    weights = torch.zeros(ROWS, tiny.CONTEXT)
    for row in range(ROWS):
        weights[row, : 1 + row * 4] = 1
    extra = {"number": torch.arange(ROWS)}
    tokens, targets = tiny.tokens(ROWS, tiny.CONTEXT), tiny.tokens(ROWS, tiny.CONTEXT, seed=1)
    return Batch(tokens, targets, weights, extra=extra, share=ROWS)


class WithFigures(NextToken):
    """NextToken that also counts what it guesses right, and adds up the rows' numbers."""

    figures = ("right", "number")

    def loss(self, model, batch):
        guesses = model.scores(batch.tokens).argmax(-1)
        right = ((guesses == batch.targets) * batch.weights).sum()
        number = batch.extra["number"].sum()
        figures = {"right": (right, batch.weights.sum()), "number": (number, float(len(batch.tokens)))}
        return Loss(super().loss(model, batch).sum, figures)


def step(micro_batch, workers=1, reduce="sum", objective=WithFigures, rows=None):
    train = tiny.settings(workers=workers, reduce=reduce)
    state, rows = tiny.state(train), rows or batch()
    made = objective(train)
    with side_by_side(workers) as pool:
        loss = accumulate(
            state.model, rows, made, weight=made.weight(rows), train=train, micro_batch=micro_batch, step=0,
            workers=pool,
        )  # fmt: skip
    return loss, {name: p.grad for name, p in state.model.named_parameters()}


PATHS = {"one by one": (1, 1, "sum"), "in threes": (3, 1, "sum"), "two workers": (2, 2, "sum"),
         "as a tree": (2, 1, "canonical")}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_figures_are_those_of_the_whole_however_a_step_is_cut(path):
    whole, gradient = step(ROWS)
    loss, parts = step(*PATHS[path])
    assert loss.mean == pytest.approx(whole.mean, rel=1e-6)
    assert loss.figures == {"right": whole.figures["right"], "number": (28.0, 8.0)}
    assert whole.figures["right"][1] == sum(1 + row * 4 for row in range(ROWS))
    for name, value in gradient.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)


def test_a_loss_without_the_figures_it_named_is_refused():
    class Forgetful(WithFigures):
        figures = ("right", "wrong")

    with pytest.raises(UsageError, match="Forgetful names the figures .*wrong.* have to be the same"):
        step(4, objective=Forgetful)


@pytest.mark.parametrize("path", ["whole", *PATHS])
def test_a_parameter_that_nothing_depends_on_is_not_moved(path):
    """A weight decay, or the momentum of an optimizer, would move one that has a gradient of zeros."""
    micro_batch, workers, reduce = {"whole": (ROWS, 1, "sum"), **PATHS}[path]
    train = tiny.settings(workers=workers, reduce=reduce, weight_decay=0.5, lr=0.1)
    state = tiny.state(train)
    state.model.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))
    state.optimizers = tiny.make_optimizers(state.model, train)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    tiny.run(state, train, 3, micro_batch=micro_batch)
    after = dict(state.model.named_parameters())
    assert torch.equal(after["unused"], before["unused"])
    assert not any(torch.equal(after[name], value) for name, value in before.items() if name != "unused")


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_rows_that_belong_together_are_not_divided(micro_batch):
    pairs = replace(batch(), unit=2)
    with pytest.raises(UsageError, match=f"train.micro_batch={micro_batch} .* multiples of 2"):
        step(micro_batch, rows=pairs)
    loss, _ = step(2, rows=pairs)
    assert loss.mean == pytest.approx(step(ROWS)[0].mean, rel=1e-6)


def test_a_figure_that_is_not_finite_ends_the_run_before_the_update():
    class Wrong(WithFigures):
        def loss(self, model, batch):
            loss = super().loss(model, batch)
            return Loss(loss.sum, {**loss.figures, "number": (float("nan"), 1.0)})

    train = tiny.settings()
    state = tiny.state(train)
    before = state.fingerprint()

    class Numbered(loop.Batches):
        def take(self, cursor):
            return batch(), cursor

    with pytest.raises(loop.NotFinite, match="figure 'number' is nan"):
        tiny.run(state, train, 1, objective=Wrong(train), loader=Numbered())
    assert state.fingerprint() == before


def test_a_loss_that_depends_on_nothing_trained_is_refused():
    class Constant(NextToken):
        def loss(self, model, batch):
            return Loss(torch.ones((), requires_grad=True) * 3)

    train = tiny.settings()
    with pytest.raises(loop.DataError, match="depends on no parameter that is trained"):
        tiny.run(tiny.state(train), train, 1, objective=Constant(train))


def test_what_depends_on_the_weights_is_not_made_ahead():
    """Batches that say so are asked for after the update of the step before, and others while it computes."""
    train = tiny.settings(workers=1)

    class Written(type(tiny.loader())):
        ahead = False

        def take(self, cursor):
            seen.append(float(state.model.model.norm.weight.detach().sum()))
            return super().take(cursor)

    after = []
    seen: list[float] = []
    state = tiny.state(train)
    rows = Written(tiny.stream(), tiny.CONTEXT, 8, seed=1)
    tiny.run(
        state, train, 4, loader=rows, hooks=[lambda s, m: after.append(float(s.model.model.norm.weight.detach().sum()))]
    )
    assert seen[1:] == after[:3] and len(seen) == 4
