"""A training run in its folder: begun or continued, changed, finished, replayed.

On several processes the main one prepares and writes (`run_main`); the others wait and then train with it
(`run_worker`).
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from gptworks.core import config as configuration
from gptworks.core import folder
from gptworks.core import ranks as processes
from gptworks.core.config import Change, Chosen, Config, RunFile
from gptworks.core.errors import DataError, GptworksError, PeerLost, RunMismatch, UsageError
from gptworks.core.failpoint import failpoint
from gptworks.core.log import console, plural
from gptworks.core.ranks import ranks
from gptworks.core.registry import resolve
from gptworks.core.results import Trained, Verified
from gptworks.data.tokenizer import USUAL_VOCABULARY
from gptworks.model import build, hub
from gptworks.model.build import Loaded
from gptworks.model.lowbit import scheme
from gptworks.planning.choices import Choices
from gptworks.planning.choose import batch_rows
from gptworks.planning.dial import derive_shape
from gptworks.training import loop
from gptworks.training.assemble import Run, assemble
from gptworks.training.change import asked_change
from gptworks.training.decide import Decided, decide, provisional, reopened
from gptworks.training.hooks import Evaluations
from gptworks.training.identity import check_agreement, check_unedited
from gptworks.training.metrics import check_login, check_wandb, logged_lines
from gptworks.training.optim import OPTIMIZERS
from gptworks.training.problem import Place, Problem, opened
from gptworks.training.range_test import RangeTest, range_test
from gptworks.training.schedule import SCHEDULES, RunSchedule
from gptworks.training.state import State, listing, newest_good, restore
from gptworks.training.train import train


def check(config: Config) -> None:
    """Raises UsageError for what is wrong whatever the data is, before anything is read or written."""
    _problem(config).check(config)
    if config.model.path == "???":
        raise UsageError("this recipe starts from a model of yours: add model=FOLDER")
    check_values(config)


CHOICES = "choices.json"  # what the run was decided from; written before config.yaml, which makes the folder a run
WRITTEN = (
    "metrics.jsonl", "tensorboard", "checkpoints", "result.json", "report.html", "run.json", "passage.json", CHOICES,
)  # fmt: skip


def check_values(config: Config) -> None:
    """The part of `check` that holds before a recipe's own text and model are named. Raises UsageError."""
    if config.adapter.base not in (None, "fp32", "bf16"):
        scheme(config.adapter.base)
    resolve("optimizer", OPTIMIZERS, config.train.optimizer)
    resolve("schedule", SCHEDULES, config.train.schedule)
    check_wandb(config.train.wandb)
    processes.check(config.train.reduce)
    if config.train.reduce == "canonical" and config.train.batch_tokens == "full":
        raise UsageError("train.reduce=canonical needs steps of one size; train.batch_tokens=full has them by epoch")
    if config.model.path is None:
        derive_shape(Choices(config), config.tokenizer.vocab_size or USUAL_VOCABULARY)
    if isinstance(config.train.batch_tokens, int) and config.train.context:
        batch_rows(config)


def _problem(config: Config) -> type[Problem]:
    kind: type[Problem] = configuration.problem_of({"problem": config.problem.kind})
    return kind


# -- begun or continued ------------------------------------------------------------------------------------------


def run_main(config: Config, out: Path, recipe: str) -> Trained | None:
    """Runs the main process, which does everything and holds the folder's lock. Returns what result.json has."""
    folder.clear_up(out, out / "checkpoints")
    file, different = _continued(config, out)
    if file is None:
        _check_nothing_is_replaced(out)
    if not (out / "model" / folder.MANIFEST).exists():
        folder.foreign_files(out / "model")  # replaced at the end: what is not ours there is a reason not to begin
    finished = file is not None and (out / "result.json").is_file() and (out / "model").is_dir()
    known: Config = config if file is None else file.chosen
    newest = newest_good(out / "checkpoints") if different or not finished else None
    if file is not None and newest:
        check_unedited(file, newest)
    if file is not None:
        _warn_of_edited(known, out)
    if finished and not different:
        ranks.tell("plan", json.dumps({"finished": True}))
        return _as_it_was(out)
    check_login(known.train.wandb)
    base = _base(known, out)
    place = Place(out / "data", base, begun=file is not None)
    kind = _problem(known)
    verifying = kind.prepare(known, place)
    problem = opened(kind, known, place)
    decided: Decided | None
    if file is None:
        decided = decide(config, problem, base)
        run = decided.run
        file = _written_down(decided, config, out=out, recipe=recipe)
    else:
        run, decided = reopened(file.at(2**62), problem, base), None
    if newest:
        _restore(run, newest, file)
    if different:
        _change(run, file, asked=config, different=different, out=out)
    failpoint("run.configured")
    plan = {
        "begun": file.chosen.model_dump(mode="json"),
        "config": run.config.model_dump(mode="json"),
        "run_asked": _asked(file.asked),
        "changes": [change.model_dump(mode="json") for change in file.changes],
        "asked": _asked(config),
        "restore": str(newest) if newest else None,
    }
    ranks.tell("plan", json.dumps(plan))
    ranks.start(run.layout.device, run.config.train.timeout_s)
    return train(run, file, out=out, recipe=recipe, decided=decided, verifying=verifying)


def _as_it_was(out: Path) -> Trained:
    """The result of a finished run once more, and how it goes on."""
    result = Trained.read(out / "result.json")
    eval_of = result.eval if isinstance(result.eval, dict) else {}
    figures = [f"{name} {value:.4g}" for name, value in eval_of.items() if isinstance(value, int | float)]
    console.say(f"trained  {result.steps} steps: eval {', '.join(figures[:2])} -> {out / 'model'}")
    console.say(
        f"run      {out} is finished; `gptworks continue {out} train.max_steps={2 * result.steps}` makes it longer, "
        "and the command that began it starts over with --fresh"
    )
    return result


def run_worker(config: Config, out: Path) -> None:
    """Runs every other process: waits until all is prepared, then trains with the main one."""
    console.muted = True
    plan = json.loads(ranks.hear("plan"))
    if plan.get("finished"):
        return
    if plan.get("called_off"):
        raise PeerLost("the main process could not go on; its own message is above")
    if plan["asked"] != _asked(config):
        raise RunMismatch("started with another configuration than rank 0; start all with one")
    chosen = configuration.build(plan["config"], "the main process's configuration", Chosen)
    base = _base(chosen, out)
    place, kind = Place(out / "data", base, begun=bool(plan["restore"])), _problem(chosen)
    first = os.environ.get("LOCAL_RANK") == "0"  # of another machine, which may read another disk
    verifying = kind.verify(chosen, place) if first else None
    run = reopened(chosen, opened(kind, chosen, place), base)
    changes = [Change.model_validate(change) for change in plan["changes"]]
    begun = configuration.build(plan["begun"], "the main process's configuration", Chosen)
    asked: Config = configuration.build(plan["run_asked"], "what the main process's run was asked")
    file = RunFile(out / "config.yaml", begun, asked=asked, reasons={}, changes=changes)
    if plan["restore"]:
        folder.verify(Path(plan["restore"]))
        _restore(run, Path(plan["restore"]), file)
    ranks.start(run.layout.device, chosen.train.timeout_s)
    train(run, file, out=out, recipe="", verifying=verifying)


def call_off() -> None:
    """Ends the wait of the other processes, where the main one fails before it has told them its plan."""
    if ranks.reachable:
        with contextlib.suppress(PeerLost, RuntimeError):
            ranks.tell("plan", json.dumps({"called_off": True}))


def _asked(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_unset=True)


def _check_nothing_is_replaced(out: Path) -> None:
    """Raises UsageError where a folder without a run has files under the names that a run writes."""
    for name in WRITTEN:
        if (out / name).exists() and not (name == CHOICES and _is_ours(out / name)):
            raise UsageError(
                f"{out / name}: is of no run (there is no config.yaml) and would be replaced; choose another --out"
            )


def _is_ours(choices: Path) -> bool:
    """True for the choices of a run that was stopped before its config.yaml was there."""
    try:
        kept = folder.read_json(choices)
    except DataError:
        return False
    return isinstance(kept, dict) and kept.keys() == {"facts", "machine"}


def _base(config: Config, out: Path) -> Loaded | None:
    """The model that a run begins with, if not with a fresh one; found by its weights where it was moved since."""
    source = config.model
    if source.path is None:
        return None
    path = build.base_folder(source.path, out, _begun_with(out))
    base = build.load_base(path, source.dropout, config.adapter.base)
    return build.with_tokens(base, source.add_tokens) if source.add_tokens else base


def _begun_with(out: Path) -> str | None:
    """SHA-256 of the weights of the model that a run began with, where it kept that."""
    try:
        known = folder.read_json(out / CHOICES)["facts"]["base"]["sha256"]
    except (DataError, KeyError, TypeError):
        return None
    return known if isinstance(known, str) else None


def _moved(out: Path, path: str | None) -> bool:
    """True where a folder has the weights that the run in `out` began with, under another path."""
    known = _begun_with(out)
    if known is None or path is None:
        return False
    try:
        return build.weights_sha256(hub.local(path)) == known
    except GptworksError:
        return False


def _written_down(decided: Decided, config: Config, *, out: Path, recipe: str) -> RunFile:
    """Says what was chosen, and writes config.yaml and what it was decided from."""
    chosen, reasons = decided.run.config, decided.choices.reasons
    usual = [key for key, reason in reasons.items() if reason == f"{chosen.model.family}'s default"]
    for key, reason in sorted(reasons.items()):
        if key not in usual:
            console.say(f"chosen   {key}={configuration.get(chosen, key)}: {reason}")
    if usual:
        rest = plural(len(usual), "more is a default", "more are defaults")
        console.say(f"chosen   {rest} of {chosen.model.family}: they stand in {out / 'config.yaml'}")
    begun = configuration.with_values(chosen, {"train.changes": []})
    file = RunFile(
        out / "config.yaml", begun, asked=config, reasons=reasons, changes=list(config.train.changes), recipe=recipe
    )
    kept = {"facts": decided.facts.as_dict(), "machine": decided.machine.as_dict()}
    folder.write_json(out / CHOICES, kept)
    file.write()
    return file


def _continued(config: Config, out: Path) -> tuple[RunFile | None, list[tuple[str, Any, Any]]]:
    """The configuration of the run in `out`, with today's `free` keys, and the `flexible` keys that are asked otherwise
    now; None and nothing if there is no run yet.

    Raises RunMismatch if what is asked now differs in a `fixed` key.
    """
    if not (out / "config.yaml").is_file():
        return None, []
    file = RunFile.read(out / "config.yaml")
    different = configuration.differences(file.asked, config, "fixed")
    if any(key == "model.path" for key, _, _ in different) and _moved(out, config.model.path):
        different = [each for each in different if each[0] != "model.path"]
        path = {"model.path": config.model.path}
        file.asked, file.chosen = (
            configuration.with_values(file.asked, path),
            configuration.with_values(file.chosen, path),
        )
        file.write()
    if different:
        each = "; ".join(f"{key}={old}, now {key}={new}" for key, old, new in different)
        if different[0][0] == "train.time_budget_s":
            each += f" (it became train.max_steps={file.chosen.train.max_steps}, which may be raised)"
        raise RunMismatch(
            f"{out} was started with {each}; use the old value{'s' * (len(different) > 1)}, another --out, or --fresh "
            "to set the old run aside"
        )
    today = {
        key: value
        for key in sorted(configuration.keys_of_kind("free", type(config)))
        if (value := configuration.get(config, key)) is not None or configuration.is_unset(config, key)
    }
    file.chosen = configuration.with_values(file.chosen, today)
    if (every := config.train.checkpoint_every) is not None:
        file.asked = configuration.with_values(file.asked, {"train.checkpoint_every": every})
    return file, configuration.differences(file.asked, config, "flexible")


def _warn_of_edited(config: Config, out: Path) -> None:
    """Says that a text was changed after a run had read it."""
    if edited := _problem(config).edited(config, Place(out / "data")):
        console.warn(
            f"{edited} is not what {out} was begun with: the run goes on with the text that it has; --fresh starts "
            "over with the new one"
        )


def _restore(run: Run, checkpoint: Path, file: RunFile) -> None:
    facts = restore(run.state, checkpoint)
    check_agreement(run, facts)
    if any(change.step >= run.state.step for change in file.changes):
        run.state.stopped = None  # the run was told to go on
    console.say(f"run      continues from step {run.state.step}, {checkpoint}")


# -- changed on the way ------------------------------------------------------------------------------------------


def _change(run: Run, file: RunFile, asked: Config, different: list[tuple[str, Any, Any]], out: Path) -> None:
    """Writes down what the run does otherwise from now on."""
    change = asked_change(run, file, asked=asked, different=different)
    logged_lines(out / "metrics.jsonl")  # what cannot be read is said before anything of the finished run is gone
    (out / "result.json").unlink(missing_ok=True)  # no longer finished
    file.asked = asked
    if change is None:
        file.write()
        return
    console.say(f"changed  from step {change.step}: {change.why}")
    if change.length and file.chosen.train.time_budget_s:
        console.say("changed  the time budget was for the first steps: from now on the number of steps counts")
    run.state.stopped = None
    file.append(change)
    run.config = file.at(change.step)


def set_aside(out: Path) -> None:
    """Moves an old run out of the way, to `out.1`, `out.2`, ... Raises UsageError for a folder that is none."""
    if out.exists():
        there = any(path.name != ".lock" for path in out.iterdir())
        marks = ("config.yaml", "checkpoints", f"data/{folder.MANIFEST}", f"model/{folder.MANIFEST}")
        if (there and not any((out / mark).exists() for mark in marks)) or out.resolve() == Path.cwd():
            raise UsageError(f"--fresh sets an old run aside, and {out} is none; choose another --out")
        number = 1
        while out.with_name(f"{out.name}.{number}").exists():
            number += 1
        with folder.storage_errors(out):
            out.rename(out.with_name(f"{out.name}.{number}"))
        console.say(f"run      the old one is now {out.with_name(f'{out.name}.{number}')}")


# -- beside a training -------------------------------------------------------------------------------------------


def find_lr(config: Config, out: Path) -> RangeTest:
    """A learning-rate range test in place of training; a run in `out` stays as it is, and its text is the one tested.

    Raises RunMismatch if what is asked now differs from that run in a `fixed` key.
    """
    if ranks.world > 1:
        raise UsageError("train.find_lr=true is for one process")
    _continued(config, out)
    base, kind = _base(config, out), _problem(config)
    place = Place(out / "data", base, begun=bool(listing(out / "checkpoints")))
    verifying = kind.prepare(config, place)
    problem = opened(kind, config, place)
    test = range_test(provisional(config, problem, base))
    if verifying:
        verifying.finish()
    return test


def replay(out: Path) -> Verified:
    """Trains again from the older checkpoint to the newer and compares the two in every bit; changes nothing."""
    file = RunFile.read(out / "config.yaml")
    checkpoints = listing(out / "checkpoints")
    if len(checkpoints) < 2:
        raise DataError(
            f"{out}: a replay needs two checkpoints, there are {len(checkpoints)}; "
            "a smaller train.checkpoint_every makes more"
        )
    older, newer = checkpoints[-2:]
    folder.verify(older)
    folder.verify(newer)
    check_unedited(file, newer)
    config = file.at(int(older.name.removeprefix("step-")))
    base, kind = _base(config, out), _problem(config)
    place = Place(out / "data", base, begun=True)
    if verifying := kind.verify(config, place):
        verifying.finish()
    problem = opened(kind, config, place)
    run = reopened(config, problem, base)
    check_agreement(run, restore(run.state, older))
    target = assemble(config, problem, base).state
    restore(target, newer)
    options, schedule, first = config.train, RunSchedule(file.chosen.train, file.changes), run.state.step
    work = run.start()
    evaluations = Evaluations(work.evaluate, problem, train=options, schedule=schedule)

    def evaluate(state: State, m: loop.StepMetrics) -> None:
        evaluations(state, m)  # and go on: what ends a run may have been asked for later
        console.live(f"replaying  step {state.step}/{target.step}")

    run.state.stopped = None
    console.live(f"replaying  step {first}/{target.step}")
    loop.run(
        run.state, work.batches, work.objective, train=options, layout=run.layout, schedule=schedule,
        hooks=[evaluate], until=target.step,
    )  # fmt: skip
    if options.patience is None or not target.best:  # dropped, or asked for, since
        run.state.best, target.best = {}, {}
    difference = run.state.difference(target)
    console.clear()
    return Verified(
        verdict="identical to the bit" if difference is None else difference,
        identical=difference is None,
        from_step=first,
        to_step=target.step,
        fingerprint=run.state.fingerprint(),
    )
