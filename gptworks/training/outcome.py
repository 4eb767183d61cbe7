"""The results of a training: the model folder with its lineage, and result.json."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptworks.core import folder, runtime
from gptworks.core.config import Change
from gptworks.core.failpoint import failpoint
from gptworks.core.log import console, duration, plural
from gptworks.core.ranks import ranks
from gptworks.core.results import Trained
from gptworks.model import build, card, hub
from gptworks.model.config import parameter_count
from gptworks.planning.cost import flops_per_token
from gptworks.training.assemble import Run
from gptworks.training.metrics import logged_lines
from gptworks.training.problem import Evaluation, Work

BEGINNING = 10  # lines of metrics.jsonl, among which an evaluation before step 1 is


def step_flops(run: Run) -> float:
    """The FLOPs of a token in training, with what a second model adds."""
    own = flops_per_token(run.state.model.config, run.config.train.context, run.trainable)
    return own + run.problem.beside.flops_per_token


def result_of(
    run: Run, work: Work, changes: list[Change], final: Evaluation, *, train_loss: float | None, rate: float
) -> Trained:
    """The figures of a training."""
    state = run.state
    speed = state.tokens / max(state.seconds, 1e-9)
    return Trained(
        steps=state.step,
        tokens=state.tokens,
        seconds=round(runtime.process_seconds(), 2),
        train_seconds=round(state.seconds, 2),
        tokens_per_second=round(speed, 1),
        mfu=round(speed * step_flops(run) / rate, 4),
        matmul_gflops=round(rate / 1e9, 1),
        peak_memory_bytes=runtime.peak_memory(),
        peak_gpu_memory_bytes=runtime.peak_gpu_memory(),
        processes=ranks.world,
        parameters=parameters(run),
        trained_parameters=run.trainable.trained if run.trainable else parameters(run),
        stopped=state.stopped or f"reached step {state.step}",
        weights="of the best evaluation" if state.best else "averaged" if state.average else "last",
        skipped_steps=state.skipped,
        changes=[change.why for change in changes],
        train={"loss": train_loss},
        sources=work.batches.sources(state.cursor),
        eval=final.figures,
    )


def finish(run: Run, out: Path, recipe: str, *, result: Trained, final: Evaluation) -> Trained:
    """Writes the model folder, of the weights that `final` was measured on, and result.json."""
    config, state, model = run.config, run.state, out / "model"
    result = replace(result, model=str(model), recipe=recipe)
    lineage = _lineage(run, recipe, result)
    failpoint("model.save")
    if run.base and config.adapter.kind:
        build.save_adapter(model, state.model, adapter=config.adapter, base=run.base, lineage=lineage)
    else:
        build.save(
            model,
            state.model,
            tokenizer=run.problem.tokenizer,
            lineage=lineage,
            base=run.base,
            architecture=run.problem.saved_as,
        )
    result = replace(result, seconds=round(runtime.process_seconds(), 2))
    folder.write_json(out / "result.json", result.as_dict())
    figures = ", ".join(final.shown[:2])
    console.say(f"trained  {plural(state.step, 'step')} in {duration(state.seconds)}: eval {figures} -> {model}")
    if run.base:
        _warn_of_harm(run, out, final)
    return result


def _warn_of_harm(run: Run, out: Path, final: Evaluation) -> None:
    """Says so where a model is worse after its training than the one that it began with."""
    watched, better = run.problem.watched, min if run.problem.lower_is_better else max
    rows = (json.loads(line) for line in logged_lines(out / "metrics.jsonl")[:BEGINNING] if line)
    before = next((row[f"eval/{watched}"] for row in rows if row["step"] == 0 and f"eval/{watched}" in row), None)
    now = final.figures[watched]
    if before is not None and now != better(before, now):
        console.warn(
            f"the model is worse than the one it began with, {watched} {now:.4g} after {before:.4g}: a lower train.lr "
            "(train.find_lr=true proposes one), fewer steps or more varied data keep more of what it knew"
        )


def parameters(run: Run) -> int:
    return parameter_count(run.state.model.config) + (run.trainable.added if run.trainable else 0)


def _lineage(run: Run, recipe: str, result: Trained) -> dict[str, Any]:
    config, base, versions = run.config, run.base, runtime.versions()
    parents = []
    if base:
        name = card.told(hub.name_of(base.home.resolve()))
        parents = [{"role": "base", "path": name, "sha256": base.weights_sha256}]
    parents += [card.told(vars(parent)) for parent in run.problem.parents]
    own = card.license_of(base.home) if base else {}
    return {
        "gptworks": versions["gptworks"],
        "torch": versions["torch"],
        "recipe": card.told(recipe),
        "problem": card.told(config.problem.kind),
        **card.told(run.problem.lineage(config)),
        "parents": parents,
        "license": {"license": config.license} if config.license else own,
        "config": card.told(config.model_dump(mode="json")),
        "metrics": {f"eval_{key}": value for key, value in result.eval.items()}
        | {"steps": result.steps, "training_tokens": result.tokens},
    }
