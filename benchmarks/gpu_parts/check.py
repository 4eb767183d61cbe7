"""Whether there is a GPU to measure, before anything else is tried; run as a process, since to ask takes its memory.

Prints one line of JSON: `trouble`, what is wrong and the way out, or null; and `machine`, what the figures belong to.
"""

import json
import os
import platform
import shutil
import subprocess
import warnings
from typing import Any

REHEARSE = "or rehearse on the CPU with --tiny"
FREE = 0.8  # of the card's memory, at least


def trouble() -> str | None:
    """What keeps the GPU from being measured."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}); install it, {REHEARSE} once it is there"
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        return f"torch {torch.__version__} is older than 2.11; install a newer one"
    if torch.version.cuda is None:
        card = " and there is an NVIDIA card here" if shutil.which("nvidia-smi") else ""
        return (
            f"torch {torch.__version__} is built without CUDA{card}; install one for CUDA (pip install torch "
            f"--index-url https://download.pytorch.org/whl/cu130), {REHEARSE}"
        )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        old = next((str(w.message) for w in said if "driver" in str(w.message) and "old" in str(w.message)), None)
        if old:
            return (
                f"the NVIDIA driver is too old for CUDA {torch.version.cuda}: {' '.join(old.split())[:160]}; {REHEARSE}"
            )
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f" that CUDA_VISIBLE_DEVICES={hidden} shows" if hidden is not None else " here"
        return f"no NVIDIA GPU{why}; take a machine with one, {REHEARSE}"
    try:
        free, whole = torch.cuda.mem_get_info()
    except RuntimeError as error:
        return f"the GPU cannot be used: {' '.join(str(error).split())[:160]}; {REHEARSE}"
    if free < FREE * whole:
        name = torch.cuda.get_device_name()
        return (
            f"{(whole - free) / 1e9:.1f} of {whole / 1e9:.1f} GB of {name} are held by another process; end it "
            f"(nvidia-smi names it), or choose another card with CUDA_VISIBLE_DEVICES"
        )
    return None


def machine(tiny: bool) -> str:
    """The machine and the versions, in a line. A rehearsal begins sooner where torch is not loaded for it."""
    from importlib.metadata import version

    from gptworks.core.runtime import cores, cpu_name

    card = "REHEARSAL on the CPU: the shapes are tiny whatever the rows call them, and no figure says anything of a GPU"
    if not tiny:
        import torch

        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.strip() if shutil.which("nvidia-smi") else "?"  # fmt: skip
        memory = torch.cuda.mem_get_info()[1] / 2**30
        card = f"{torch.cuda.get_device_name()}, {memory:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}"
    versions = f"torch {version('torch')}, Python {platform.python_version()}"
    return f"{card}; {versions}; {cores()} cores of {cpu_name()}"


def main(tiny: bool) -> None:
    found: dict[str, Any] = {"trouble": None if tiny else trouble(), "machine": ""}
    if not found["trouble"]:
        found["machine"] = machine(tiny)
    print(json.dumps(found))
