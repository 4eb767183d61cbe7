"""Each hand-written pass against its plain form: values, every gradient, other precisions, chunks, the compiler."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor

from gptworks.core.config import Adapter, Train
from gptworks.data.batch import Batch
from gptworks.model import build, config, kernels
from gptworks.model.adapters import attach
from gptworks.model.linear import Float8Linear
from gptworks.model.transforms import use_float8
from gptworks.training.objectives import NextToken

Made = tuple[Tensor, list[Tensor | None]]
precisions = pytest.mark.parametrize("dtype, near", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str)


def both(monkeypatch: pytest.MonkeyPatch, made: Callable[..., Tensor], *inputs: Tensor) -> tuple[Made, Made]:
    """The value and the gradients of `made(*inputs)`, by our passes and by autograd's over the plain form."""
    found = []
    for fused in (True, False):
        monkeypatch.setattr(kernels, "FUSED", fused)
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        value = made(*leaves)
        torch.manual_seed(5)
        value.backward(torch.randn_like(value))
        found.append((value.detach(), [leaf.grad for leaf in leaves]))
    return found[0], found[1]


def assert_near(one: Made, other: Made, near: float) -> None:
    for a, b in zip([one[0], *one[1]], [other[0], *other[1]], strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype and a.shape == b.shape
            a, b = a.double(), b.double()
            assert (a - b).abs().max() <= near * b.abs().max(), (a - b).abs().max() / b.abs().max()


@precisions
def test_rms_norm_and_its_gradients_are_the_plain_ones(monkeypatch, dtype, near):
    torch.manual_seed(1)
    x, weight = torch.randn(3, 7, 2, 32).to(dtype), torch.rand(32) + 0.5
    assert_near(*both(monkeypatch, lambda x, w: kernels.rms_norm(x, w, 1e-6), x, weight), near)
    assert kernels.rms_norm(torch.zeros(2, 32), weight, 1e-6).abs().max() == 0


@precisions
def test_rotation_and_its_gradient_are_the_plain_ones(monkeypatch, dtype, near):
    torch.manual_seed(1)
    angles = torch.randn(1, 7, 1, 16)
    table = (angles.cos(), angles.sin())
    assert_near(*both(monkeypatch, lambda x: kernels.rotate(x, table), torch.randn(3, 7, 2, 32).to(dtype)), near)


@precisions
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"label_smoothing": 0.2, "z_loss": 0.1}, {"cap": 2.0},
     {"label_smoothing": 0.2, "z_loss": 0.1, "cap": 0.5}],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 4096, 10**9])
def test_the_loss_of_the_head_and_its_gradients_are_the_plain_ones(monkeypatch, dtype, near, options, chunk):
    monkeypatch.setitem(config.LOGITS_BYTES, "cpu", chunk)
    monkeypatch.setattr(config, "LOGITS_ROWS", 7)
    torch.manual_seed(1)
    N, D, V = 53, 16, 97
    hidden, head = torch.randn(N, D).to(dtype), torch.randn(V, D)
    targets, weights = torch.randint(V, (N,)), torch.rand(N)
    weights[:5] = 0

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return kernels.cross_entropy_sum(hidden, head, targets, weights, **options)

    one, other = both(monkeypatch, loss, hidden, head)
    assert_near(one, other, near)
    assert one[1][0][:5].abs().max() == 0  # what weighs nothing pulls nowhere
    if options.keys() <= {"cap"}:
        monkeypatch.setattr(kernels, "FUSED", True)
        each = kernels.cross_entropy(hidden, head, targets, **options)
        assert float((each * weights).sum()) == pytest.approx(other[0].item(), rel=near)


def test_a_confident_head_has_a_finite_loss_and_gradient():
    hidden = torch.full((2, 4), 100.0, requires_grad=True)
    head = torch.tensor([[100.0] * 4, [-100.0] * 4], requires_grad=True)
    loss = kernels.cross_entropy_sum(hidden, head, torch.tensor([0, 1]), torch.ones(2))
    loss.backward()
    assert loss.item() == pytest.approx(80_000) and hidden.grad.isfinite().all() and head.grad.isfinite().all()


def test_the_logits_are_never_whole_in_memory():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            made = function(*arguments, **(options or {}))
            for tensor in made if isinstance(made, tuple) else [made]:
                self.size = max(self.size, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return made

    N, D, V = 8192, 8, 2048
    with Largest() as largest:
        hidden, head = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        kernels.cross_entropy_sum(hidden, head, torch.zeros(N, dtype=torch.long), torch.ones(N)).backward()
    assert N * V / 16 < largest.size <= config.LOGITS_BYTES["cpu"] / 4 < N * V / 4


@pytest.mark.parametrize("parts", [{"family": "gpt2"}, {"family": "qwen3", "num_key_value_heads": 2}], ids=str)
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)], ids=str)
def test_a_models_gradients_are_those_of_the_plain_one_in_float32(monkeypatch, parts, dtype, near):
    ids = tiny.tokens(4, tiny.CONTEXT + 1)
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(4, tiny.CONTEXT))
    found = []
    for fused, precision in ((True, dtype), (False, torch.float32)):
        monkeypatch.setattr(kernels, "FUSED", fused)
        model = tiny.model(**parts).train()
        model.dtype = precision
        loss = NextToken(Train()).loss(model, batch).sum
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (expected, plain) = found
    assert loss == pytest.approx(expected, rel=near)
    largest = max(gradient.norm() for gradient in plain.values())
    for name, gradient in gradients.items():  # keys' biases have none but rounding: attention does not see them
        difference = (gradient - plain[name]).norm() / max(plain[name].norm(), largest / 100)
        assert difference < near, (name, difference)


def test_float8_products_are_near_the_exact_ones_and_not_equal_to_them():
    torch.manual_seed(1)
    x, weight, grad = torch.randn(2, 32, 48), torch.randn(64, 48) / 7, torch.randn(2, 32, 64)
    x[0, 0, 0] = 100.0  # the scale is a tensor's own, so one large value costs the others precision
    leaves = [x.bfloat16().requires_grad_(), weight.clone().requires_grad_()]
    y = kernels.linear_float8(*leaves)
    y.backward(grad.bfloat16())
    assert (y.dtype, leaves[0].grad.dtype, leaves[1].grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    exact = [x @ weight.T, grad @ weight, grad.flatten(0, 1).T @ x.flatten(0, 1)]
    for ours, theirs, near in zip([y, leaves[0].grad, leaves[1].grad], exact, (0.05, 0.08, 0.08), strict=True):
        assert 0.005 < float((ours.detach().float() - theirs).norm() / theirs.norm()) < near
    assert not kernels.linear_float8(torch.zeros(16, 48), weight).any()


def test_a_model_learns_in_float8_about_as_in_bf16_and_is_evaluated_in_bf16():
    losses = {}
    for float8 in (False, True):
        train = tiny.settings()
        started = tiny.state(train)
        started.model.dtype = torch.bfloat16
        if float8:
            use_float8(started.model)
        assert sum(type(m) is Float8Linear for m in started.model.modules()) == 14 * float8
        made = tiny.run(started, train, 30, total=30, dtype=torch.bfloat16)
        rows = Batch(tiny.tokens(2, tiny.CONTEXT), tiny.tokens(2, tiny.CONTEXT, seed=1), torch.ones(2, tiny.CONTEXT))
        batch, _ = tiny.loader().take(made.cursor)
        losses[float8] = float(NextToken(train).loss(made.model.eval(), batch).sum.detach() / batch.weights.sum())
        plain = build.fresh(made.model.config, 1).eval()
        plain.load_state_dict(made.model.state_dict())
        plain.dtype = torch.bfloat16
        assert torch.equal(made.model(rows.tokens).hidden, plain(rows.tokens).hidden)
    assert losses[True] != losses[False] and losses[True] == pytest.approx(losses[False], rel=0.02)


@pytest.mark.parametrize(
    "parts",
    [{"family": "qwen3", "num_key_value_heads": 2}, {"family": "gpt2"}, {"family": "qwen3_moe", "num_experts": 4}],
    ids=lambda parts: parts["family"],
)
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapters"])
def test_a_step_as_the_compiler_traces_it_has_the_same_loss_and_gradients(parts, adapted, monkeypatch):
    train = tiny.settings(label_smoothing=0.1, z_loss=0.01, router_aux_loss=0.01 if "num_experts" in parts else 0.0)
    if adapted and "num_experts" in parts:
        pytest.skip("adapters are for dense models")
    tiny.compile_with(monkeypatch, "aot_eager")
    model = tiny.model(**parts).train()
    if adapted:
        model = attach(model, Adapter(kind="lora", rank=4, base="fp32"), 1).train()
    batch = Batch(tiny.tokens(2, tiny.CONTEXT), tiny.tokens(2, tiny.CONTEXT, seed=1), torch.ones(2, tiny.CONTEXT))
    found = []
    for model.compiles in (False, True):
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = NextToken(train).loss(model, batch).sum
        found.append((loss.detach(), list(torch.autograd.grad(loss, parameters))))
    assert_near(*found, 1e-5)


@pytest.mark.parametrize("parts", [{"family": "gpt2"}, {"family": "qwen3"}], ids=lambda parts: parts["family"])
def test_blocks_that_are_alike_are_compiled_once(parts, monkeypatch):
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    tiny.compile_with(monkeypatch, backend)
    model = tiny.model(num_hidden_layers=9, **parts).train()
    model.compiles = True
    for seed in (0, 1):
        batch = Batch(tiny.tokens(2, 32, seed=seed), tiny.tokens(2, 32, seed=seed + 1), torch.ones(2, 32))
        NextToken(tiny.settings()).loss(model, batch).sum.backward()
    assert len(made) == 2  # a block and the loss
    model.eval()
    model(tiny.tokens(3, 17))
    assert len(made) == 2  # evaluations and samples are not compiled


@pytest.mark.parametrize("smoothing, z_loss, cap", [(0.0, 0.0, None), (0.1, 0.01, None), (0.1, 0.01, 5.0)])
def test_a_head_with_rows_added_has_the_loss_and_gradients_of_one_without(smoothing, z_loss, cap, monkeypatch):
    """On a GPU the head is filled up to a multiple of 64 rows."""
    torch.manual_seed(1)
    hidden, head = torch.randn(9, 16), torch.randn(31, 16)
    targets, weights = torch.randint(31, (9,)), torch.rand(9)

    def loss(hidden, head):
        return kernels.cross_entropy_sum(hidden, head, targets, weights, smoothing, z_loss, cap)

    plain = both(monkeypatch, loss, hidden, head)[1]
    monkeypatch.setattr(kernels, "_aligned", lambda head: torch.nn.functional.pad(head, (0, 0, 0, 33)))
    assert_near(both(monkeypatch, loss, hidden, head)[0], plain, 2e-6)


def test_the_gradient_of_the_head_stays_in_the_range_of_fp16():
    """Thousands of rows of one token, and a channel that is always large, as trained norms have."""
    torch.manual_seed(1)
    hidden, head = torch.randn(8192, 16), torch.randn(31, 16) * 0.02
    hidden[:, 0] = 40
    targets, found = torch.full((8192,), 3), []
    for dtype in (torch.float32, torch.float16):
        weight = head.clone().requires_grad_()
        kernels.cross_entropy_sum(hidden.to(dtype), weight, targets, torch.ones(8192)).backward()
        found.append(weight.grad)
    assert found[0].abs().max() > 2 * torch.finfo(torch.float16).max
    assert (found[0] - found[1]).norm() < 2e-3 * found[0].norm()


FIRST_AND_SECOND = """
import torch
from gptworks.model.rope import rotary_table
from gptworks.model import kernels
torch.set_num_threads(2)
first, second = (rotary_table(torch.arange(128)[None], 48, 10_000.0) for _ in range(2))
print(all(map(torch.equal, first, second)))
"""


@pytest.mark.slow
def test_the_first_table_of_a_busy_process_is_the_one_that_follows():
    """Without the cosine that `kernels` begins with, one process in thirty has another first one."""
    for _ in range(10):
        command = [sys.executable, "-c", FIRST_AND_SECOND]
        together = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
        assert [process.communicate()[0] for process in together] == ["True\n"] * 6
