"""Optimizers against textbook and torch, groups, penalties, schedules."""

import math

import pytest
import tiny
import torch

from gptworks.core import workers
from gptworks.core.errors import UsageError
from gptworks.training import optim
from gptworks.training.optim import Muon, make_optimizers, orthogonalise, set_rates
from gptworks.training.schedule import SCHEDULES, rate_factor

SHAPES = [(16, 16), (8, 24), (24, 8), (16, 16), (8, 24)]


def matrices(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def names_of(model: torch.nn.Module, group: dict) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


# -- Muon --------------------------------------------------------------------------------------------------------


def textbook_chain(matrix: torch.Tensor) -> torch.Tensor:
    """One matrix, float64, the quintics spelled out."""
    x = matrix.double()
    x = x / (1.01 * x.norm() + 1e-7)
    for a, b, c in optim.QUINTICS:
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    return x


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_the_textbook_per_matrix(nesterov):
    ours, theirs = matrices(), [w.detach().double() for w in matrices()]
    velocity = [torch.zeros_like(w) for w in theirs]
    optimizer = Muon([{"params": ours, "lr": 0.1, "weight_decay": 0.2}], momentum=0.9, nesterov=nesterov)
    for step in range(4):
        set_gradients(ours, step)
        for i, w in enumerate(ours):
            g = w.grad.double()
            velocity[i] = 0.9 * velocity[i] + 0.1 * g
            update = 0.1 * g + 0.9 * velocity[i] if nesterov else velocity[i]
            rows, columns = w.shape
            theirs[i] = theirs[i] * (1 - 0.1 * 0.2)
            theirs[i] = theirs[i] - 0.1 * max(1, rows / columns) ** 0.5 * textbook_chain(update)
        optimizer.step()
    for w, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(w.detach().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_follows_torch_muon_to_its_bf16_accuracy(nesterov, monkeypatch):
    """With the coefficients that torch takes for every iteration."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    monkeypatch.setattr(optim, "QUINTICS", [(3.4445, -4.7750, 2.0315)] * 5)
    ours, theirs = matrices(), matrices()
    mine = Muon([{"params": ours, "lr": 0.1, "weight_decay": 0.2}], momentum=0.9, nesterov=nesterov)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, momentum=0.9, nesterov=nesterov)
    before = [w.detach().clone() for w in ours]
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        mine.step()
        reference.step()
    for w, expected, start in zip(ours, theirs, before, strict=True):
        moved, should = (w - start).detach(), (expected - start).detach()
        assert float((moved - should).norm() / should.norm()) < 0.03  # torch's iteration is in bf16


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 64), (1, 1, 5)])
def test_orthogonalise_drives_singular_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    turned = orthogonalise(x)
    values = torch.linalg.svdvals(turned)
    kept = s > 0.004 * s.norm(dim=-1, keepdim=True)
    assert values.max() < 1.22
    aligned = torch.diagonal(u.mT @ turned @ v.mT, dim1=-2, dim2=-1)  # the same singular vectors, in order
    assert (aligned[kept] > 0.78).all() and (aligned[kept] < 1.22).all()


# -- SGD and AdamW -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_equals_torch_sgd(momentum, nesterov):
    ours, theirs = matrices(), matrices()
    mine = optim.SGD([{"params": ours, "lr": 0.05}], momentum, nesterov)
    reference = torch.optim.SGD(theirs, lr=0.05, momentum=momentum, nesterov=nesterov)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        mine.step()
        reference.step()
    for w, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(w, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_workers_move_weights_as_one_does_and_the_same_way_each_time(name, monkeypatch):
    """Muon's products of fewer matrices at a time may round otherwise."""
    monkeypatch.setattr(workers, "WORTH_SHARING", 1)  # or this model would stay with the caller
    train = tiny.settings(lr=0.1, adam_lr=0.1, weight_decay=0.5, momentum=0.9, optimizer=name)

    def moved(count):
        model = tiny.model()
        optimizers = make_optimizers(model, train)
        with workers.side_by_side(count) as pool:
            for step in range(3):
                set_gradients(list(model.parameters()), step)
                for optimizer in optimizers:
                    optimizer.step(pool)
        state = [value for optimizer in optimizers for held in optimizer.state.values() for value in held.values()]
        return [*model.parameters(), *state]

    one, two, again, three = moved(1), moved(2), moved(2), moved(3)
    for a, b, c, d in zip(one, two, again, three, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(d, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_weight_decay_is_decoupled_from_the_gradient(name):
    """With a zero gradient, a matrix shrinks by exactly lr * weight_decay, and nothing else moves."""
    train = tiny.settings(optimizer=name, lr=0.1, adam_lr=0.1, weight_decay=0.5)
    model = tiny.model(family="gpt2")
    optimizers = make_optimizers(model, train)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    for key, parameter in model.named_parameters():
        inside = "layers." in key and parameter.ndim == 2
        decayed = inside or (name != "muon" and key.endswith("embed_tokens.weight"))
        torch.testing.assert_close(parameter.detach(), before[key] * (0.95 if decayed else 1.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_adamw_decays_matrices_alone(family):
    model = tiny.model(family=family)
    groups = make_optimizers(model, tiny.settings(weight_decay=0.3))[0].param_groups
    decayed = {name for group in groups if group["weight_decay"] for name in names_of(model, group)}
    plain = {name for group in groups if not group["weight_decay"] for name in names_of(model, group)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    sizes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    assert all(sizes[name] == 2 for name in decayed)
    assert any(name.endswith("embed_tokens.weight") for name in decayed)
    assert not any("norm" in name or name.endswith("bias") or "embed_positions" in name for name in decayed)
    assert {name for name in sizes if "norm" in name or name.endswith("bias") or "embed_positions" in name} == plain
    if family == "gpt2":
        assert any("embed_positions" in name for name in plain) and any(name.endswith("bias") for name in plain)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon"])
@pytest.mark.parametrize("parts", [{"family": "gpt2"}, {"family": "qwen3"}, {"tie_word_embeddings": False}])
def test_every_parameter_is_in_exactly_one_group(name, parts):
    model = tiny.model(**parts)
    optimizers = make_optimizers(model, tiny.settings(optimizer=name))
    grouped = sorted(id(p) for o in optimizers for group in o.param_groups for p in group["params"])
    assert grouped == sorted(id(p) for p in model.parameters())


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else():
    model = tiny.model(family="gpt2", tie_word_embeddings=True)
    muon, adamw = make_optimizers(model, tiny.settings(optimizer="muon"))
    turned = names_of(model, muon.param_groups[0])
    assert turned == {n for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n}
    assert any("embed_tokens" in name for name in names_of(model, adamw.param_groups[0]))


def test_an_optimizer_that_leaves_a_parameter_out_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\ndef Half(model, train):\n    return [torch.optim.SGD([next(model.parameters())], 1)]\n"
    )
    with pytest.raises(UsageError, match="leaves a parameter out"):
        make_optimizers(tiny.model(), tiny.settings(optimizer=f"{path}:Half"))


def test_an_optimizer_of_ones_own_trains(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\ndef Plain(model, train):\n    return [torch.optim.SGD(model.parameters(), lr=train.lr)]\n"
    )
    mine = tiny.settings(optimizer=f"{path}:Plain", lr=0.5)
    known = tiny.settings(optimizer="sgd", lr=0.5, momentum=0.0, weight_decay=0.0, nesterov=False)
    ours, theirs = tiny.run(tiny.state(mine), mine, 3), tiny.run(tiny.state(known), known, 3)
    start = tiny.state(mine)
    for (name, a), b, c in zip(
        ours.model.named_parameters(), theirs.model.parameters(), start.model.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert not torch.equal(a, c), name


# -- penalties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.3), (0.2, 0.0), (0.2, 0.3)])
def test_penalty_gradient_equals_autograd_of_the_penalty(l1, l2):
    model = tiny.model(family="gpt2")
    batch, _ = tiny.loader().take(tiny.state(tiny.settings()).cursor)

    def loss():
        return torch.nn.functional.cross_entropy(model.scores(batch.tokens).flatten(0, 1), batch.targets.view(-1))

    penalised = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed_positions" not in n]
    penalty = sum(l2 / 2 * (p**2).sum() + l1 * p.abs().sum() for p in penalised)
    (loss() + penalty).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss().backward()
    optim.add_penalties(model, l1, l2)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


# -- schedules ---------------------------------------------------------------------------------------------------

FIXED = {"min_lr": 0.1, "cooldown": 0.4, "step_every": 0.25, "step_gamma": 0.5}


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("constant", {20: 1, 60: 1, 99: 1}),
        ("linear", {20: 1, 60: 0.55, 100: 0.1}),
        ("cosine", {20: 1, 60: 0.55, 100: 0.1}),
        ("step", {24: 1, 25: 0.5, 50: 0.25, 75: 0.125, 99: 0.125}),
        ("inverse_sqrt", {20: 1, 80: 0.5, 99: math.sqrt(20 / 99)}),
        ("wsd", {20: 1, 59: 1, 60: 1, 80: 0.1 + 0.9 * (1 - math.sqrt(0.5)), 100: 0.1}),
    ],
)
def test_schedule_at_start_middle_and_end(name, points):
    train = tiny.settings(schedule=name, warmup=0.2, **FIXED)
    for step in range(20):  # the warm-up is a straight line from just above zero
        assert rate_factor(step, 100, train) == pytest.approx((step + 1) / 21)
    for step, factor in points.items():
        assert rate_factor(step, 100, train) == pytest.approx(factor), step


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_schedule_never_leaves_zero_to_one_and_starts_above_zero(name, total):
    for warmup in (0.0, 0.3, 1.0):
        train = tiny.settings(schedule=name, warmup=warmup, cooldown=0.5)
        factors = [rate_factor(step, total, train) for step in range(total)]
        assert all(0 <= factor <= 1 for factor in factors) and factors[0] > 0


def test_step_schedule_drops_on_the_step_itself():
    """0.3 / 0.1 is just below 3 in floating point; the drop must not come a step late for it."""
    train = tiny.settings(schedule="step", warmup=0.0, step_every=0.1, step_gamma=0.5)
    drops = [s for s in range(1, 100) if rate_factor(s, 100, train) < rate_factor(s - 1, 100, train)]
    assert drops == list(range(10, 100, 10))


def test_schedule_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def Half(step, total, warmup, train):\n    return 0.5 if step >= total // 2 else 1.0\n")
    train = tiny.settings(schedule=f"{path}:Half", warmup=0.0)
    assert [rate_factor(step, 4, train) for step in range(4)] == [1.0, 1.0, 0.5, 0.5]


def test_set_rates_scales_every_group_from_its_own_peak():
    optimizers = make_optimizers(tiny.model(), tiny.settings(optimizer="muon", lr=0.02, adam_lr=0.004))
    for factor in (0.5, 0.25):  # from the peak each time, not from the last rate
        assert set_rates(optimizers, factor) == pytest.approx(0.02 * factor)
        assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([0.02 * factor, 0.004 * factor])


def test_unknown_optimizer_and_schedule_name_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'adamw'"):
        make_optimizers(tiny.model(), tiny.settings(optimizer="adamww"))
    with pytest.raises(UsageError, match="did you mean 'cosine'"):
        rate_factor(0, 10, tiny.settings(schedule="cosin"))
