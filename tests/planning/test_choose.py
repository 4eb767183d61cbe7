"""Every decision before step one, on values alone: no model, no text, no clock."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch

from gptworks import lifecycle
from gptworks.core import config as configuration
from gptworks.core import runtime
from gptworks.core.config import Config, RunFile
from gptworks.core.errors import DataError, OutOfMemory, UsageError
from gptworks.model.config import parameter_count
from gptworks.planning.choices import Base, Facts, Measured
from gptworks.planning.choose import choose, useful_rows
from gptworks.planning.cost import step_memory
from gptworks.planning.machine import Machine, here

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FACTS = Facts(vocab_size=32, epoch_tokens=10**6)
GPU = replace(tiny.MACHINE, device="cuda", name="a GPU", memory=80 * 10**9, matmul={"bf16": 7e14}, bf16=True, fp16=True)


def asked(**train) -> Config:
    usual = {"context": 32, "batch_tokens": 1024, "max_steps": 100, "threads": 1}
    return Config.model_validate({"model": SHAPE, "train": {**usual, **train}})


def with_room(rows: float) -> Machine:
    """A machine whose memory holds so many rows of a step."""
    memory = step_memory(choose(asked(), FACTS, tiny.MACHINE).architecture, 32, "muon", 4)
    return replace(tiny.MACHINE, memory=int((memory.fixed + rows * memory.row) / 0.9))


@pytest.mark.parametrize("rows, fitting, expected", [(512, 125, 64), (8, 8, 8), (7, 4, 4), (12, 5, 4), (13, 12, 7)])
def test_micro_batches_are_of_one_size_if_that_takes_less_than_twice_as_many(rows, fitting, expected, monkeypatch):
    monkeypatch.setitem(choose.__globals__["PASS_TOKENS"], "cpu", 10**6)
    choices = choose(asked(batch_tokens=32 * rows), FACTS, with_room(fitting + 0.5))
    assert choices.config.train.micro_batch == expected


@pytest.mark.parametrize("threads, workers, rows", [(1, 1, 4), (2, 1, 8), (2, 2, 4), (8, 2, 16)])
def test_a_forward_pass_on_a_processor_has_a_thousand_tokens_a_thread(threads, workers, rows):
    assert useful_rows("cpu", 1000, 256, threads, workers) == rows
    assert useful_rows("cpu", 3, 256, threads, 1) == 3
    assert useful_rows("cpu", 3, 10**6, threads, workers) == 1


def test_an_impossible_step_names_what_fits():
    with pytest.raises(OutOfMemory, match=r"train.micro_batch=5 fits") as refused:
        choose(asked(micro_batch=32), FACTS, with_room(5.5))
    assert refused.value.code == 77
    with pytest.raises(OutOfMemory, match="train.context=16 fits"):
        choose(asked(context=64, batch_tokens=2048), FACTS, with_room(0.6))
    with pytest.raises(OutOfMemory, match="smaller model"):
        choose(asked(), FACTS, replace(tiny.MACHINE, memory=1000))


def test_rows_that_belong_together_make_up_micro_batches():
    pairs = replace(FACTS, unit=2)
    for rows in (2, 6, 14, 32, 50):
        assert choose(asked(batch_tokens=32 * rows), pairs, tiny.MACHINE).config.train.micro_batch % 2 == 0
    with pytest.raises(UsageError, match="2 rows belong together"):
        choose(asked(micro_batch=3), pairs, tiny.MACHINE)
    with pytest.raises(OutOfMemory, match="2 rows need about"):
        choose(asked(), pairs, with_room(1.5))


def test_a_second_model_takes_its_part_of_the_memory():
    machine = with_room(20.5)
    alone = choose(asked(micro_batch=20), FACTS, machine)
    assert alone.config.train.micro_batch == 20
    with pytest.raises(OutOfMemory, match="fits"):
        choose(asked(micro_batch=20), replace(FACTS, beside_bytes=10**6), machine)


def test_precision_is_what_the_processor_multiplies_in_hardware():
    for bf16, fp16, chosen in ((True, True, "bf16"), (False, True, "fp16"), (False, False, "fp32")):
        machine = replace(tiny.MACHINE, bf16=bf16, fp16=fp16, matmul={"bf16": 1e12, "fp16": 1e12, "fp32": 1e11})
        assert choose(asked(), FACTS, machine).config.train.precision == chosen
    with pytest.raises(UsageError, match="no units for it; use auto"):
        choose(asked(precision="fp16"), FACTS, tiny.MACHINE)
    with pytest.raises(UsageError, match="no float8 units"):
        choose(asked(precision="fp8"), FACTS, tiny.MACHINE)
    assert "slower than with fp32" in choose(asked(precision="bf16"), FACTS, tiny.MACHINE).warnings[0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"reduce": "canonical"}, "adds up in one order"), ({"compile": True}, "is compiled"),
     ({"workers": 3}, "more than train.threads=2")],
    ids=str,
)  # fmt: skip
def test_what_keeps_a_step_whole_refuses_workers(settings, reason):
    with pytest.raises(UsageError, match=reason):
        choose(asked(**{"threads": 2, "workers": 2} | settings), FACTS, tiny.MACHINE)


def test_dropout_keeps_a_step_whole_that_of_an_adapter_too():
    config = asked(threads=2, batch_tokens=2048)
    assert choose(config, FACTS, tiny.MACHINE).config.train.workers == 2
    dropped = Config.model_validate({"model": {**SHAPE, "dropout": 0.1}, "train": config.train.model_dump()})
    assert choose(dropped, FACTS, tiny.MACHINE).config.train.workers == 1
    base = replace(FACTS, base=Base("a model", tiny.shape()))
    for dropout, workers in ((0.0, 2), (0.1, 1)):
        adapted = configuration.load(None, ["model=base", "adapter=lora", f"adapter.dropout={dropout}",
                                            "train.threads=2", "train.context=32", "train.batch_tokens=2048",
                                            "train.max_steps=9"])  # fmt: skip
        assert choose(adapted, base, tiny.MACHINE).config.train.workers == workers


def test_threads_and_processes_that_help_nothing_are_warned_of():
    many = choose(asked(threads=1000), FACTS, tiny.MACHINE).warnings
    assert any("train.threads=1000: this machine computes with" in said for said in many)
    cluster = replace(tiny.MACHINE, processes=1000, per_machine=8)
    said = choose(asked(), FACTS, cluster).warnings
    assert any("are 32 rows for 1000 processes: some will have none" in each for each in said)
    assert not choose(asked(threads=tiny.MACHINE.threads), FACTS, tiny.MACHINE).warnings


def test_memory_that_is_short_is_told_in_units_that_can_be_read():
    with pytest.raises(OutOfMemory, match=r"needs about [\d.]+ MB and 900 bytes are free"):
        choose(asked(), FACTS, replace(tiny.MACHINE, memory=1000))


def test_threads_of_a_machine_are_shared_by_its_processes():
    shared = replace(tiny.MACHINE, threads=4, processes=8, per_machine=2)
    choices = choose(asked(threads=None), FACTS, shared)
    assert choices.config.train.threads == 4 and "shared by 2 processes" in choices.reasons["train.threads"]


def test_what_needs_text_or_timing_stays_open_and_says_so():
    choices = choose(asked(max_steps=None, batch_tokens=None), Facts(), tiny.MACHINE)
    assert "model.num_hidden_layers" in choices.open
    unread = choose(asked(max_steps=None, batch_tokens=None), Facts(vocab_size=32), tiny.MACHINE)
    assert {
        "train.batch_tokens",
        "train.max_tokens",
        "train.max_steps",
        "train.micro_batch",
        "train.eval_every",
    } <= set(unread.open)
    with pytest.raises(UsageError, match="is open"):
        _ = unread.chosen
    timed = choose(asked(max_steps=None, time_budget_s=100), FACTS, tiny.MACHINE)
    assert set(timed.open) == {
        "train.max_steps", "train.eval_every", "train.log_every", "train.checkpoint_every", "train.compile",
    }  # fmt: skip
    measured = replace(FACTS, measured=Measured(None, step_seconds=0.1, eval_seconds=2.0, left_seconds=90.0))
    done = choose(asked(max_steps=None, time_budget_s=100), measured, tiny.MACHINE)
    left = 90 - 1.5 - 3 * 2.0 - 2.2  # of 98.5: what the end is kept before, three evaluations on the way, the finish
    assert not done.open and abs(done.chosen.train.max_steps - left / 0.1) <= 1


def test_the_smallest_limit_counts():
    measured = replace(FACTS, measured=Measured(rows=31250))
    for limits, steps in (
        ({"max_steps": 7, "max_tokens": 10**6, "max_epochs": 50}, 7),
        ({"max_steps": None, "max_tokens": 5000}, 4),
        ({"max_steps": None, "max_epochs": 2}, 977),
    ):
        assert choose(asked(**limits), measured, tiny.MACHINE).chosen.train.max_steps == steps
    full = choose(asked(max_steps=None, batch_tokens="full", max_epochs=3.0), measured, tiny.MACHINE)
    assert full.chosen.train.max_steps == 3


def test_the_smaller_of_steps_and_a_budget_holds_and_is_said():
    measured = replace(FACTS, measured=Measured(None, step_seconds=0.1, eval_seconds=2.0, left_seconds=90.0))
    for steps, holds, says in (
        (60, 60, "60 steps, within train.time_budget_s=100"),
        (5000, 802, "1 min 30 s of 100 s left, 100 ms a step; fewer than train.max_steps=5000"),
    ):
        choices = choose(asked(max_steps=steps, time_budget_s=100), measured, tiny.MACHINE)
        assert choices.chosen.train.max_steps == holds and choices.reasons["train.max_steps"] == says
    by_tokens = choose(asked(max_steps=None, max_tokens=2048, time_budget_s=100), measured, tiny.MACHINE)
    assert by_tokens.reasons["train.max_steps"] == "train.max_tokens=2048, within train.time_budget_s=100"


def test_a_number_of_tokens_is_of_those_that_are_trained_on_and_padding_is_said():
    for fill, steps, padding in ((0.52, 187, "; 48% padding"), (0.995, 97, "")):
        facts = replace(FACTS, measured=Measured(fill=fill))
        choices = choose(asked(max_steps=None, max_tokens=100_000), facts, tiny.MACHINE)
        assert choices.chosen.train.max_steps == steps
        assert choices.reasons["train.max_steps"] == f"train.max_tokens=100000{padding}"


def test_evaluations_that_nobody_asked_for_take_a_twelfth_of_a_run_at_most():
    """A third of what training on as many tokens costs; 100 steps of 1,024 tokens."""
    for tokens, every, says in (
        (1_000, 10, "10 evaluations, 3 % of the run"),
        (8_000, 34, "3 evaluations, 7 % of the run"),
        (300, 10, "10 evaluations, less than 1 % of the run"),
        (200_000, 100, "one evaluation, at the end, 39 % of the run"),
    ):
        choices = choose(asked(), replace(FACTS, eval_tokens=tokens), tiny.MACHINE)
        assert (choices.config.train.eval_every, choices.reasons["train.eval_every"]) == (every, says)
    large = replace(FACTS, eval_tokens=200_000)
    assert choose(asked(eval_every=3), large, tiny.MACHINE).config.train.eval_every == 3
    for ends in ({"patience": 2}, {"target_loss": 1.0}):  # by its evaluations
        assert choose(asked(**ends), large, tiny.MACHINE).config.train.eval_every == 10


def test_a_budget_that_is_used_up_is_refused():
    late = replace(FACTS, measured=Measured(None, step_seconds=1.0, eval_seconds=0.1, left_seconds=1.5))
    with pytest.raises(
        UsageError, match="went into preparation, a step takes 1,000 ms .* the same command may do; else give more time"
    ):
        choose(asked(max_steps=None, time_budget_s=10), late, tiny.MACHINE)


def test_compiling_pays_on_a_gpu_for_a_long_run_alone():
    large = {"model": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}}
    train = {"context": 1024, "batch_tokens": 524288}
    for steps, compiles in ((5, False), (5000, True)):
        config = Config.model_validate({**large, "train": {**train, "max_steps": steps}})
        assert choose(config, replace(FACTS, vocab_size=50304), GPU).config.train.compile is compiles
    with pytest.raises(UsageError, match="needs Triton and a C compiler"):
        choose(asked(compile=True), FACTS, replace(GPU, compiles=False))


def test_an_adapter_goes_on_with_the_settings_it_was_begun_with():
    begun = configuration.Adapter(kind="lora", rank=4, alpha=8.0, base="bf16")
    facts = replace(FACTS, base=Base("an adapter", tiny.shape(), begun))
    overrides = ["model=x", "adapter=lora", "train.context=32", "train.batch_tokens=1024", "train.max_steps=9"]
    choices = choose(configuration.load(None, overrides), facts, tiny.MACHINE)
    assert choices.config.adapter.rank == 4 and choices.reasons["adapter.rank"] == "the adapter's"
    assert choices.trainable.added == choices.trainable.trained > 0
    with pytest.raises(UsageError, match="adapter.rank=8: an adapter was begun with 4"):
        choose(configuration.load(None, [*overrides, "adapter.rank=8"]), facts, tiny.MACHINE)


PURE = """
import os, sys
from gptworks.core.config import Config
from gptworks.planning.choices import Facts, Measured
from gptworks.planning.choose import choose
from gptworks.planning.machine import Machine
assert "torch" not in sys.modules
import torch
def forbidden(*arguments, **options): raise AssertionError("the process was touched")
torch.set_num_threads = torch.set_flush_denormal = torch.use_deterministic_algorithms = forbidden
torch.set_deterministic_debug_mode = torch.nn.Module.__init__ = torch.manual_seed = forbidden
before = dict(os.environ)
machine = Machine.of({machine}, "here")
facts = Facts(vocab_size=5000, epoch_tokens=10**7, measured=Measured(10**5, 0.01, 0.2, 100.0))
for keys in ({{}}, {{"time_budget_s": 120}}, {{"reduce": "canonical"}}, {{"deterministic": True, "compile": True}}):
    choices = choose(Config.model_validate({{"train": keys}}), facts, machine)
    assert choices.chosen.train.max_steps and choices.reasons["train.max_steps"] and not choices.open
assert dict(os.environ) == before
print("pure")
"""


def test_choosing_touches_nothing_of_the_process_and_loads_no_torch():
    script = PURE.format(machine=repr(tiny.MACHINE.as_dict()))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "pure\n", done.stderr


@pytest.mark.parametrize("recipe", configuration.recipe_names())
def test_what_a_run_keeps_gives_its_choices_again(recipe, tmp_path, tiny_text):
    """Facts and machine are read back from plain values, as choices.json has them."""
    values = {"data.train": str(tiny_text), "model.path": None} if recipe != "lora" else {"data.train": str(tiny_text)}
    config = configuration.load(recipe, values)
    base = Base("a model", tiny.shape()) if recipe == "lora" else None
    measured = Measured(31250, 0.0123, 0.456, 78.9)
    facts = Facts(vocab_size=1024, epoch_tokens=10**6, base=base, measured=measured)
    machine = replace(tiny.MACHINE, memory=64 * 10**9)
    first = choose(config, facts, machine)
    kept = json.loads(json.dumps({"facts": facts.as_dict(), "machine": machine.as_dict()}))
    again = choose(config, Facts.of(kept["facts"]), Machine.of(kept["machine"], "kept"))
    assert again.chosen == first.chosen and again.reasons == first.reasons


def test_a_finished_run_keeps_what_it_was_decided_from(finished_run):
    kept = json.loads((finished_run / "choices.json").read_text())
    file = RunFile.read(finished_run / "config.yaml")
    choices = choose(file.asked, Facts.of(kept["facts"]), Machine.of(kept["machine"], "choices.json"))
    assert choices.chosen == file.chosen and choices.reasons == file.reasons


@pytest.mark.parametrize("damage", [{"vocab_size": "x", "more": 1}, {"base": {}}, {"measured": {"rows": 1, "x": 2}}])
def test_facts_that_are_none_are_refused(damage):
    with pytest.raises(DataError, match="not the facts of a run"):
        Facts.of({**FACTS.as_dict(), **damage})


@pytest.mark.parametrize("key", ["memory", "threads", "matmul", "device", "bf16"])
@pytest.mark.parametrize("value", [None, "much", -1, {}])
def test_a_machine_file_that_lacks_a_number_is_refused_by_its_name(key, value, tmp_path):
    tree = {**tiny.MACHINE.as_dict(), key: value}
    if key == "device" and value == "much":
        value = tree[key] = 3
    (tmp_path / "machine.json").write_text(json.dumps({"machine": tree}))
    with pytest.raises(UsageError, match=f"machine.json: machine.{key}"):
        Machine.read(tmp_path / "machine.json")


def test_a_dry_run_decides_for_the_machine_of_a_file(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({"machine": GPU.as_dict()}))
    choices, expected = lifecycle.choices(configuration.load("gpt2_124m"), path)
    assert expected is None  # there is no text yet
    assert choices.config.train.precision == "bf16" and choices.config.train.micro_batch > 8
    assert "train.max_steps" in choices.open


def test_a_machine_file_names_what_is_wrong_and_what_is_known():
    good = tiny.MACHINE.as_dict()
    assert Machine.of(good, "m.json") == tiny.MACHINE
    for change, says in (
        ({"threads": -2}, r"machine.threads is -2; it has to be a whole number above 0"),
        ({"device": 3}, r"machine.device is 3; it has to be cpu, cuda or mps"),
        ({"memory": 10**400}, r"machine.memory is 1000"),
        ({"device": "tpu"}, r"machine.device is 'tpu'; it has to be cpu, cuda or mps"),
        ({"matmul": {"bf16": float("inf")}}, r"machine.matmul is .*; it has to be FLOP/s by precision"),
        ({"matmul": {"bf16": 10**400}}, r"machine.matmul is .*; it has to be FLOP/s by precision"),
        ({"matmul": {"bf16": True}}, r"machine.matmul is .*; it has to be FLOP/s by precision"),
        ({"processes": 2, "per_machine": 4}, r"machine.processes is 2, which machines of 4 .* do not make"),
        ({"bf16": "yes"}, r"machine.bf16 is 'yes'; it has to be true or false"),
        ({"thread": 4}, r"machine has 'thread': .*threads"),
    ):
        with pytest.raises(UsageError, match=says):
            Machine.of(good | change, "m.json")
    with pytest.raises(UsageError, match=r"machine.memory is missing"):
        Machine.of({name: value for name, value in good.items() if name != "memory"}, "m.json")


def test_a_machine_that_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe: not a regular file"):
        Machine.read(tmp_path / "pipe")


def test_a_machine_file_without_a_mapping_says_so(tmp_path):
    (tmp_path / "m.json").write_text("[]")
    with pytest.raises(UsageError, match=r"m\.json: no machine is described there"):
        Machine.read(tmp_path / "m.json")


def test_a_machine_file_that_never_ends_is_refused(tmp_path):
    (tmp_path / "m.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"m\.json: cannot read the machine"):
        Machine.read(tmp_path / "m.json")


@pytest.mark.parametrize(("steps", "every", "said"), [(3, 1, "3 eval"), (12, 2, "6 eval"), (1000, 100, "10 eval")])
def test_the_reason_tells_how_many_evaluations_there_will_be(steps, every, said):
    config = Config.model_validate({"train": {"max_steps": steps}})
    choices = choose(config, replace(FACTS, measured=Measured(rows=31250)), tiny.MACHINE)
    assert choices.config.train.eval_every == every
    assert choices.reasons["train.eval_every"].startswith(said)


@pytest.mark.parametrize("steps", [2, 400])
def test_a_short_run_has_a_checkpoint_on_the_way(steps):
    """Or a kill would lose all of it, and there would be nothing for `verify` to replay from."""
    config = Config.model_validate({"train": {"max_steps": steps}})
    choices = choose(config, replace(FACTS, measured=Measured(rows=31250)), tiny.MACHINE)
    assert choices.config.train.checkpoint_every <= steps // 2


def test_a_precision_that_will_be_refused_is_not_timed(monkeypatch):
    """Products in fp16 on a processor without units for it took seconds before the refusal."""
    asked_for = []
    monkeypatch.setattr(runtime, "matmul_rate", lambda device, dtype: asked_for.append(str(dtype)) or 1e9)
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cpu"))
    with pytest.raises(UsageError, match="no units for it"):
        choose(asked(precision="fp16"), FACTS, here("fp16"))
    assert asked_for and "torch.float16" not in asked_for


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (38, 1), (199, 1), (400, 4), (1000, 10), (10**6, 10)])
def test_a_curve_has_fifty_points_however_short_the_run_is(steps, every):
    choices = choose(asked(max_steps=steps), replace(FACTS, measured=Measured()), tiny.MACHINE)
    assert choices.chosen.train.log_every == every and min(steps, 50) <= steps // every
    assert choose(asked(max_steps=steps, log_every=7), FACTS, tiny.MACHINE).config.train.log_every == 7


@pytest.mark.parametrize("every", [None, 10])
def test_a_budget_counts_the_evaluation_before_step_1(every):
    """Where a run starts from a model; it takes the time of as many steps as it lasts."""
    measured = Measured(step_seconds=0.1, eval_seconds=2.0, left_seconds=90.0)
    fresh = replace(FACTS, measured=measured)
    base = Base("a model", choose(asked(), FACTS, tiny.MACHINE).architecture)
    config = asked(max_steps=None, time_budget_s=100, eval_every=every)
    tuned = config.model_copy(update={"model": Config.model_validate({"model": {"path": "a model"}}).model})
    first, second = (
        choose(each, facts, tiny.MACHINE).chosen.train.max_steps
        for each, facts in ((config, fresh), (tuned, replace(fresh, base=base)))
    )
    step = 0.1 if every is None else 0.1 + 2.0 / every
    assert first - second == pytest.approx(2.0 / step, abs=1)


# -- the size that suits a text and a time ------------------------------------------------------------------------

TEXT = Facts(
    vocab_size=4096, vocabulary=4096, epoch_tokens=10**8, eval_tokens=10**5, unigram_bits=2.6, bytes_per_token=3.7
)


@pytest.mark.parametrize("tokens", [3, 300, 10_000])
@pytest.mark.parametrize("seconds", [60, 1e9])
def test_a_short_text_gets_a_small_model_however_long_the_time(tokens, seconds):
    config = Config.model_validate({"train": {"threads": 1, "time_budget_s": seconds}})
    choices = choose(config, replace(TEXT, vocab_size=300, epoch_tokens=tokens), tiny.MACHINE)
    assert parameter_count(choices.architecture) < 150_000


def test_a_size_that_is_chosen_fits_into_memory():
    config = Config.model_validate({"train": {"threads": 1, "time_budget_s": 1e7}})
    small = replace(tiny.MACHINE, memory=10**9)
    assert parameter_count(choose(config, replace(TEXT, epoch_tokens=10**10), small).architecture) < 10**9 / 50


def open_sized(**train) -> Config:
    return Config.model_validate({"train": {"threads": 1, **train}})


def timed(seconds: float, step_tokens: int, left: float) -> Measured:
    return Measured(rows=10**6, step_seconds=seconds, eval_seconds=1.0, left_seconds=left, step_tokens=step_tokens)


def test_a_longer_time_and_a_faster_machine_make_a_larger_model():
    slow, fast = tiny.MACHINE, replace(tiny.MACHINE, matmul={"fp32": 1e15})
    sizes = [
        parameter_count(choose(open_sized(time_budget_s=seconds), TEXT, machine).architecture)
        for machine in (slow, fast)
        for seconds in (60, 600, 6000)
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == 6 and sizes[-1] > 50 * sizes[0]


def test_without_a_time_the_size_follows_the_text_up_to_the_usual():
    sizes = [
        parameter_count(choose(open_sized(), replace(TEXT, epoch_tokens=tokens), tiny.MACHINE).architecture)
        for tokens in (10**5, 10**7, 10**10)
    ]
    assert sizes == pytest.approx([150_000, 2_000_000, 3_000_000], rel=0.25)  # the first as narrow as its ids allow
    limited = choose(open_sized(max_tokens=12_000_000), TEXT, tiny.MACHINE)
    assert parameter_count(limited.architecture) == pytest.approx(600_000, rel=0.25)
    assert "20 tokens for each" in limited.reasons["model.hidden_size"]
    assert limited.config.model.parameters is None  # which nobody asked for


def test_a_size_that_was_asked_for_stays_and_is_weighed():
    config = Config.model_validate({"model": {"parameters": 10**7}, "train": {"threads": 1, "time_budget_s": 60}})
    measured = timed(8.0, 1024, 50.0)
    choices = choose(config, replace(TEXT, measured=measured), tiny.MACHINE)
    assert choices.config.model.parameters == 10**7
    said = next(each for each in choices.warnings if "will see" in each)
    assert "parameters will see" in said and "model.parameters=" in said and "bits/byte" in said
    small = Config.model_validate({"model": {"parameters": 300_000}, "train": {"threads": 1, "time_budget_s": 600}})
    fits = choose(small, replace(TEXT, measured=timed(0.05, 4096, 580.0)), tiny.MACHINE)
    assert not any("will see" in each for each in fits.warnings)


def test_the_batch_follows_the_steps_that_were_timed_and_steps_take_their_share():
    config = open_sized(time_budget_s=100)
    config = config.model_copy(update={"model": config.model.model_copy(update={"parameters": 300_000})})
    slow = choose(config, replace(TEXT, measured=timed(1.0, 4096, 90.0)), tiny.MACHINE).config.train
    fast = choose(config, replace(TEXT, measured=timed(0.01, 4096, 90.0)), tiny.MACHINE).config.train
    assert slow.batch_tokens < fast.batch_tokens
    seen = slow.max_steps * slow.batch_tokens
    assert 0.7 * 90 * 4096 < seen < 90 * 4096  # as many tokens as in steps of the size that was timed


def test_measurements_of_one_step_tell_of_another():
    measured = timed(0.2, 4096, 50.0)
    assert measured.with_steps_of(2048).step_seconds == pytest.approx(0.1)
    assert measured.with_steps_of(4096) == measured
    before = replace(measured, step_tokens=None)  # of an earlier version
    assert before.with_steps_of(2048) == before


@pytest.mark.parametrize(("epoch", "said"), [(10**5, True), (10**7, False)])
def test_a_text_is_read_eight_times_at_most_and_time_that_is_left_is_told(epoch, said):
    facts = replace(TEXT, epoch_tokens=epoch, measured=timed(0.05, 4096, 90.0))
    facts = replace(facts, measured=replace(facts.measured, rows=8 * epoch // 128))
    choices = choose(open_sized(time_budget_s=100), facts, tiny.MACHINE)
    train = choices.config.train
    assert train.max_epochs == 8 and train.max_steps * train.batch_tokens <= 8 * epoch + train.batch_tokens
    assert any("passes over the text" in each for each in choices.warnings) == said


@pytest.mark.parametrize("limit", [{"max_epochs": 90.0}, {"max_steps": 10**6}, {"max_tokens": 10**9}])
def test_who_gives_a_limit_beside_the_time_gets_no_other(limit):
    facts = replace(TEXT, epoch_tokens=10**5, measured=timed(0.05, 4096, 90.0))
    choices = choose(open_sized(time_budget_s=100, **limit), facts, tiny.MACHINE)
    assert choices.config.train.max_epochs == limit.get("max_epochs")
    assert not any("passes over the text" in each for each in choices.warnings)


def test_no_passes_are_limited_of_data_without_end_of_models_that_are_there_and_of_earlier_runs():
    there = Base("a model", choose(asked(), FACTS, tiny.MACHINE).architecture)
    endless = replace(TEXT, endless=True, epoch_tokens=None, measured=timed(0.05, 4096, 90.0))
    earlier = replace(TEXT, measured=replace(timed(0.05, 4096, 90.0), rows=None))
    for facts in (endless, earlier, replace(TEXT, base=there, measured=timed(0.05, 4096, 90.0))):
        assert choose(open_sized(time_budget_s=100), facts, tiny.MACHINE).config.train.max_epochs is None


def test_a_short_text_is_not_read_often_by_a_small_model_but_less_often_by_a_larger():
    sizes = [
        parameter_count(choose(open_sized(time_budget_s=300), replace(TEXT, epoch_tokens=t), tiny.MACHINE).architecture)
        for t in (10**9, 5 * 10**5)
    ]
    assert sizes[1] > sizes[0]
