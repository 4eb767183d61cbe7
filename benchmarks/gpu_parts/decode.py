"""Tokens a second for one request, of our engine and of transformers' static cache."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gptworks.core.config import Model
from gptworks.data.tokenizer import Tokenizer
from gptworks.infer.engine import Engine, Generation
from gptworks.infer.sampling import Sampling
from gptworks.model import build
from gptworks.model.config import build_config
from gptworks.model.transformer import Transformer
from gpu_parts import shapes
from gpu_parts.sheet import Missing, Sheet

GREEDY = Sampling(temperature=0)


def made(sheet: Sheet) -> tuple[Transformer, list[int], int]:
    """GPT-2 124M with fresh weights, a prompt of 1,000 ids, and how many tokens to make."""
    size, vocabulary, context = ("tiny", 512, 64) if sheet.tiny else ("124M", shapes.VOCABULARY, 1280)
    width, layers, heads = shapes.SHAPES[size]
    parts = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = build_config(Model(family="gpt2", **parts), vocabulary, context)
    model = build.fresh(config, 1).to(sheet.device).eval()
    prompt = torch.randint(100, vocabulary, (32 if sheet.tiny else 1000,), generator=torch.Generator().manual_seed(1))
    return model, prompt.tolist(), 24 if sheet.tiny else 256


def ours(
    sheet: Sheet, model: Transformer, prompt: list[int], count: int, sampling: Sampling = GREEDY
) -> list[Generation]:
    """Runs of the engine, the first of which has what is done once."""
    engine = Engine(model, Tokenizer.train_characters("abc"), ())
    engine.tokenizer = Silent()  # type: ignore[assignment]
    found = []
    for _ in range(4):
        result = Generation("")
        for _ in engine.stream(prompt, sampling, count, ignore_eos=True, result=result):
            pass
        found.append(result)
    return found


class Silent:
    """A tokenizer without words, since ids of fresh weights have none."""

    control_tokens: dict[str, int] = {}

    def decode(self, ids: list[int]) -> str:
        return "a" * len(ids)


def transformers(sheet: Sheet, model: Transformer, prompt: list[int], count: int, dtype: torch.dtype) -> dict[str, Any]:
    """Its `generate` with the static cache, which it compiles on a GPU; the same weights."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise Missing(f"transformers: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        build.save(path, model, Tokenizer.train_characters("abc"), {"metrics": {}}, torch.float32)
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(sheet.device).eval()
    ids = torch.tensor([prompt], device=sheet.device)
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "cache_implementation": "static"}
    seconds = []
    with torch.no_grad():
        for _ in range(4):
            shapes.wait()
            start = time.perf_counter()
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
            shapes.wait()
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=0,
            **(options | {"max_new_tokens": 1, "min_new_tokens": 1}),
        )
        shapes.wait()
        first = time.perf_counter() - start
    usual = statistics.median(seconds[1:])
    return {"speed": (count - 1) / max(usual - first, 1e-9), "seconds": seconds, "ids": out[0, len(prompt) :].tolist()}


def run(sheet: Sheet) -> None:
    model, prompt, count = made(sheet)
    speeds: dict[str, float] = {}
    texts: dict[str, list[int]] = {}

    def measure(name: str) -> None:
        found = ours(sheet, model, prompt, count)
        speeds[name] = statistics.median(one.tokens_per_second for one in found[1:])
        texts[name] = found[-1].tokens
        prefill = statistics.median(one.prompt_tokens_per_second for one in found[1:])
        sheet.row(f"decode, one request, {name}", f"{speeds[name]:,.0f} tokens/s, prompt of {len(prompt):,} at "
                  f"{prefill:,.0f}", runs=[one.tokens_per_second for one in found])  # fmt: skip

    def plain() -> None:
        """Without the recorded graph."""
        from gptworks.infer import engine

        before, engine.can_record = engine.can_record, lambda model: False
        try:
            measure("fp32, not recorded")
        finally:
            engine.can_record = before
        same = texts["fp32"] == texts["fp32, not recorded"]
        sheet.row("recorded and not give the same greedy text", str(same), "True", "right" if same else "WRONG")

    def sampled() -> None:
        found = ours(sheet, model, prompt, count, Sampling(seed=1, top_k=50))
        speed = statistics.median(one.tokens_per_second for one in found[1:])
        sheet.row("decode, sampled from 50 at temperature 1", f"{speed:,.0f} tokens/s", figure=speed)

    def halved() -> None:
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.bfloat16()
        model.dtype = torch.bfloat16
        measure("bf16")

    def beside(name: str, dtype: torch.dtype) -> None:
        found = transformers(sheet, model, prompt, count, dtype)
        sheet.row(f"decode, transformers' static cache, {name}", f"{found['speed']:,.0f} tokens/s, first run "
                  f"{found['seconds'][0]:.1f} s", **found)  # fmt: skip
        ratio = speeds[name] / found["speed"]
        sheet.reach(f"decode beside transformers, {name}", ratio, 1.0, f"{ratio:.2f} times", "at least 1, goal 3")
        if name == "fp32":
            same = sum(a == b for a, b in zip(found["ids"], texts[name], strict=True))
            sheet.row("same greedy tokens as transformers", f"{same} of {count}")

    sheet.attempt("decode", lambda: measure("fp32"), 3)
    sheet.attempt("decode, not recorded", plain, 5)
    sheet.attempt("decode, sampled", sampled, 5)
    sheet.attempt("transformers", lambda: beside("fp32", torch.float32), 25)
    sheet.attempt("decode, bf16", halved, 3)
    sheet.attempt("transformers", lambda: beside("bf16", torch.bfloat16), 15)
