"""The loop: one normalisation, nothing bad into a weight, every way to stop."""

import dataclasses
import json
import threading

import pytest
import tiny
import torch

from gptworks import lifecycle
from gptworks.core import runtime
from gptworks.core.config import RunFile
from gptworks.core.errors import DataError, NotFinite, UsageError
from gptworks.core.workers import ONE, side_by_side
from gptworks.data.batch import Batch, Batches, Cursor
from gptworks.data.loader import Loader
from gptworks.data.shards import open_shards
from gptworks.training import loop
from gptworks.training.gradients import accumulate
from gptworks.training.objectives import Loss, NextToken
from gptworks.training.schedule import RunSchedule


def ragged(rows=8):
    """Rows with 1 to 32 targets each, so that a mean of means is not the mean."""
    weights = torch.zeros(rows, tiny.CONTEXT)
    for row in range(rows):
        weights[row, : 1 + row * 4] = 1
    return Batch(tiny.tokens(rows, tiny.CONTEXT), tiny.tokens(rows, tiny.CONTEXT, seed=1), weights)


def gradients(batch, micro_batch=8, dtype=torch.float32, pool=ONE, **settings):
    train = tiny.settings(clip=0, **settings)
    state = tiny.state(train)
    state.model.dtype = dtype
    objective = NextToken(train)
    weight = objective.weight(batch)
    loss = accumulate(
        state.model, batch, objective, weight=weight, train=train, micro_batch=micro_batch, step=0, workers=pool
    )
    norm = loop._clipped(state, loss, train=train, workers=pool)
    return loss.mean, norm, {name: p.grad for name, p in state.model.named_parameters()}


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
def test_accumulation_changes_neither_loss_nor_gradient(micro_batch):
    loss, norm, whole = gradients(ragged())
    loss_in_parts, norm_in_parts, parts = gradients(ragged(), micro_batch)
    assert loss_in_parts == pytest.approx(loss, rel=1e-6)
    assert norm_in_parts == pytest.approx(norm, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share, graphs", [(0, 2), (8, 4)], ids=["the end of an epoch", "every step"])
def test_rows_that_are_left_over_are_compiled_for_where_each_step_has_them(share, graphs, monkeypatch):
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    tiny.compile_with(monkeypatch, backend)
    train = tiny.settings(clip=0)
    state, objective, batch = tiny.state(train), NextToken(train), dataclasses.replace(ragged(), share=share)
    loss = accumulate(
        state.model, batch, objective, weight=objective.weight(batch), train=train, micro_batch=3, step=0, compiles=True
    ).mean
    assert len(made) == graphs  # a block and the loss, for three rows; two are left
    assert loss == pytest.approx(gradients(ragged(), 3)[0], rel=1e-6)


def test_a_run_is_compiled_however_many_others_there_were_in_the_process(monkeypatch):
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    tiny.compile_with(monkeypatch, backend)
    train = tiny.settings()
    for heads in range(1, 11):  # torch compiles a function for eight shapes at most
        made.clear()
        state = tiny.state(train, hidden_size=8 * heads, num_attention_heads=1)
        layout = loop.Layout(torch.device("cpu"), torch.float32, 8, compile=True)
        course = RunSchedule(train.model_copy(update={"max_steps": 12}))
        loop.run(state, tiny.loader(), NextToken(train), train=train, layout=layout, schedule=course, until=1)
        assert len(made) == 2


@pytest.mark.parametrize(("workers", "micro_batch"), [(2, 4), (2, 2), (3, 2), (4, 4)])
def test_workers_change_neither_loss_nor_gradient_and_repeat_to_the_bit(workers, micro_batch):
    def computed():
        with side_by_side(workers) as pool:
            return gradients(ragged(), micro_batch, pool=pool, workers=workers)

    loss, norm, whole = gradients(ragged())
    shared, again = computed(), computed()
    assert shared[:2] == (pytest.approx(loss, rel=1e-6), pytest.approx(norm, rel=1e-5))
    assert shared[:2] == again[:2]
    for name, gradient in whole.items():
        torch.testing.assert_close(shared[2][name], gradient, rtol=1e-4, atol=1e-6)
        assert torch.equal(shared[2][name], again[2][name])


def test_each_batch_is_taken_once_the_next_one_while_a_step_computes():
    taken = []

    class Watched(Loader):
        def take(self, cursor):
            taken.append((cursor, threading.current_thread().name))
            return super().take(cursor)

    def ending(state, metrics):
        return "enough" if state.step == 5 else None

    train = tiny.settings()
    watched = Watched(tiny.stream(), tiny.CONTEXT, 8, seed=1)
    done = tiny.run(tiny.state(train), train, until=3, loader=watched)
    assert [cursor for cursor, _ in taken] == [Cursor(0, 0), Cursor(0, 8), Cursor(0, 16)]  # and none beyond the end
    assert [name.startswith("loader") for _, name in taken] == [False, True, True]
    done = tiny.run(done, train, until=9, loader=watched, hooks=[ending])
    assert done.cursor == Cursor(0, 40) and [cursor.row for cursor, _ in taken[3:]] == [24, 32, 40]


def test_a_batch_that_cannot_be_made_ends_the_run_at_its_step():
    class Torn(Loader):
        def take(self, cursor):
            if cursor.row == 16:
                raise DataError("shards were cut off")
            return super().take(cursor)

    train = tiny.settings()
    state = tiny.state(train)
    with pytest.raises(DataError, match="cut off"):
        tiny.run(state, train, until=5, loader=Torn(tiny.stream(), tiny.CONTEXT, 8, seed=1))
    assert state.step == 2


def test_an_error_of_a_worker_ends_the_step():
    class Broken(NextToken):
        def loss(self, model, batch):
            raise RuntimeError("broken" if batch.first else "the first rows")

    with side_by_side(2) as pool, pytest.raises(RuntimeError, match="the first rows"):
        train = tiny.settings(workers=2)
        accumulate(
            tiny.state(train).model, ragged(), Broken(train), weight=1.0, train=train, micro_batch=4, step=0,
            workers=pool,
        )  # fmt: skip


def test_the_loss_is_the_mean_over_targets_and_not_over_rows():
    batch = ragged()
    loss, _, _ = gradients(batch)
    model = tiny.state(tiny.settings()).model.train()
    each = torch.nn.functional.cross_entropy(
        model.scores(batch.tokens).flatten(0, 1), batch.targets.flatten(), reduction="none"
    )
    assert loss == pytest.approx(float((each.detach() * batch.weights.flatten()).sum() / batch.weights.sum()), rel=1e-6)


def test_bf16_compute_gives_gradients_near_fp32_into_fp32_weights():
    loss, _, exact = gradients(ragged())
    rounded, _, near = gradients(ragged(), dtype=torch.bfloat16)
    assert rounded != loss and rounded == pytest.approx(loss, rel=1e-2)
    for name, gradient in exact.items():
        assert near[name].dtype == torch.float32
        assert float((near[name] - gradient).norm() / gradient.norm()) < 0.05, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have float8 units")
def test_float8_is_refused_where_nothing_multiplies_it(tiny_config, tmp_path):
    with pytest.raises(UsageError, match="train.precision=fp8: this cpu has no float8 units") as refused:
        lifecycle.train(tiny_config(**{"train.precision": "fp8"}), tmp_path / "run")
    assert refused.value.code == 64


def test_clipping_bounds_the_norm_and_keeps_the_direction():
    train = tiny.settings(optimizer="sgd", lr=1.0, momentum=0, weight_decay=0, warmup=0, schedule="constant", clip=0.01)
    state = tiny.state(train)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    seen = []
    tiny.run(state, train, 1, hooks=[lambda s, m: seen.append(m)])
    moved = torch.cat([(before[name] - p.detach()).flatten() for name, p in state.model.named_parameters()])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3) and seen[0].grad_norm > 0.1


# -- nothing that is not finite ----------------------------------------------------------------------------------


class Spoiled(NextToken):
    """NextToken whose loss sum at call `at` is multiplied by `factor`."""

    def __init__(self, at, factor):
        super().__init__(tiny.settings())
        self.at, self.factor, self.calls = at, factor, 0

    def loss(self, model, batch):
        self.calls += 1
        loss = super().loss(model, batch)
        return Loss(loss.sum * self.factor) if self.calls == self.at else loss


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loss_or_gradient_that_is_not_finite_changes_no_weight(factor, optimizer):
    train = tiny.settings(optimizer=optimizer)
    state = tiny.run(tiny.state(train), train, 2)
    good = state.fingerprint()
    with pytest.raises(NotFinite, match="step 2: the (loss|gradient norm) is") as error:
        tiny.run(state, train, 5, micro_batch=4, objective=Spoiled(2, factor))  # the second half of step 2
    assert error.value.code == 76
    assert state.fingerprint() == good


def test_a_run_that_diverges_keeps_its_last_good_checkpoint_and_makes_no_model(tiny_config, tmp_path, monkeypatch):
    usual, calls = NextToken.loss, []

    def spoiled(self, model, batch):
        calls.append(batch)
        return Loss(usual(self, model, batch).sum * (float("nan") if len(calls) == 7 else 1.0))

    monkeypatch.setattr(NextToken, "loss", spoiled)
    with pytest.raises(NotFinite):
        lifecycle.train(tiny_config(**{"train.micro_batch": 8}), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert not (tmp_path / "run" / "model").exists()


def test_a_batch_without_targets_is_an_error():
    class Empty(Batches):
        def take(self, cursor):
            return dataclasses.replace(ragged(), weights=torch.zeros(8, tiny.CONTEXT)), Cursor(0, 8)

    train = tiny.settings()
    state = tiny.state(train)
    before = state.fingerprint()
    with pytest.raises(DataError, match="no trainable token") as error:
        tiny.run(state, train, 1, loader=Empty())
    assert error.value.code == 65 and state.fingerprint() == before


# -- ways to stop ------------------------------------------------------------------------------------------------


@pytest.fixture
def train(tiny_config, tmp_path):
    """train(key=value): the result of a tiny run, and its folder."""

    def do(**settings):
        overrides = {"train.max_steps": None} | settings
        return lifecycle.train(tiny_config(**overrides), tmp_path / "run"), tmp_path / "run"

    return do


def test_full_batch_takes_the_whole_corpus_in_each_step(train):
    result, out = train(**{"train.batch_tokens": "full", "train.max_epochs": 2})
    assert result["steps"] == 2
    assert result["tokens"] == 2 * (len(open_shards(out / "data").train.tokens) - 1)


def test_target_loss_ends_the_run_at_the_first_evaluation_that_reaches_it(train):
    result, out = train(**{"train.max_steps": 12, "train.target_loss": 100, "train.eval_every": 3})
    assert result["steps"] == 3 and "train.target_loss" in result["stopped"]
    assert result["train"]["loss"] is not None and (out / "checkpoints" / "step-00000003").is_dir()


def test_patience_ends_a_run_that_does_not_improve(train):
    still = {"train.lr": 0, "train.adam_lr": 0, "train.eval_every": 2, "train.patience": 2}
    result, _ = train(**still, **{"train.max_steps": 12})
    assert result["steps"] == 6 and "train.patience" in result["stopped"]


def test_max_tokens_is_not_exceeded(train):
    result, _ = train(**{"train.max_tokens": 1500})
    assert result["steps"] == 5 and result["tokens"] <= 1500  # 256 a step


def test_max_epochs_trains_on_every_token_so_often(train):
    result, out = train(**{"train.max_epochs": 1, "train.batch_tokens": 512})
    assert result["tokens"] == len(open_shards(out / "data").train.tokens) - 1


def test_a_time_budget_becomes_a_step_count_and_is_kept(train):
    runtime.restart_clock()  # as if this process had just begun
    result, out = train(**{"train.time_budget_s": 6, "train.eval_every": None, "train.checkpoint_every": None})
    file = RunFile.read(out / "config.yaml")
    assert result["steps"] == RunSchedule(file.chosen.train, file.changes).length > 10  # the plan may follow the pace
    assert 0.85 * 6 <= result["seconds"] <= 1.1 * 6  # an evaluation is a larger part of it than it should be
    assert lifecycle.verify(out)["identical"]


def test_a_hook_ends_the_run_and_says_why():
    settings = tiny.settings()
    state = tiny.run(tiny.state(settings), settings, 12, hooks=[lambda s, m: "enough" if s.step == 3 else None])
    assert state.step == 3 and state.stopped == "enough"


# -- golden ------------------------------------------------------------------------------------------------------

# fmt: off
GOLDEN = {
    "adamw": [3.474576704729642, 3.4438445568084717, 3.385244369506836, 3.334877642463235, 3.308828240797925,
              3.2319590671003358, 3.2096774578094482, 3.1578551261655745],
    "muon": [3.474576704729642, 3.460143566131592, 3.4148974418640137, 3.3808708639705882, 3.363765430073493,
             3.3195558658316116, 3.286046028137207, 3.2516432731382308],
    "sgd": [3.474576704729642, 3.47756290435791, 3.4637179374694824, 3.455203306908701, 3.4514215642755683,
            3.450471483971462, 3.4420125484466553, 3.4305257489604335],
}
# fmt: on


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_losses_are_those_of_the_day_they_were_pinned(optimizer):
    """One thread, fp32. A change that moves these has changed the model, the data order or an optimizer."""
    settings, found = tiny.settings(optimizer=optimizer), []
    tiny.run(tiny.state(settings, dropout=0.1), settings, 8, hooks=[lambda s, m: found.append(m.loss)])
    assert found == pytest.approx(GOLDEN[optimizer], rel=1e-5), json.dumps(found)
