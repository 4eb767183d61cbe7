"""Whether all that runs on a GPU is right.

Every path is compared with one that needs no GPU, or with its own plain form there: families, compiled steps,
hand-written passes, experts, adapters, optimizers, text, checkpoints. Whole commands run meanwhile, as processes of
their own. On a CPU (a tiny run) the same code compares a CPU with itself, and what cannot be had there is named.
"""

import os
import shutil
from collections.abc import Callable

import torch

from gpu_parts.right_commands import Commands
from gpu_parts.right_compiled import Compilers, loop_in_fp16
from gpu_parts.right_paths import experts, families, float8, lora, muon, optimizers, passes, text_of_families
from gpu_parts.right_runs import checkpoint, exhausted, group, repeatable
from gpu_parts.sheet import Sheet


def run(sheet: Sheet) -> None:
    """All checks, in the order of their worth, while commands run and models are compiled beside them."""
    place = sheet.out / "right"
    shutil.rmtree(place, ignore_errors=True)  # of a run before
    place.mkdir()
    torch.set_float32_matmul_precision("highest")  # no TF32: the default, and what is promised
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `repeatable`, before a product is made
    checks: list[tuple[str, Callable[[], None], float]] = [
        ("families", lambda: families(sheet), 6),
        ("text of the families", lambda: text_of_families(sheet), 5),
        ("hand-written passes", lambda: passes(sheet), 3),
        ("products in float8", lambda: float8(sheet), 2),
        ("experts", lambda: experts(sheet), 2),
        ("adapters", lambda: lora(sheet), 4),
        ("Muon's matrices", lambda: muon(sheet), 1),
        ("steps of the optimizers", lambda: optimizers(sheet), 2),
        ("a step in fp16", lambda: loop_in_fp16(sheet), 2),
        ("repeatable steps", lambda: repeatable(sheet), 3),
        ("a checkpoint beside the training", lambda: checkpoint(sheet, place / "checkpoints"), 2),
        ("a group of one process", lambda: group(sheet), 4),
        ("out of memory in a step", lambda: exhausted(sheet), 3),
    ]
    with Commands(sheet, place) as commands, Compilers(sheet) as compilers:
        commands.start()
        compilers.start()
        for name, work, needs in checks:
            sheet.attempt(name, work, needs)
        for name, found in (
            ("killed and continued", commands.continued),
            ("verify", commands.verified),
            ("torchrun", commands.launched),
            ("text of a trained model", commands.text),
            ("refused for want of memory", commands.refused),
            ("the tests that need a GPU", commands.tested),
        ):
            sheet.attempt(name, found, -60)  # what is done is told, though the time be over
        compilers.wait()
