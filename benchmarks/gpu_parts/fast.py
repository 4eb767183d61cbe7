"""How fast training is, of what the card can do and beside others, and where its time goes."""

import statistics
import time

import torch
import torch.nn.functional as F
from baselines import nanogpt_gpu, transformers_loop
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptworks.core.workers import ONE
from gptworks.model.kernels import cross_entropy_sum
from gptworks.planning.cost import flops_per_token
from gptworks.training import loop
from gptworks.training.gradients import StepLoss
from gpu_parts import shapes
from gpu_parts.sheet import Missing, Sheet

# What a kernel is, by words in its name; the first that fits.
GROUPS = {
    "attention": ("flash", "fmha", "sdpa", "attention", "cudnn_generated"),
    "products": ("gemm", "cutlass", "nvjet", "cublas", "wgmma", "matmul", "gemv", "mm_"),
    "optimizer": ("multi_tensor", "adam", "foreach"),
    "copies": ("memcpy", "memset"),
}


class Fast:
    """The measurements of this part, which share the card's rate and our own speed."""

    def __init__(self, sheet: Sheet) -> None:
        self.sheet, self.device, self.tiny = sheet, sheet.device, sheet.tiny
        self.dtype = torch.float32 if self.tiny else torch.bfloat16
        self.vocabulary = 512 if self.tiny else shapes.VOCABULARY
        self.rate = 0.0  # FLOP/s of a large product of random numbers
        self.ours: dict[str, float] = {}  # tokens a second

    def products(self) -> None:
        sizes = (256, 512) if self.tiny else (4096, 8192)
        rates = {size: shapes.matmul_rate(self.device, self.dtype, size) for size in sizes}
        self.rate = rates[sizes[-1]]
        sheet = shapes.datasheet(self.device)
        shown = ", ".join(f"{size}: {rate / 1e12:.3g}" for size, rate in rates.items())
        also = f"; {100 * rates[sizes[-1]] / sheet:.0f} % of the datasheet's {sheet / 1e12:.0f}" if sheet else ""
        self.sheet.row("matrix products, TFLOP/s", shown + also, rates=rates)
        x = torch.empty(2**20 if self.tiny else 2**30, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        speed = 2 * x.numel() / shapes.timed(lambda: y.copy_(x))
        self.sheet.row("copy on the device, read and written", f"{speed / 1e12:.2f} TB/s", figure=speed)

    def training(
        self, size: str, tokens: int, count: int, least: float = 0.0, goal: float = 0.0, **keys: object
    ) -> None:
        """Tokens a second of our loop, and its share of the matmul rate."""
        context = 64 if self.tiny else 1024
        shapes.fresh()
        began = time.perf_counter()
        tree = shapes.gpt2("tiny" if self.tiny else size, tokens, context, **keys)
        run = shapes.decided(tree, self.vocabulary).run
        prepared = time.perf_counter() - began
        seconds = shapes.steps(run, 2 + count)
        step = statistics.median(seconds[2:])
        speed, config = tokens / step, run.state.model.config
        share = speed * flops_per_token(config, context) / self.rate
        name = f"{size} {run.config.train.optimizer}" + ("" if run.layout.compile or self.tiny else ", not compiled")
        if "micro_batch" in keys:
            name += f", {run.layout.micro_batch} rows a pass"
        self.ours.setdefault(size, speed)
        written = shapes.datasheet(self.device)
        mfu = f", {100 * share * self.rate / written:.0f} % of the datasheet's" if written else ""
        shown = (
            f"{speed:,.0f} tokens/s, {100 * share:.1f} % of the matmul rate{mfu}, {shapes.peak_bytes() / 1e9:.1f} GB; "
            f"first step {seconds[0]:.1f} s, then {step:.3f} s ({min(seconds[2:]):.3f} to {max(seconds[2:]):.3f})"
        )
        facts = {
            "tokens_per_second": speed, "seconds": seconds, "prepared_s": prepared, "peak_bytes": shapes.peak_bytes(),
            "micro_batch": run.layout.micro_batch, "compile": run.layout.compile, "step_tokens": tokens,
        }  # fmt: skip
        if least:
            wanted = f"at least {100 * least:.0f} %, goal {100 * goal:.0f} %"
            self.sheet.reach(f"training {name}", share, least, shown, wanted, **facts)
        else:
            self.sheet.row(f"training {name}", shown, share=share, **facts)
        if size == "124M" and not keys:
            self.sheet.attempt("where the step's time goes", lambda: self.profile(run))

    def profile(self, run: object) -> None:
        """Kernels of two more steps by their time."""
        from torch.profiler import ProfilerActivity, profile

        kind = ProfilerActivity.CPU if self.device.type == "cpu" else ProfilerActivity.CUDA
        with profile(activities=[kind]) as found:
            start = time.perf_counter()
            shapes.steps(run, 1 if self.tiny else 2)  # type: ignore[arg-type]
            wall = time.perf_counter() - start
        events = found.key_averages()
        times = {e.key: (e.self_cpu_time_total if self.tiny else e.self_device_time_total) / 1e6 for e in events}
        busy = sum(times.values())
        groups: dict[str, float] = {}
        for name, seconds in times.items():
            low = name.lower()
            group = next((g for g, words in GROUPS.items() if any(word in low for word in words)), "elementwise")
            groups[group] = groups.get(group, 0.0) + seconds
        shown = ", ".join(f"{g} {100 * s / wall:.1f} %" for g, s in sorted(groups.items(), key=lambda item: -item[1]))
        most = sorted(times.items(), key=lambda item: -item[1])[:60]
        self.sheet.row("share of the step", f"{shown}, gaps {100 * (1 - busy / wall):.1f} %", groups=groups, wall=wall,
                       kernels=most)  # fmt: skip
        ten = "; ".join(f"{100 * seconds / wall:.1f} % {name[:56]}" for name, seconds in most[:10])
        self.sheet.row("ten kernels of the step", ten)

    def head(self) -> None:
        """The head with its loss, forward and backward, compiled and not, over a vocabulary of an odd size."""
        rows, width, size = (256, 64, 259) if self.tiny else (2**15, 768, self.vocabulary)
        hidden = torch.randn(rows, width, device=self.device, dtype=self.dtype, requires_grad=True)
        head = torch.randn(size, width, device=self.device).mul_(0.02).requires_grad_()
        targets = torch.randint(size, (rows,), device=self.device)
        weights = torch.ones(rows, device=self.device)

        def work(compiled: bool) -> None:
            cross_entropy_sum(hidden, head, targets, weights, compiled=compiled).backward()
            hidden.grad = head.grad = None

        for compiled in (False,) if self.tiny else (True, False):
            seconds = shapes.timed(lambda c=compiled: work(c), 5)  # type: ignore[misc]
            share = 6 * rows * width * size / seconds / self.rate
            how = "compiled" if compiled else "not compiled"
            self.sheet.row(f"head and loss, {how}", f"{1e6 * seconds / rows:.3f} us a token, {100 * share:.0f} % of "
                           "the matmul rate", seconds=seconds)  # fmt: skip

    def attention(self) -> None:
        """Attention of 124M by each of torch's kernels, forward and backward."""
        B, H, T, C = (2, 2, 64, 32) if self.tiny else (32, 12, 1024, 64)
        q, k, v = (
            torch.randn(B, T, H, C, device=self.device, dtype=self.dtype).transpose(1, 2).requires_grad_()
            for _ in range(3)
        )
        grad = torch.randn(B, T, H, C, device=self.device, dtype=self.dtype).transpose(1, 2)
        kernels = {"as torch chooses": None, "flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
        for name, kernel in {"as torch chooses": None}.items() if self.tiny else kernels.items():

            def work(kernel: SDPBackend | None = kernel) -> None:
                if kernel is None:
                    F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)
                else:
                    with sdpa_kernel(kernel):
                        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)
                q.grad = k.grad = v.grad = None

            def measure(name: str = name, work: object = work) -> None:
                seconds = shapes.timed(work, 10)
                rate = 6 * B * H * T * T * C / seconds
                self.sheet.row(f"attention, {name}", f"{1e6 * seconds / (B * T):.3f} us a token, "
                               f"{rate / 1e12:.0f} TFLOP/s", seconds=seconds)  # fmt: skip

            self.sheet.attempt(f"attention, {name}", measure)

    def updates(self) -> None:
        """An update of all weights of 124M by each optimizer."""
        for name in ("adamw", "muon"):
            shapes.fresh()
            tokens = 128 if self.tiny else 2**14
            run = shapes.decided(
                shapes.gpt2("tiny" if self.tiny else "124M", tokens, 64 if self.tiny else 1024, optimizer=name,
                            compile=False),
                self.vocabulary,
            ).run  # fmt: skip
            for parameter in run.state.model.parameters():
                parameter.grad = torch.randn_like(parameter)
            train, state = run.config.train, run.state
            seconds = shapes.timed(lambda s=state, t=train: loop._update(s, t, ONE), 5)  # type: ignore[misc]
            clip = shapes.timed(lambda s=state, t=train: loop._clipped(s, StepLoss(1.0), train=t, workers=ONE), 5)  # type: ignore[misc]
            self.sheet.row(
                f"update, {name}", f"{1000 * seconds:.2f} ms, clipping {1000 * clip:.2f} ms", seconds=seconds
            )

    def nanogpt(self) -> None:
        """The plain loop at two sizes of micro-batch; the better counts."""
        shapes.fresh()
        context, size = (64, "tiny") if self.tiny else (1024, "124M")
        width, layers, heads = shapes.SHAPES[size]
        best, shown = 0.0, []
        for rows in (4,) if self.tiny else (32,):
            shapes.fresh()
            many = 1 if self.tiny else 524288 // (rows * context)
            made = nanogpt_gpu.step(self.vocabulary, context, width, layers, heads, self.device, not self.tiny)
            ids = torch.randint(self.vocabulary, (rows, context + 1), device=self.device)
            batch = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())] * many
            seconds = []
            for _ in range(4):
                start = time.perf_counter()
                made(batch)
                shapes.wait()
                seconds.append(time.perf_counter() - start)
            speed = rows * context * many / statistics.median(seconds[2:])
            best = max(best, speed)
            shown.append(
                f"{speed:,.0f} tokens/s with {rows} rows, {shapes.peak_bytes() / 1e9:.1f} GB, first {seconds[0]:.1f} s"
            )
        self.sheet.row("nanoGPT's compiled loop, 124M", "; ".join(shown), figure=best)
        if "124M" in self.ours:
            ratio = self.ours["124M"] / best
            self.sheet.reach(
                "ours beside nanoGPT's compiled loop", ratio, 1.0, f"{ratio:.2f} times", "at least 1.0, goal 1.3"
            )

    def transformers(self) -> None:
        shapes.fresh()
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise Missing(f"transformers: {error}") from None
        rows, context, size = (4, 64, "tiny") if self.tiny else (16, 1024, "124M")
        width, layers, heads = shapes.SHAPES[size]
        shape = {"width": width, "layers": layers, "heads": heads, "vocabulary": self.vocabulary, "context": context}
        made = transformers_loop.step(shape, self.device, self.dtype)
        ids = torch.randint(self.vocabulary, (rows, context + 1), device=self.device)
        tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        speed = rows * context / shapes.timed(lambda: made(tokens, targets), 5)
        ratio = self.ours.get("124M", 0.0) / speed
        shown = f"{speed:,.0f} tokens/s, {shapes.peak_bytes() / 1e9:.1f} GB; ours {ratio:.2f} times"
        self.sheet.row("transformers' GPT-2 124M, not compiled", shown, figure=speed)


def run(sheet: Sheet) -> None:
    fast = Fast(sheet)
    small = 512
    sheet.attempt("matrix products", fast.products)
    if not fast.rate:
        return
    step = small if sheet.tiny else 524288
    sheet.attempt("training 124M", lambda: fast.training("124M", step, 4, 0.5, 0.7), 20)
    sheet.attempt("nanoGPT's compiled loop", fast.nanogpt, 30)
    sheet.attempt("head and loss", fast.head, 5)
    sheet.attempt("attention", fast.attention, 3)
    sheet.attempt("updates", fast.updates, 5)
    step = small if sheet.tiny else 65536
    sheet.attempt("training 1.5B", lambda: fast.training("1.5B", step, 3, 0.55, 0.7), 25)
    sheet.attempt("transformers", fast.transformers, 8)
    step = small if sheet.tiny else 524288
    sheet.attempt("training 124M muon", lambda: fast.training("124M", step, 2, optimizer="muon"), 15)
    step = small if sheet.tiny else 131072
    sheet.attempt("training 124M not compiled", lambda: fast.training("124M", step, 2, compile=False), 5)
    for rows in () if sheet.tiny else (32, 16):
        name = f"training 124M with {rows} rows"
        sheet.attempt(name, lambda r=rows: fast.training("124M", step, 3, micro_batch=r), 8)  # type: ignore[misc]
    sheet.attempt("training 350M", lambda: fast.training("350M", step, 3), 15)
