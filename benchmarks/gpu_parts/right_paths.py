"""The paths through the model: families, text, hand-written passes, float8, experts, adapters, optimizers."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gptworks.core import runtime
from gptworks.core.config import Adapter, Train
from gptworks.data.tokenizer import Tokenizer
from gptworks.infer.engine import Engine
from gptworks.infer.sampling import Sampling
from gptworks.model import adapters, kernels
from gptworks.model import config as architecture
from gptworks.model.experts import SparseMLP, grouped
from gptworks.model.families import FAMILIES
from gptworks.model.transformer import Transformer
from gptworks.model.transforms import use_float8
from gptworks.training.optim import OPTIMIZERS, make_optimizers, orthogonalise
from gpu_parts.right_models import (
    BOUNDS,
    CONTEXT,
    CPU,
    DTYPES,
    EIGHTH,
    PROMPT,
    WINDOW,
    Bounds,
    Gap,
    config_of,
    finite,
    gap,
    judge,
    measured,
    model_of,
    norm,
    steps,
)
from gpu_parts.sheet import Missing, Sheet

# -- families ----------------------------------------------------------------------------------------------------


def families(sheet: Sheet) -> None:
    """Losses and gradients of every family against the CPU's in float32. In low precision tokens go to the experts that
    float32 chose: where two are about as likely, rounding decides, and another expert is no small difference."""
    gaps: dict[str, dict[str, Gap]] = {name: {} for name in DTYPES}
    turned: dict[str, float] = {}
    for family in FAMILIES:
        model, chosen = model_of(config_of(family)), list[Tensor]()
        with noted(chosen):
            wanted = measured(model, torch.float32, CPU)
        for name, dtype in DTYPES.items():
            with held(chosen) if name != "fp32" else contextlib.nullcontext([]) as changes:
                gaps[name][family] = gap(measured(model, dtype, sheet.device), wanted)
            if changes:
                turned[f"{family} {name}"] = sum(changes) / len(changes)
    for name, found in gaps.items():
        judge(sheet, f"{len(found)} families in {name} against the CPU's fp32", found, BOUNDS[name], turned=turned)


@contextlib.contextmanager
def noted(chosen: list[Tensor]) -> Iterator[None]:
    """Notes down the experts of every token."""
    own = SparseMLP.choose

    def choose(self: SparseMLP, logits: Tensor) -> tuple[Tensor, Tensor]:
        shares, numbers = own(self, logits)
        chosen.append(numbers.cpu())
        return shares, numbers

    with mock.patch.object(SparseMLP, "choose", choose):
        yield


@contextlib.contextmanager
def held(chosen: list[Tensor]) -> Iterator[list[float]]:
    """Sends tokens to the experts that were noted down. Gives what share of them would have gone elsewhere."""
    own, turned, waiting = SparseMLP.choose, list[float](), iter(chosen)

    def choose(self: SparseMLP, logits: Tensor) -> tuple[Tensor, Tensor]:
        here, numbers = own(self, logits)[1], next(waiting).to(logits.device)
        turned.append(float((here.sort(-1).values != numbers.sort(-1).values).any(-1).float().mean()))
        shares = torch.softmax(logits.float(), -1).gather(-1, numbers)
        return (shares / shares.sum(-1, keepdim=True) if self.normalise else shares), numbers

    with mock.patch.object(SparseMLP, "choose", choose):
        yield turned


def text_of_families(sheet: Sheet) -> None:
    """Greedy text in fp32, longer than the context, so that the cache grows, ends and begins anew."""
    tokenizer, different = Tokenizer.of_bytes(), dict[str, tuple[int, float]]()
    length = 12 if sheet.tiny else CONTEXT + WINDOW
    for family in FAMILIES:
        model = model_of(config_of(family)).eval()
        found, wanted = (greedy(copy.deepcopy(model).to(to), tokenizer, length) for to in (sheet.device, CPU))
        if found != wanted:
            place = next(i for i in range(length) if found[i] != wanted[i])
            different[family] = (place, lead(model, [*tokenizer.encode(PROMPT), *wanted[:place]]))
    shown = ", ".join(f"{family} from token {place}, {ahead:.0e} ahead" for family, (place, ahead) in different.items())
    verdict = "WRONG" if any(ahead > 1e-4 for _, ahead in different.values()) else "right"
    name = f"greedy text of {len(FAMILIES)} families, {length} tokens, against the CPU's"
    sheet.row(name, shown or "the same", "the same but where two scores are", verdict, different=different)


@torch.no_grad()
def lead(model: Transformer, ids: list[int]) -> float:
    """By how much the likeliest next token is ahead of the second."""
    if len(ids) > CONTEXT:
        return float("inf")  # the context began anew, and not here
    first, second = model.scores(torch.tensor([ids]))[0, -1].topk(2).values.tolist()
    return first - second


def greedy(model: Transformer, tokenizer: Tokenizer, tokens: int) -> list[int]:
    return Engine(model, tokenizer, ()).generate(PROMPT, Sampling(temperature=0), tokens).tokens


# -- hand-written passes -----------------------------------------------------------------------------------------


def passes(sheet: Sheet) -> None:
    """Each pass of `kernels` against its plain form on the same device, with more chunks than one, vocabularies that no
    kernel likes, smoothing, z-loss and a cap."""
    device = sheet.device
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    angles = drawn(1, 48, 1, 16)
    table = (angles.cos(), angles.sin())
    weight, rows = drawn(32).abs() + 0.5, 1100
    targets = {size: torch.randint(size, (rows,), generator=generator).to(device) for size in (259, 320)}
    weights = torch.rand(rows, generator=generator).to(device)
    weights[:5] = 0
    options: list[dict[str, float]] = [{}, {"label_smoothing": 0.2, "z_loss": 0.1}, {"z_loss": 0.01, "cap": 2.0},
                                       {"label_smoothing": 0.1, "z_loss": 0.1, "cap": 0.5}]  # fmt: skip
    chunk = 1 << 17  # bytes of logits, so that the rows are more chunks than one
    small = mock.patch.dict(architecture.LOGITS_BYTES, {device.type: chunk})
    for name, dtype in DTYPES.items():
        cases: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
            "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-6), [drawn(3, 48, 4, 32).to(dtype), weight]),
            "rotate": (lambda x: kernels.rotate(x, table), [drawn(3, 48, 4, 32).to(dtype)]),
            "rotate half": (lambda x: kernels.rotate(x, table), [drawn(3, 48, 4, 64).to(dtype)]),
        }
        for size, wanted in targets.items():
            for option in options:
                loss = functools.partial(head_loss, targets=wanted, weights=weights, **option)
                cases[f"head of {size} {option}"] = (loss, [drawn(rows, 64).to(dtype), drawn(size, 64)])
        with small:
            gaps = {case: against_plain(made, inputs) for case, (made, inputs) in cases.items()}
        near = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 4e-3}[name]
        judge(sheet, f"hand-written passes in {name} against the plain ones", gaps, Bounds(near, near, near))


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, **option: float) -> Tensor:
    assert len(kernels._chunks(len(hidden), head)) > 1
    return kernels.cross_entropy_sum(hidden, head, targets, weights, **option)


def against_plain(made: Callable[..., Tensor], inputs: list[Tensor]) -> Gap:
    found = []
    for fused in (True, False):
        with mock.patch.object(kernels, "FUSED", fused):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            value = made(*leaves)
            torch.manual_seed(5)
            value.backward(torch.randn(value.shape).to(value) if value.ndim else None)
            tensors = {f"gradient {i}": leaf.grad.cpu() for i, leaf in enumerate(leaves) if leaf.grad is not None}
            found.append((norm(value.detach()), {"value": value.detach().cpu(), **tensors}))
    return gap(found[0], found[1])


def float8(sheet: Sheet) -> None:
    """Products in float8 against exact ones, then steps of a model that trains in it against bf16's."""
    if sheet.device.type == "cuda" and not runtime.has_float8(sheet.device):
        raise Missing(f"{torch.cuda.get_device_name()} has no float8 units")
    generator = torch.Generator().manual_seed(1)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((2, 32, 48), (64, 48), (2, 32, 64)))
    x[0, 0, 0] = 30.0  # the scale is a tensor's own, so one large value costs the others precision
    leaves = [x.to(sheet.device, torch.bfloat16).requires_grad_(), weight.to(sheet.device, copy=True).requires_grad_()]
    y = kernels.linear_float8(*leaves)
    y.backward(grad.to(y))
    exact = [x @ weight.T, grad @ weight, grad.flatten(0, 1).T @ x.flatten(0, 1)]
    apart = [
        norm(a.detach().cpu().float() - b) / norm(b)
        for a, b in zip([y, *(leaf.grad for leaf in leaves)], exact, strict=True)
    ]
    # Three bits of a mantissa are off by up to 1/16, and by 1/35 on average; two, in a gradient, by twice that.
    sheet.check("products in float8 against exact ones", max(apart), 0.08, each=apart)
    model = model_of(config_of("qwen3"))
    wanted = steps(model, torch.bfloat16, sheet.device)
    use_float8(model)
    found = steps(model, torch.bfloat16, sheet.device)
    assert found.losses != wanted.losses, "nothing was multiplied in float8"
    judge(sheet, "3 steps in float8 against bf16", {"qwen3": gap(found.made, wanted.made)}, EIGHTH)


# -- experts, adapters, optimizers -------------------------------------------------------------------------------


def experts(sheet: Sheet) -> None:
    """Products of experts against the CPU's in fp32, on each path: a kernel for all of them, and one after another.
    Among them are experts that get no token, the first and the last too."""
    sizes = torch.tensor([0, 37, 1, 0, 0, 160, 59, 0])
    generator = torch.Generator().manual_seed(1)
    count, kinds = int(sizes.sum()), ("product", "of tokens", "of weights")
    for name, dtype in DTYPES.items():
        gaps, idle = dict[str, Gap](), 0.0
        for what, inner, width in (("aligned", 48, 64), ("not aligned", 20, 36)):
            shapes = (count, width), (len(sizes), inner, width), (count, inner)
            x, weights, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
            found = []
            for device, kind in ((sheet.device, dtype), (CPU, torch.float32)):
                leaves = [value.to(device, kind, copy=True).requires_grad_() for value in (x, weights)]
                ends = sizes.cumsum(0).int().to(device)
                spoilt(device)
                y = grouped(leaves[0], leaves[1], ends)
                y.backward(grad.to(device, kind))
                tensors = [t.cpu() for t in (y.detach(), leaves[0].grad, leaves[1].grad) if t is not None]
                found.append((norm(tensors[0]), dict(zip(kinds, tensors, strict=True))))
            gaps[what] = gap(found[0], found[1])
            idle = max(idle, finite(float(found[0][1]["of weights"][sizes == 0].abs().max())))
        near = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}[name]
        judge(sheet, f"products of experts in {name} against the CPU's fp32", gaps, Bounds(near, near, near))
        sheet.check(f"the gradient of an expert without a token in {name}", idle, 0.0)


def spoilt(device: torch.device) -> None:
    """Leaves NaN in the memory that the next tensors get, so that what a kernel does not write is seen."""
    left = [torch.full((size,), float("nan"), device=device) for size in (1 << 8, 1 << 12, 1 << 14, 1 << 16) * 4]
    del left


def lora(sheet: Sheet) -> None:
    """Losses and gradients of adapters against the CPU's in fp32 beside the same frozen codes."""
    kinds: dict[str, dict[str, Any]] = {base: {"base": base} for base in ("fp32", "bf16", "int8", "int4", "nf4")}
    kinds |= {"fp32, DoRA": {"base": "fp32", "use_dora": True}, "nf4, DoRA": {"base": "nf4", "use_dora": True}}
    gaps: dict[str, dict[str, Gap]] = {name: {} for name in DTYPES}
    for kind, values in list(kinds.items())[-2:] if sheet.tiny else kinds.items():
        model = adapted(model_of(config_of("qwen2")), **values)
        wanted = measured(model, torch.float32, CPU)
        for name in gaps:
            gaps[name][kind] = gap(measured(model, DTYPES[name], sheet.device), wanted)
    for name, found in gaps.items():
        judge(sheet, f"adapters in {name} against the CPU's fp32, by their base", found, BOUNDS[name])


def adapted(model: Transformer, **values: Any) -> Transformer:
    """A model with adapters none of whose matrices is zero, or their partners would have no gradient."""
    made = adapters.attach(model, Adapter(kind="lora", rank=8, **values), 1).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapters.adapters(made).values():
            layer.lora_B.add_(torch.randn(layer.lora_B.shape, generator=generator) * 0.02)
    return made


def muon(sheet: Sheet) -> None:
    """The singular values that Muon gives, of matrices whose own are from 0.003 of their norm up."""
    generator = torch.Generator().manual_seed(1)
    gaussian = torch.randn(4, 64, 128, generator=generator)
    steep = torch.linalg.svd(torch.randn(4, 32, 96, generator=generator), full_matrices=False)
    matrices = {"gaussian": gaussian, "steep": steep.U * torch.logspace(0, -2.2, 32) @ steep.Vh}
    # In exact arithmetic no value is further than 0.21 from 1; rounded to bf16 between the products, as emulated on a
    # CPU, they come to 0.26 and 0.39.
    for name, bound in (("gaussian", 0.35), ("steep", 0.5)):
        made = torch.linalg.svdvals(orthogonalise(matrices[name].to(sheet.device)).cpu().double())
        far, values = finite(float((made - 1).abs().max())), [float(made.min()), float(made.max())]
        sheet.check(f"singular values of Muon's {name} matrices, distance from 1", far, bound, values=values)


def optimizers(sheet: Sheet) -> None:
    """Two steps of each optimizer, from the same gradients, against the CPU's."""
    model = model_of(config_of("qwen3"))
    gaps: dict[str, Gap] = {}
    for name in OPTIMIZERS:
        train = Train(optimizer=name, lr=0.02, adam_lr=0.01, momentum=0.9, weight_decay=0.1)
        found = []
        for device in (sheet.device, CPU):
            here = copy.deepcopy(model).to(device)
            made, generator = make_optimizers(here, train), torch.Generator().manual_seed(3)
            for _ in range(2):
                for parameter in here.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
                for optimizer in made:
                    optimizer.step()
            parameters = dict(model.named_parameters())
            moved = {n: p.detach().cpu() - parameters[n].detach() for n, p in here.named_parameters()}
            found.append((1.0, moved))
        gaps[name] = gap(found[0], found[1])
    turned = {"muon": gaps.pop("muon")}
    judge(sheet, "2 steps of optimizers against the CPU's", gaps, Bounds(1e-5, 1e-5, 1e-5))
    judge(sheet, "2 steps of Muon against the CPU's in fp32", turned, Bounds(2e-2, 2e-2, 5e-2))
