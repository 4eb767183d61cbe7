"""The process and the machine: device, precision, threads, seeds, memory, signals, the clock."""

import ctypes
import errno
import fcntl
import os
import platform
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gptworks.core.errors import Preempted, RunMismatch, StorageError, UsageError
from gptworks.core.folder import NO_SUCH_CALL
from gptworks.core.log import console

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_imported = time.time()
_begun = 0.0  # the process's age when the stage at hand began
LIBRARY = ctypes.CDLL(None)  # C's


def process_seconds() -> float:
    """Seconds since this process was started, the interpreter's own start included (Linux; else since import); in a
    process that does one thing after another, since `restart_clock`. A time budget counts these."""
    return _age() - _begun


def fine_clock() -> Callable[[], float]:
    """A clock that gives `process_seconds` from now on, and tells a millisecond from the next."""
    begun, offset = time.perf_counter(), process_seconds()
    return lambda: offset + time.perf_counter() - begun


def restart_clock() -> None:
    global _begun
    _begun = _age()


def _age() -> float:
    try:
        started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - started
    except (OSError, ValueError, IndexError):
        return time.time() - _imported


def device() -> "torch.device":
    """The best device here: CUDA, then Apple's MPS, then the CPU."""
    import torch

    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UsageError(f"process {local} of this machine has no GPU of its own: {torch.cuda.device_count()} here")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def has_bf16(device: "torch.device") -> bool:
    """True where the processor multiplies bf16 matrices in hardware, so that bf16 is faster than fp32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        flags = cpu_flags()
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def has_fp16(device: "torch.device") -> bool:
    """True where the processor multiplies fp16 matrices in hardware (Volta and later)."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def has_float8(device: "torch.device") -> bool:
    """True where the processor multiplies float8 matrices in hardware."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def usual_threads() -> int:
    """The threads that torch takes by itself, asked before a run of this process takes another number."""
    import torch

    return torch.get_num_threads()


def can_compile(device: "torch.device") -> bool:
    """True where torch.compile has what it needs: a C++ compiler for a CPU's kernels; for a GPU's, Triton and a C
    compiler that builds their launchers."""
    if device.type == "cuda":
        compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
        return find_spec("triton") is not None and any(shutil.which(name) for name in compilers if name)
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def dtype_of(precision: str) -> "torch.dtype":
    """The type of the values in the passes of a run."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)


_visit = threading.local()  # .undo: an ExitStack of what the call at hand has changed in its host, if there is one


@contextmanager
def guest(quiet: bool) -> Iterator[None]:
    """Leaves the process as it was, for a stage that is called in somebody's Python; `quiet` holds for that stage.

    While the block runs, torch makes what it makes by default: float32, on the CPU, with gradients. All this is of the
    thread that calls, the default type excepted; what a run changes besides is put back where one began (`apply`).
    """
    import torch

    with ExitStack() as undo:
        undo.callback(setattr, _visit, "undo", getattr(_visit, "undo", None))
        _visit.undo = undo
        undo.callback(vars(console).update, quiet=console.quiet, muted=console.muted)
        console.quiet = quiet or console.quiet
        usual_threads.cache_clear()  # the host may have set another number since
        undo.callback(_set_threads, torch.get_num_threads())
        if torch.is_inference_mode_enabled():
            undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                undo.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            undo.enter_context(torch.device("cpu"))
        if torch.get_default_dtype() != torch.float32:
            undo.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        yield


def _set_threads(number: int) -> None:
    import torch

    if torch.get_num_threads() != number:
        torch.set_num_threads(number)


def _put_back_later(undo: ExitStack) -> None:
    """Notes what a run changes in its process, to be put back when the call that it runs in ends."""
    import numpy
    import torch
    from torch.utils import deterministic

    undo.enter_context(warnings.catch_warnings())
    undo.callback(_restore_environment, dict(os.environ))
    undo.callback(random.setstate, random.getstate())
    undo.callback(numpy.random.set_state, numpy.random.get_state())
    undo.callback(torch.set_rng_state, torch.get_rng_state())
    undo.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
    undo.callback(_set_compiler, getattr(sys.modules.get(_COMPILER), "deterministic", False))
    fills = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    undo.callback(setattr, deterministic, "fill_uninitialized_memory", fills)
    undo.callback(torch.set_flush_denormal, sys.float_info.min / 2 == 0)
    undo.callback(_usual_memory)


_COMPILER = "torch._inductor.config"  # three seconds to import


def _set_compiler(deterministic: bool) -> None:
    if _COMPILER in sys.modules:
        sys.modules[_COMPILER].deterministic = deterministic  # type: ignore[attr-defined]


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def apply(device: "torch.device", threads: int, deterministic: bool, compiles: bool) -> None:
    """Makes this process one of a run: its threads, its kernels, its memory. All that a run changes in a process."""
    import torch

    if undo := getattr(_visit, "undo", None):
        _put_back_later(undo)
    torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or products there differ from run to run
    torch.set_deterministic_debug_mode("default" if not deterministic else "error" if device.type == "cpu" else "warn")
    if deterministic and compiles:  # it imports the compiler, three seconds
        torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_flush_denormal(True)
    if device.type == "cpu":
        reuse_memory()


def available_memory(device: "torch.device") -> int:
    """Bytes we may still take on `device`: free memory, or what the container's limit leaves."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    except OSError:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        maximum = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if maximum != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
            limits.append(int(maximum) - used + int(stat.get("inactive_file", 0)))  # the page cache gives way
    except (OSError, ValueError):
        pass
    import resource

    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            used = 0
        limits.append(max(address_space - used, 0))
    return max(min(limits), 0)


def reuse_memory() -> None:
    """Has the C library keep the memory that tensors leave, for the next ones (glibc; elsewhere nothing happens).

    By default large blocks go back to the system, which clears every page of them again at the next step.
    """
    _mallopt(trim=2**31 - 1, mmap=32 << 20)  # the most that each takes


@contextmanager
def returning_memory() -> Iterator[None]:
    """The opposite while the block runs: what a tensor leaves goes back at once, and no holes stay between those that
    come and those that go. Afterwards it is about as glibc has it by itself once large blocks were in use."""
    _mallopt(trim=2**17, mmap=2**20)
    try:
        yield
    finally:
        _usual_memory()


def _usual_memory() -> None:
    _mallopt(trim=64 << 20, mmap=32 << 20)


def _mallopt(trim: int, mmap: int) -> None:
    trim_threshold, mmap_threshold = -1, -3  # of mallopt(3)
    mallopt = getattr(LIBRARY, "mallopt", None)
    if mallopt:
        mallopt(trim_threshold, trim)
        mallopt(mmap_threshold, mmap)


def peak_memory() -> int:
    """The largest resident size of this process so far, bytes."""
    import resource

    try:  # ru_maxrss starts at what the parent process held
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory() -> int | None:
    """The most that tensors took on this process's GPU so far, bytes; None without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


@cache
def matmul_rate(device: "torch.device", dtype: "torch.dtype", seconds: float = 0.25) -> float:
    """FLOP/s of the best of two square matmuls here, the yardstick for model FLOPs utilisation; measured once."""
    import torch

    def wait() -> None:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    best, generator = 0.0, torch.Generator(device).manual_seed(0)
    for size in (4096, 8192) if device.type == "cuda" else (512, 1024):
        a = torch.randn(size, size, device=device, generator=generator).to(dtype)  # zeros or ones would be faster
        for _ in range(2):
            a @ a
        wait()
        start, repeats = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds / 2:
            a @ a
            wait()
            repeats += 1
        best = max(best, 2 * size**3 * repeats / elapsed)
    return best


def mix(*numbers: int) -> int:
    """One well-mixed 63-bit seed out of several integers (splitmix64), the same on every platform."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 31) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 29
    return state >> 1


def seed_everything(*numbers: int) -> None:
    """Re-seeds every random generator a step may draw from, as a function of `numbers` alone.

    Called with (seed, step, micro-batch) before each forward pass, so that random state never has to be stored:
    a step's dropout masks are the same in a straight run, after a resume and in a replay.
    """
    import numpy
    import torch

    seed = mix(*numbers)
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    if torch.accelerator.is_available():  # else it would take 3 ms, a tenth of a small model's step
        torch.manual_seed(seed)


@cache
def versions() -> dict[str, str]:
    """Versions and hardware that a bug report needs and a checkpoint records."""
    from importlib.metadata import PackageNotFoundError, version

    known = {"python": platform.python_version(), "platform": platform.platform(), "cpu": cpu_name()}
    for package in ("gptworks", "torch", "numpy", "tokenizers", "safetensors", "gigatoken", "transformers"):
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "not installed"
    return known


class Interrupts:
    """SIGTERM and Ctrl-C become a request that phases poll; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._apart: threading.Thread | None = None  # the last one

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the block runs, in the main thread; afterwards signals do what they did before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: Any) -> None:
            if self.requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.requested = signal.Signals(number).name

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)
            self.requested = None

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """While the block runs, SIGTERM ends it at once with Preempted; `listening` within it comes first."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: Any) -> None:
            raise Preempted("stopped by SIGTERM; run the same command again")

        before = signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def check(self) -> None:
        """Leaves a phase that has nothing to save; the same command starts the phase again."""
        if self.requested:
            raise Preempted(f"stopped by {self.requested}; run the same command again")

    def apart(self, work: Callable[[], T]) -> T:
        """Does work of a library that hears no signals, in a thread of its own, and leaves it there when one comes."""
        done: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                done.append(work())
            except BaseException as error:  # a panic of Rust is no Exception
                errors.append(error)

        self._apart = thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            self.check()
        if errors:
            raise errors[0]
        return done[0]

    def left_behind(self) -> bool:
        """True while a thread of `apart` goes on that nobody waits for; Python cannot end in good order beside it."""
        return self._apart is not None and self._apart.is_alive()


interrupts = Interrupts()


@contextmanager
def hold(folder: Path, reading: bool = False) -> Iterator[None]:
    """Keeps every other process out of a run folder while the block runs (released even by kill -9); with `reading`,
    those that write, and the folder itself may be read-only. Raises RunMismatch and StorageError.

    A file system that has no locks keeps nobody out: a warning says so.
    """
    lock, advice = folder / ".lock", "verify a copy of it" if reading else "choose another --out"
    try:
        if folder.exists() and not folder.is_dir():
            raise StorageError(f"{folder}: is a file, and a run is a folder: {advice}")
        folder.mkdir(parents=True, exist_ok=True)
        own = not lock.exists() or os.access(lock, os.W_OK)  # or it is another person's, and may be locked all the same
        handle = open(lock, "a+" if own and not (reading and lock.exists()) else "r")  # noqa: SIM115
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}: {advice}") from error
    with handle:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if reading else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            otherwise = "" if reading else ", or choose another --out"
            raise RunMismatch(f"{folder}: another process is working on this run; wait for it{otherwise}") from None
        except OSError as error:
            if error.errno not in NO_SUCH_CALL | {errno.ENOLCK}:
                raise StorageError(f"{folder}: cannot be locked: {error.strerror}: {advice}") from error
            console.warn(f"{folder}: cannot be locked ({error.strerror}): see that no other process works on this run")
        yield
