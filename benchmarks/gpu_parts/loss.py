"""Whole runs of the command: seconds to nanoGPT's loss on Tiny Shakespeare, and what 100 seconds give on Wikipedia."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_parts import ground
from gpu_parts.sheet import Missing, Sheet

NANOGPT = 1.4697  # nats a character, that nanoGPT's readme gives for its GPU setting, the best of its evaluations


def train(sheet: Sheet, recipe: str, *overrides: str, out: Path, seconds: float) -> dict[str, Any]:
    """`gptworks train` as a process: what it printed, and its own seconds from start to exit."""
    command = [sys.executable, "-m", "gptworks", "train", recipe, *overrides, "--out", str(out), "--json"]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1))
    except subprocess.TimeoutExpired as late:
        said = (late.stderr or b"")[-1500:]
        print(said.decode("utf-8", "replace") if isinstance(said, bytes) else said, flush=True)
        raise Missing(f"not finished in {seconds:.0f} s") from None
    whole = time.perf_counter() - start
    print("\n".join(done.stderr.splitlines()[-25:]), flush=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
    return {**json.loads(done.stdout), "whole_s": whole}


def curve(run: Path) -> list[tuple[int, float, float]]:
    """Step, seconds of training and loss of each evaluation."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "eval/loss" in row:
            found.append((row["step"], row.get("train/seconds", 0.0), row["eval/loss"]))
    return found


def shakespeare(sheet: Sheet, folder: Path) -> None:
    small = ["model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2", "train.context=64",
             "train.max_steps=4", "train.max_epochs=null", "train.eval_every=2", "data.eval_bytes=2000",
             "model.intermediate_size=64", "train.batch_tokens=512"]  # fmt: skip
    out = folder / "shakespeare"
    found = train(sheet, "shakespeare_char_best", *(small if sheet.tiny else []), out=out, seconds=sheet.left())
    loss, whole = found["eval"]["loss"], found["whole_s"]
    shown = f"{loss:.4f} nats a character in {whole:.1f} s, {found['tokens_per_second']:,.0f} tokens/s"
    good = loss <= NANOGPT and whole <= 90
    sheet.row(
        "shakespeare_char_best, whole process", shown, f"at most {NANOGPT} in 90 s, goal 30 s",
        "measured" if sheet.tiny else "reached" if good else "missed", result=found, curve=curve(out),
    )  # fmt: skip


def wikipedia(sheet: Sheet, folder: Path) -> None:
    if not ground.prepared() and not sheet.tiny:
        raise Missing("no prepared text: benchmarks/gpu.py --prepare")
    budget = 15 if sheet.tiny else min(100, int(sheet.left()) - 12)
    overrides = [
        *ground.sources(), *ground.TOKENIZER, "train.max_tokens=null", f"train.time_budget_s={budget}",
        "generate.prompts=[]", "train.batch_tokens=131072",
    ]  # fmt: skip
    if sheet.tiny:
        overrides += ["model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2",
                      "train.context=64", "train.batch_tokens=1024", "train.max_steps=8",
                      "data.eval_bytes=5000"]  # fmt: skip
        overrides += [
            f"data.shards={folder / 'shards'}",
            "tokenizer.vocab_size=512",
            "data.eval=null",
            "data.train=shakespeare",
        ]
    found = train(sheet, "gpt2_124m", *overrides, out=folder / "wikipedia", seconds=sheet.left())
    shown = (
        f"{found['eval']['bits_per_byte']:.4f} bits/byte on unseen text, {found['steps']} steps of 131,072 tokens, "
        f"{found['tokens_per_second']:,.0f} tokens/s, whole process {found['whole_s']:.1f} s"
    )
    sheet.row(f"gpt2_124m for {budget} s", shown, result=found, curve=curve(folder / "wikipedia"))


def run(sheet: Sheet) -> None:
    folder = Path(tempfile.mkdtemp(prefix="gpu-loss-"))
    try:
        sheet.attempt("shakespeare_char_best", lambda: shakespeare(sheet, folder), 20)
        sheet.attempt("gpt2_124m on Wikipedia", lambda: wikipedia(sheet, folder), 40)
    finally:
        for log in folder.glob("*/metrics.jsonl"):
            shutil.copy(log, sheet.out / f"{log.parent.name}.jsonl")
        shutil.rmtree(folder, ignore_errors=True)
