"""A run from the step it stands at to its end: its hooks, the loop, and what the training leaves."""

import contextlib
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from gptworks.core import folder, runtime
from gptworks.core.config import RunFile
from gptworks.core.errors import StorageError
from gptworks.core.log import console, count, plural
from gptworks.core.ranks import ranks
from gptworks.core.results import Trained
from gptworks.training import identity, loop
from gptworks.training.assemble import Run
from gptworks.training.decide import Decided
from gptworks.training.hooks import Checkpointer, Evaluations, Logger, Sampler, TimeBudget
from gptworks.training.metrics import Account, Metrics, write_passage
from gptworks.training.outcome import finish, parameters, result_of, step_flops
from gptworks.training.problem import Work
from gptworks.training.schedule import RunSchedule
from gptworks.training.state import using
from gptworks.training.timing import evaluation_seconds


def train(
    run: Run, file: RunFile, out: Path, recipe: str, *,
    decided: Decided | None = None, verifying: folder.Verifying | None = None,
) -> Trained | None:  # fmt: skip
    """Trains to the end, and on the main process writes the model. `decided` is there where the run begins now."""
    state, account, trained_before = run.state, Account(out, recipe), run.state.seconds
    if run.config.train.patience is None:
        state.best = {}  # of when there was one
    work, schedule = run.start(), RunSchedule(file.chosen.train, file.changes)
    rate = ranks.total(runtime.matmul_rate(run.layout.device, run.layout.dtype))[0]
    _say_what_is_trained(run, work, rate)
    metrics = _metrics(run, out) if ranks.main else None
    beside = _beside(
        run, file, work=work, schedule=schedule, out=out, metrics=metrics, account=account, rate=rate, decided=decided,
        verifying=verifying,
    )  # fmt: skip
    if metrics:
        account.add("preparing", runtime.process_seconds())
        account.write()
    console.live(f"step {state.step}/{schedule.length}")
    try:
        if run.base and not state.step:
            state.model.dtype = run.layout.dtype  # as the loop has it
            with account.spent("evaluating"):
                beside.evaluations.before_training(state)
        loop.run(
            state, work.batches, work.objective, train=run.config.train, layout=run.layout, schedule=schedule,
            hooks=beside.hooks,
        )  # fmt: skip
        with account.spent("saving"):
            beside.checkpointer.finish()
        console.clear()
        with account.spent("evaluating"):
            final = beside.evaluations.final(state)
        ranks.end()
        with using(state.model, state.best or state.average):
            if not metrics:
                return None
            result = result_of(run, work, changes=file.changes, final=final, train_loss=metrics.last_loss, rate=rate)
            with account.spent("evaluating"):
                write_passage(out, state.step, work.evaluate.passage(state.model))
            with account.spent("saving"):
                return finish(run, out, recipe, result=result, final=final)
    finally:
        if saving := beside.checkpointer.saving:
            saving.join()  # what was begun is ended, whatever stopped the run
        if metrics:
            metrics.close()
            account.add("training", state.seconds - trained_before)
            stopped = sys.exc_info()[0] is not None  # and what stopped the run is what is to be said
            with contextlib.suppress(StorageError) if stopped else contextlib.nullcontext():
                account.write()


@dataclass
class _Beside:
    """Holds what happens beside the steps, in the order in which the loop calls it, and two that outlast it."""

    evaluations: Evaluations
    checkpointer: Checkpointer
    hooks: list[loop.Hook] = field(default_factory=list)


def _beside(
    run: Run, file: RunFile, *, work: Work, schedule: RunSchedule, out: Path, metrics: Metrics | None,
    account: Account, rate: float, decided: Decided | None, verifying: folder.Verifying | None,
) -> _Beside:  # fmt: skip
    config, options, state, problem = run.config, run.config.train, run.state, run.problem
    clock, facts = runtime.fine_clock(), identity.facts_of(run)
    budget = TimeBudget(
        options, schedule, measured=decided.measured if decided else None,
        most=decided.most_steps if decided else None, may_leave_out=file.asked.train.eval_every is None,
        from_step=state.step, record=file.append if ranks.main else file.changes.append, clock=clock,
        evaluation_now=partial(evaluation_seconds, work.evaluate, state.model),
    )  # fmt: skip
    evaluations = Evaluations(
        work.evaluate, problem, train=options, schedule=schedule, metrics=metrics, clock=clock,
        told=budget.time_evaluation,
    )  # fmt: skip
    if decided:
        evaluations.seconds = decided.measured.eval_seconds
    checkpointer = Checkpointer(
        out / "checkpoints", options.checkpoint_every, schedule=schedule, verifying=verifying,
        facts=lambda: {**facts, "config": identity.values_of(file)},
        asked=file.asked.train.checkpoint_every is not None,
    )  # fmt: skip
    beside = _Beside(evaluations, checkpointer, [budget, account.timed("evaluating", evaluations)])
    if metrics:
        beside.hooks.append(
            Logger(
                metrics, options.log_every, schedule, batches=work.batches, bytes_per_token=problem.bytes_per_token,
                lost_per_token=problem.lost_per_token, flops=step_flops(run), rate=rate,
                to_come=evaluations.seconds_to_come,
            )
        )  # fmt: skip
        if "generate" in problem.sections:
            sampler = Sampler(
                metrics, problem.tokenizer, run.stop_ids, options=config.generate, train=options, schedule=schedule
            )
            beside.hooks.append(account.timed("sampling", sampler))
    beside.hooks.append(account.timed("saving", checkpointer))
    return beside


def _say_what_is_trained(run: Run, work: Work, rate: float) -> None:
    """Two kinds of lines before step one: the model and where it is trained, and the data."""
    config, trainable, layout = run.state.model.config, run.trainable, run.layout
    trained = f", {count(trainable.trained)} of them trained" if trainable else ""
    where = f"{ranks.world} x {layout.device.type}" if ranks.world > 1 else layout.device.type
    console.say(
        f"model    {config.family}, {count(parameters(run))} parameters{trained}, width {config.hidden_size}, "
        f"{plural(config.num_hidden_layers, 'layer')}; {where} {str(layout.dtype).removeprefix('torch.')}, "
        f"{rate / 1e9:.0f} GFLOP/s in a matmul"
    )
    for line in work.lines:
        console.say(f"data     {line}")


def _metrics(run: Run, out: Path) -> Metrics:
    metrics = Metrics(out, run.state.step, tensorboard=run.config.train.tensorboard, wandb=run.config.train.wandb)
    metrics.hyperparameters((out / "config.yaml").read_text(encoding="utf-8"), run.config)
    return metrics
