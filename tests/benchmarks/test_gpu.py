"""The GPU command without a GPU: what it says then, that a part cannot stop the next, and a short rehearsal."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMAND = [sys.executable, str(BENCHMARKS / "gpu.py")]


@pytest.fixture(autouse=True)
def found_here(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(0)


def rows(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_one_line_that_names_the_rehearsal(tmp_path):
    done = subprocess.run([*COMMAND, "--out", str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 64 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "--tiny" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["a file", "a file/below"])
def test_an_out_that_cannot_be_written_is_one_line(place, tmp_path):
    (tmp_path / "a file").write_text("mine")
    done = subprocess.run([*COMMAND, "--tiny", "--out", str(tmp_path / place)], capture_output=True, text=True)
    assert done.returncode == 74 and done.stderr.startswith("error: --out ") and done.stderr.count("\n") == 1
    assert (tmp_path / "a file").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_stopped_leaves_no_process_and_has_its_summary(number, tmp_path):
    command = [*COMMAND, "--tiny", "--only", "loss", "decode", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=interruptible)
    assert process.stdout
    for line in process.stdout:
        if line.startswith("== loss"):
            break
    time.sleep(1)
    process.send_signal(number)
    assert process.wait(30) == 75
    assert "stopped" in (tmp_path / "summary.md").read_text()
    process.stdout.close()
    time.sleep(0.5)
    running = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if _readable(p)]
    assert not any(str(tmp_path).encode() in line for line in running)


def interruptible():
    """Ctrl-C counts, also where whoever runs the tests in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _readable(path):
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


@pytest.mark.parametrize(
    "version, cuda, available, warning, free, says",
    [
        ("2.10.1", "12.8", True, "", 80, "older than 2.11"),
        ("2.13.0+cpu", None, False, "", 80, "without CUDA"),
        ("2.13.0", "13.0", False, "The NVIDIA driver on your system is too old (found version 11040)", 80, "too old"),
        ("2.13.0", "13.0", False, "", 80, "no NVIDIA GPU here"),
        ("2.13.0", "13.0", True, "", 50, "held by another process"),
        ("2.11.0+cu130", "13.0", True, "", 79, None),
    ],
)
def test_each_thing_that_stands_against_a_measurement_has_its_line(
    version, cuda, available, warning, free, says, monkeypatch
):
    import warnings

    from gpu_parts import check

    def is_available():
        if warning:
            warnings.warn(warning, stacklevel=1)
        return available

    here = SimpleNamespace(
        is_available=is_available, mem_get_info=lambda: (free * 10**9, 80 * 10**9), get_device_name=lambda: "a card"
    )
    fake = SimpleNamespace(__version__=version, version=SimpleNamespace(cuda=cuda), cuda=here)
    monkeypatch.setitem(sys.modules, "torch", fake)
    found = check.trouble()
    assert (found is None) if says is None else (says in found and "\n" not in found)


def test_a_part_that_hangs_or_fails_is_a_row_and_no_more(tmp_path, monkeypatch):
    import gpu

    monkeypatch.setitem(gpu.PARTS, "nonsense", (5, "a part that there is not"))
    gpu.begin("choices", tmp_path, 0.3, True)
    gpu.begin("nonsense", tmp_path, 30, True)
    late, failed = rows(tmp_path)
    assert late["verdict"] == "not measured" and "0 s" in late["value"]
    assert failed["verdict"] == "FAILED" and "exit code 2" in failed["value"] and failed["facts"]["trace"]


def test_half_a_line_of_a_killed_part_costs_that_line_alone(tmp_path):
    import gpu

    (tmp_path / "rows.jsonl").write_text('{"part": "fast", "na')
    gpu.note(tmp_path, "fast", "killed")
    assert [row["value"] for row in gpu.read(tmp_path)] == ["killed"]
    assert "killed" in gpu.summary(tmp_path, "a machine")


def test_nothing_measured_is_not_success_and_a_reader_who_has_seen_enough_is_no_crash(tmp_path):
    command = [*COMMAND, "--tiny", "--only", "choices", "--minutes", "0", "--out", str(tmp_path)]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 1
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 74 and done.stderr.count("\n") == 1


def test_the_summary_has_what_is_wrong_first_and_at_most_eighty_lines(tmp_path):
    import gpu
    from gpu_parts.sheet import Sheet

    sheet = Sheet(tmp_path, "fast", 10, True)
    for number in range(100):
        sheet.row(f"figure {number}", "1 | 2")
    sheet.check("an error", float("nan"), 1.0)
    sheet.attempt("a mistake", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    sheet.attempt("a long one", lambda: None, needs=10**6)
    text = gpu.summary(tmp_path, "a machine")
    lines = text.splitlines()
    assert len(lines) == 80 and lines[0] == "a machine"
    assert {line.split("|")[-2].strip() for line in lines[6:8]} == {"WRONG", "FAILED"}
    assert "rows more" in lines[-1] and "1 / 2" in lines[8]
    assert rows(tmp_path)[-1]["verdict"] == "not measured"


def test_a_rehearsal_of_the_parts_finds_nothing_wrong(tmp_path, monkeypatch):
    """A short form: without peers, whole commands and compilers. `make test-slow` has all of it."""
    from gpu_parts import choices, decode, fast, memory
    from gpu_parts.sheet import Missing, Sheet

    def none(*_):
        raise Missing("not in this test")

    monkeypatch.setattr(decode, "transformers", none)
    monkeypatch.setattr(fast.Fast, "transformers", none)
    monkeypatch.setattr(fast.Fast, "profile", none)
    for name, part in {"fast": fast, "decode": decode, "memory": memory, "choices": choices}.items():
        part.run(Sheet(tmp_path, name, 60, True))
    found = rows(tmp_path)
    assert {row["part"] for row in found} == {"fast", "decode", "memory", "choices"}
    assert [row for row in found if row["verdict"] in ("WRONG", "FAILED")] == []
    missing = [row["value"] for row in found if row["verdict"] == "not measured"]
    assert set(missing) == {"not in this test"}


def test_a_rehearsal_of_what_is_right_finds_nothing_wrong(tmp_path):
    from gpu_parts import right_compiled, right_paths, right_runs
    from gpu_parts.sheet import Sheet

    sheet = Sheet(tmp_path, "right", 60, True)
    checks = (right_paths.families, right_paths.experts, right_paths.optimizers, right_compiled.loop_in_fp16)
    for check in (*checks, right_runs.exhausted):
        check(sheet)
    assert len(rows(tmp_path)) > 9 and {row["verdict"] for row in rows(tmp_path)} == {"right"}


@pytest.mark.slow
def test_the_whole_rehearsal_finds_nothing_wrong(tmp_path):
    done = subprocess.run([*COMMAND, "--tiny", "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert {row["part"] for row in rows(tmp_path)} == {"right", "fast", "loss", "decode", "memory", "choices"}
