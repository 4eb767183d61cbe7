"""The machine that a run is decided for, as a value: measured here or read from a file."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from gptworks.core import folder, runtime
from gptworks.core.errors import GptworksError, UsageError
from gptworks.core.ranks import ranks
from gptworks.core.registry import nearest

Precision = Literal["fp32", "bf16", "fp16", "fp8"]
# Of the matmul rate, what a step of a model of a million parameters reaches, for forecasts only: on a CPU bf16 units
# wait for the rest, and larger products are faster.
USUAL_UTILISATION: dict[Any, float] = {"cpu": 0.4, "cuda": 0.4, "mps": 0.4, ("cpu", "bf16"): 0.18}
WIDER_IS_FASTER, MOST_UTILISATION = 0.25, 0.6


@dataclass(frozen=True)
class Machine:
    """One of the machines of a run, as far as decisions depend on it. Nothing here changes the process."""

    device: str  # cpu | cuda | mps
    name: str  # of the processor that computes
    threads: int  # that torch would take by itself
    memory: int  # bytes that may still be taken on the device
    matmul: dict[str, float]  # FLOP/s of a large product, by precision
    bf16: bool  # true where hardware multiplies matrices in this format; so the next two
    fp16: bool
    fp8: bool
    compiles: bool  # whether torch.compile has the compilers it needs
    processes: int = 1  # of the run, on all machines
    per_machine: int = 1

    def rate(self, precision: str) -> float:
        """FLOP/s of a large product in a precision; fp8 counts as bf16, in which its models are evaluated. Raises
        UsageError for one that was not measured."""
        wanted = "bf16" if precision == "fp8" else precision
        if wanted not in self.matmul:
            raise UsageError(
                f"machine.matmul has no {wanted}, in which this run would compute: add its FLOP/s as "
                f"matmul.{wanted}, or choose another train.precision"
            )
        return self.matmul[wanted]

    def flops_per_second(self, precision: str, parameters: float) -> float:
        """FLOPs a second that the steps of a model of so many parameters are likely to reach, on all processes."""
        share = USUAL_UTILISATION.get((self.device, precision), USUAL_UTILISATION[self.device])
        if self.device == "cpu":
            share = min(share * (parameters / 1e6) ** WIDER_IS_FASTER, MOST_UTILISATION)
        return share * self.rate(precision) * self.processes

    @property
    def free_memory(self) -> int:
        """Bytes that a process of the run may plan with."""
        return int(self.memory * 0.9) // (self.per_machine if self.device == "cpu" else 1)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> "Machine":
        """The machine that `gptworks env --json` wrote down. Raises UsageError for a file that lacks a value."""
        try:
            folder.check_regular(path)
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (GptworksError, OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path}: cannot read the machine: {error}") from None
        return cls.of(tree.get("machine", tree) if isinstance(tree, dict) else tree, str(path))

    @classmethod
    def of(cls, tree: Any, where: str) -> "Machine":
        """Makes a machine from plain values. Raises UsageError that names the first value that is missing or of another
        kind."""
        if not isinstance(tree, dict):
            raise UsageError(f"{where}: no machine is described there; `gptworks env --json` writes one")
        values: dict[str, Any] = {}
        names = [field.name for field in fields(cls)]
        if unknown := sorted(tree.keys() - set(names)):
            raise UsageError(f"{where}: machine has {unknown[0]!r}: {nearest(unknown[0], names)}")
        for field in fields(cls):
            value = tree.get(field.name)
            if value is None and field.name in ("processes", "per_machine"):
                value = 1
            wanted, fits = _WANTED[field.name if field.name in _WANTED else field.type]
            if not fits(value):
                was = f"is {value!r}" if field.name in tree else "is missing"
                raise UsageError(
                    f"{where}: machine.{field.name} {was}; it has to be {wanted}, as `gptworks env --json` writes it"
                )
            values[field.name] = value
        if values["processes"] % values["per_machine"]:
            raise UsageError(
                f"{where}: machine.processes is {values['processes']}, which machines of {values['per_machine']} "
                "(machine.per_machine) do not make"
            )
        return cls(**values)


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < 2**63  # beyond any of a machine


def _are_rates(value: Any) -> bool:
    known = get_args(Precision)
    return (
        isinstance(value, dict)
        and bool(value)
        and all(name in known and _is_number(rate, int | float) and rate >= 1e6 for name, rate in value.items())
    )


# What a value of a machine has to be, in words and as a check: by its name, or else by its type.
_WANTED: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    "device": ("cpu, cuda or mps", lambda value: value in ("cpu", "cuda", "mps")),
    "matmul": (f"FLOP/s by precision ({', '.join(get_args(Precision))}), each above 1e6", _are_rates),
    int: ("a whole number above 0, without a decimal point", lambda value: _is_number(value, int)),
    str: ("a text on one line", lambda value: isinstance(value, str) and value.isprintable()),
    bool: ("true or false", lambda value: isinstance(value, bool)),
}


def usual_precision(bf16: bool, fp16: bool) -> Precision:
    """The precision that a run computes in where nothing else is asked."""
    return "bf16" if bf16 else "fp16" if fp16 else "fp32"


def here(precision: str = "auto", threads: int | None = None) -> Machine:
    """This machine. Its matmul rate is measured, in the precision that a run asks for, with that many threads."""
    import torch

    device = runtime.device()
    usual = runtime.usual_threads()
    if ranks.world > 1:  # torchrun sets OMP_NUM_THREADS=1, which says nothing about the machine
        usual = max(runtime.cores() // ranks.per_machine, 1)
    torch.set_num_threads(threads or usual)
    bf16, fp16 = runtime.has_bf16(device), runtime.has_fp16(device)
    measured = "bf16" if precision == "fp8" else precision
    if precision == "auto" or (precision == "fp16" and not fp16):  # which is refused: its products would take seconds
        measured = usual_precision(bf16, fp16)
    return Machine(
        device=device.type,
        name=torch.cuda.get_device_name() if device.type == "cuda" else runtime.cpu_name(),
        threads=usual,
        memory=runtime.available_memory(device),
        matmul={measured: runtime.matmul_rate(device, runtime.dtype_of(measured))},
        bf16=bf16,
        fp16=fp16,
        fp8=runtime.has_float8(device),
        compiles=runtime.can_compile(device),
        processes=ranks.world,
        per_machine=ranks.per_machine,
    )
