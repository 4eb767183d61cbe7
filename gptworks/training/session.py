"""A training run in its folder: begun or continued, changed, finished, replayed.

On several processes the main one prepares and writes (`run_main`); the others wait and then train with it
(`run_worker`).
"""

import json
from pathlib import Path
from typing import Any

from gptworks.core import config as configuration
from gptworks.core import folder, runtime
from gptworks.core.config import Config
from gptworks.core.errors import DataError, RunMismatch, UsageError
from gptworks.core.failpoint import failpoint
from gptworks.core.log import console, count, duration
from gptworks.core.ranks import ranks
from gptworks.data import shards as shard_folder
from gptworks.data.shards import Shards
from gptworks.infer.scoring import Score
from gptworks.model import build, card, hub
from gptworks.model.build import Loaded
from gptworks.model.config import parameter_count
from gptworks.planning.cost import flops_per_token
from gptworks.training import loop, setup
from gptworks.training.hooks import Checkpointer, Evaluator, Logger, Metrics, Sampler, TimeBudget
from gptworks.training.objectives import NextToken
from gptworks.training.range_test import RangeTest, range_test
from gptworks.training.schedule import RunSchedule
from gptworks.training.state import State, listing, newest_good, restore, using


def run_main(config: Config, out: Path, recipe: str) -> dict[str, Any]:
    """What the main process does: everything."""
    resolved, different = _continued(config, out)
    if resolved is None:
        _check_nothing_is_replaced(out)
    if not (out / "model" / folder.MANIFEST).exists():
        folder.foreign_files(out / "model")  # replaced at the end: what is not ours there is a reason not to begin
    finished = resolved is not None and (out / "result.json").is_file() and (out / "model").is_dir()
    if finished and not different:
        console.say(f"run      {out} is finished; --fresh starts it over")
        ranks.tell("plan", json.dumps({"finished": True}))
        return folder.read_json(out / "result.json")
    base = _base(resolved or config)
    shards = _shards(resolved or config, base, out)
    run = setup.decide(resolved or config, shards, base, resolved=resolved is not None)
    newest = newest_good(out / "checkpoints")
    if resolved is None:
        for key, reason in sorted(run.reasons.items()):
            console.say(f"chosen   {key}={configuration.get(run.config, key)}: {reason}")
        folder.write_text(out / "config.yaml", configuration.dump(run.config, config, run.reasons))
    if newest:
        _restore(run, newest)
    if different:
        run.config = _change(run, config, different, out)
    failpoint("run.configured")
    where = str(newest) if newest else None
    plan = {"config": run.config.model_dump(mode="json"), "asked": _asked(config), "restore": where}
    ranks.tell("plan", json.dumps(plan))
    ranks.start(run.layout.device, run.config.train.timeout_s)
    return _train(run, out, recipe)


def _check_nothing_is_replaced(out: Path) -> None:
    """Raises UsageError where a folder without a run has files under the names that a run writes."""
    for name in ("metrics.jsonl", "tensorboard", "checkpoints", "result.json", "report.html"):
        if (out / name).exists():
            raise UsageError(
                f"{out / name}: is of no run (there is no config.yaml) and would be replaced; choose another --out"
            )


def run_worker(config: Config, out: Path) -> dict[str, Any]:
    """What every other process does: waits until all is prepared, then trains with the main one."""
    console.muted = True
    plan = json.loads(ranks.hear("plan"))
    if plan.get("finished"):
        return {}
    if plan["asked"] != _asked(config):
        raise RunMismatch(f"rank {ranks.rank} was started with another configuration than rank 0; start all with one")
    resolved = configuration.build(plan["config"], "the main process's configuration")
    base = _base(resolved)
    place = Path(resolved.data.shards or out / "data")
    shards = shard_folder.open_shards(place, tokenizer=base.tokenizer if base else None)
    run = setup.decide(resolved, shards, base, resolved=True)
    if plan["restore"]:
        folder.verify(Path(plan["restore"]))
        _restore(run, Path(plan["restore"]))
    ranks.start(run.layout.device, resolved.train.timeout_s)
    return _train(run, out, "")


def _base(config: Config) -> Loaded | None:
    """The model that a run begins with, if not with a fresh one."""
    source = config.model
    if source.path is None:
        return None
    base = build.load_base(source.path, source.dropout, config.adapter.base)
    return build.with_tokens(base, source.add_tokens) if source.add_tokens else base


def _asked(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_unset=True)


def _continued(config: Config, out: Path) -> tuple[Config | None, list[tuple[str, Any, Any]]]:
    """The resolved configuration of the run in `out`, with today's `free` keys, and the `flexible` keys that are asked
    otherwise now; None and nothing if there is no run yet.

    Raises RunMismatch if what is asked now differs in a `fixed` key.
    """
    path = out / "config.yaml"
    if not path.is_file():
        return None, []
    resolved, asked = configuration.read_resolved(path)
    if different := configuration.changes(asked, config, "fixed"):
        key, old, new = different[0]
        more = f" (and {len(different) - 1} more keys)" if different[1:] else ""
        raise RunMismatch(
            f"{out} was started with {key}={old}, now {key}={new}{more}; "
            "use the old value, another --out, or --fresh to set the old run aside"
        )
    today = {
        key: configuration.get(config, key)
        for key in sorted(configuration.keys())
        if configuration.on_resume(key) == "free" and configuration.get(config, key) is not None
    }
    return configuration.with_values(resolved, today), configuration.changes(asked, config, "flexible")


def _change(run: setup.Run, asked: Config, different: list[tuple[str, Any, Any]], out: Path) -> Config:
    """Writes down what the run does otherwise from now on; gives its configuration with that."""
    change = setup.change(run, asked, different)
    changes = [*run.config.train.changes, *([change] if change else [])]
    if change:
        console.say(f"changed  from step {change.step}: {change.why}")
        run.state.stopped = None
    now = {key: new for key, _, new in different if key in ("train.target_loss", "train.patience")}
    config = configuration.with_values(run.config, {"train.changes": [c.model_dump() for c in changes]} | now)
    (out / "result.json").unlink(missing_ok=True)  # no longer finished
    text = (out / "config.yaml").read_text(encoding="utf-8")
    folder.write_text(out / "config.yaml", configuration.amend(text, config.train, asked))
    return config


def _restore(run: setup.Run, checkpoint: Path) -> None:
    facts = restore(run.state, checkpoint)
    shard_folder.same_data(run.shards, facts.get("data"))
    if run.base and run.trainable and facts.get("base") != run.base.weights_sha256:
        raise RunMismatch(
            f"{hub.name_of(run.base.home)} has other weights than when this run began; put the old ones back"
        )
    if any(change.step >= run.state.step for change in run.config.train.changes):
        run.state.stopped = None  # the run was told to go on
    console.say(f"run      continues from step {run.state.step}, {checkpoint}")


def _shards(config: Config, base: Loaded | None, out: Path) -> Shards:
    """A run that has checkpoints keeps the ids it began with, wherever the text is now; else they are made."""
    path = Path(config.data.shards or out / "data")
    if listing(out / "checkpoints") and path.is_dir():
        try:
            return shard_folder.open_shards(path, tokenizer=base.tokenizer if base else None)
        except DataError as error:
            console.warn(f"{error}; making the shards again from the text")
    own = path.resolve() == (out / "data").resolve()
    return shard_folder.prepare(config.data, config.tokenizer, path, base.tokenizer if base else None, own)


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


def _train(run: setup.Run, out: Path, recipe: str) -> dict[str, Any]:
    config, shards, state, layout = run.config, run.shards, run.state, run.layout
    assert config.train.context and config.train.checkpoint_every
    if config.train.patience is None:
        state.best = {}  # of when there was one
    schedule = RunSchedule(config.train)
    facts = {"data": shards.identity, "threads": config.train.threads, "versions": runtime.versions()}
    if run.base and run.trainable:  # what is frozen is in no checkpoint
        facts["base"] = run.base.weights_sha256
    rate = ranks.total(runtime.matmul_rate(layout.device, layout.dtype))[0]
    flops = flops_per_token(state.model.config, config.train.context, run.trainable)
    trained = f", {count(run.trainable.trained)} of them trained" if run.trainable else ""
    console.say(
        f"model    {state.model.config.family}, {count(_parameters(run))} parameters{trained}, width "
        f"{state.model.config.hidden_size}, {state.model.config.num_hidden_layers} layers; {_where(layout)} "
        f"{str(layout.dtype).removeprefix('torch.')}, {rate / 1e9:.0f} GFLOP/s in a matmul"
    )
    for line in (run.loader.report(), *run.loader.mixture_report(), run.loader.look(shards.tokenizer)):
        console.say(f"data     {line}")
    metrics = _metrics(run, out) if ranks.main else None
    evaluator = Evaluator(metrics, shards, config, schedule, run.eval_rows)
    budget = TimeBudget(
        config, schedule, run.most_steps, run.eval_seconds, state, lambda: _record(config, schedule, out)
    )
    checkpointer = Checkpointer(out / "checkpoints", config.train.checkpoint_every, schedule, facts)
    hooks: list[loop.Hook] = [evaluator, budget, checkpointer]
    if metrics:
        bytes_per_token, rows = shards.train.bytes_per_token, len(run.loader.plan(0))
        hooks.insert(1, Logger(metrics, config.train.log_every, schedule, bytes_per_token, flops, rate, rows))
        hooks.insert(2, Sampler(metrics, shards.tokenizer, run.stop_ids, config, schedule))
    try:
        loop.run(
            state, run.loader, NextToken(config.train), train=config.train, layout=layout, schedule=schedule,
            hooks=hooks,
        )  # fmt: skip
        checkpointer.finish()
        final = evaluator.final(state)
        ranks.end()
        with using(state.model, state.best or state.average):
            if not metrics:
                return {}
            run.config = configuration.with_values(
                config, {"train.changes": [c.model_dump() for c in schedule.changes]}
            )
            return _finish(run, out, recipe, final, metrics.last_loss, rate)
    finally:
        if checkpointer.saving:
            checkpointer.saving.join()  # what was begun is ended, whatever stopped the run
        if metrics:
            metrics.close()


def _where(layout: loop.Layout) -> str:
    return f"{ranks.world} x {layout.device.type}" if ranks.world > 1 else layout.device.type


def _metrics(run: setup.Run, out: Path) -> Metrics:
    made = Metrics(out, run.state.step, run.config.train.tensorboard, run.config.train.wandb)
    made.hyperparameters((out / "config.yaml").read_text(encoding="utf-8"), run.config)
    return made


def _record(config: Config, schedule: RunSchedule, out: Path) -> None:
    """Writes what was decided on the way into the run's config.yaml."""
    if ranks.main:
        text = (out / "config.yaml").read_text(encoding="utf-8")
        _, asked = configuration.read_resolved(out / "config.yaml")
        asked_config = configuration.build(asked, "the run's config.yaml")
        train = config.train.model_copy(update={"changes": schedule.changes})
        folder.write_text(out / "config.yaml", configuration.amend(text, train, asked_config))


def _finish(
    run: setup.Run, out: Path, recipe: str, final: Score, train_loss: float | None, rate: float
) -> dict[str, Any]:
    """The model folder and result.json, of the weights that `final` was measured on."""
    config, state = run.config, run.state
    assert config.train.context
    speed = state.tokens / max(state.seconds, 1e-9)
    result = {
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": round(runtime.process_seconds(), 2),
        "train_seconds": round(state.seconds, 2),
        "tokens_per_second": round(speed, 1),
        "mfu": round(speed * flops_per_token(state.model.config, config.train.context, run.trainable) / rate, 4),
        "matmul_gflops": round(rate / 1e9, 1),
        "peak_memory_bytes": runtime.peak_memory(),
        "peak_gpu_memory_bytes": runtime.peak_gpu_memory(),
        "processes": ranks.world,
        "parameters": _parameters(run),
        "trained_parameters": run.trainable.trained if run.trainable else _parameters(run),
        "stopped": state.stopped or f"reached step {state.step}",
        "weights": "of the best evaluation" if state.best else "averaged" if state.average else "last",
        "skipped_steps": state.skipped,
        "changes": [change.why for change in config.train.changes],
        "train": {"loss": train_loss},
        "sources": run.loader.sources(state.cursor),
        "eval": final.as_dict(),
        "model": str(out / "model"),
        "recipe": recipe,
    }
    lineage = _lineage(config, run.shards, run.base, recipe, result)
    failpoint("model.save")
    if run.base and config.adapter.kind:
        build.save_adapter(out / "model", state.model, config.adapter, run.base.home, lineage)
    else:
        build.save(out / "model", state.model, run.shards.tokenizer, lineage, base=run.base)
    result["seconds"] = round(runtime.process_seconds(), 2)
    folder.write_json(out / "result.json", result)
    console.say(
        f"trained  {state.step} steps in {duration(state.seconds)}: eval loss {final.loss:.4f}, "
        f"{final.bits_per_byte:.3f} bits/byte -> {out / 'model'}"
    )
    return result


def _parameters(run: setup.Run) -> int:
    return parameter_count(run.state.model.config) + (run.trainable.added if run.trainable else 0)


def _lineage(
    config: Config, shards: Shards, base: Loaded | None, recipe: str, result: dict[str, Any]
) -> dict[str, Any]:
    versions = runtime.versions()
    return {
        "gptworks": versions["gptworks"],
        "torch": versions["torch"],
        "recipe": recipe,
        "data": config.data.model_dump(mode="json")["train"],
        "data_sha256": shards.manifest["source_sha256"],
        "split": shards.manifest["split"],
        "parents": [{"path": hub.name_of(base.home), "sha256": base.weights_sha256}] if base else [],
        "license": {"license": config.license} if config.license else card.license_of(base.home) if base else {},
        "config": config.model_dump(mode="json"),
        "metrics": {f"eval_{key}": value for key, value in result["eval"].items()}
        | {"steps": result["steps"], "training_tokens": result["tokens"]},
    }


def find_lr(config: Config, out: Path) -> RangeTest:
    """A learning-rate range test in place of training; a run in `out` stays as it is, and its text is the one tested.

    Raises RunMismatch if what is asked now differs from that run in a `fixed` key.
    """
    if ranks.world > 1:
        raise UsageError("train.find_lr=true is for one process")
    _continued(config, out)
    base = _base(config)
    return range_test(setup.decide(config, _shards(config, base, out), base))


def replay(out: Path) -> dict[str, Any]:
    """Trains again from the older checkpoint to the newer and compares the two in every bit; changes nothing."""
    resolved, _ = configuration.read_resolved(out / "config.yaml")
    checkpoints = listing(out / "checkpoints")
    if len(checkpoints) < 2:
        raise DataError(f"{out}: a replay needs two checkpoints, there are {len(checkpoints)}")
    older, newer = checkpoints[-2:]
    folder.verify(older)
    folder.verify(newer)
    base = _base(resolved)
    shards = shard_folder.open_shards(Path(resolved.data.shards or out / "data"))
    run = setup.decide(resolved, shards, base, True)
    facts = restore(run.state, older)
    shard_folder.same_data(shards, facts.get("data"))
    target = setup.decide(resolved, shards, base, True).state
    restore(target, newer)
    first, schedule = run.state.step, RunSchedule(resolved.train)
    evaluator = Evaluator(None, shards, resolved, schedule, run.eval_rows)

    def evaluate(state: State, m: loop.StepMetrics) -> None:
        evaluator(state, m)  # and go on: what ends a run may have been asked for later

    run.state.stopped = None
    objective = NextToken(resolved.train)
    loop.run(
        run.state, run.loader, objective, train=resolved.train, layout=run.layout, schedule=schedule,
        hooks=[evaluate], until=target.step,
    )  # fmt: skip
    if resolved.train.patience is None or not target.best:  # dropped, or asked for, since
        run.state.best, target.best = {}, {}
    difference = run.state.difference(target)
    return {
        "verdict": "identical to the bit" if difference is None else difference,
        "identical": difference is None,
        "from_step": first,
        "to_step": target.step,
        "fingerprint": run.state.fingerprint(),
    }
