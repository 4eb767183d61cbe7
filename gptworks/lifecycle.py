"""The table of contents: one short function per stage of a model's life, from folder to folder.

The commands and the Python API are these functions. A stage reads folders, does one thing and writes a folder; run it
again and it continues, or says that it is done.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from gptworks.core import config as configuration
from gptworks.core import folder, runtime
from gptworks.core.config import Config
from gptworks.core.errors import DataError, RunMismatch, UsageError
from gptworks.core.log import console, count, duration
from gptworks.data import shards as shard_folder
from gptworks.data.shards import Shards
from gptworks.infer import comparison
from gptworks.infer.chat import Conversation, Spelling
from gptworks.infer.engine import Engine
from gptworks.infer.sampling import Sampling
from gptworks.infer.scoring import stream_losses, total, unigram, xz
from gptworks.model import build
from gptworks.model.build import Loaded
from gptworks.model.config import parameter_count
from gptworks.plan.cost import flops_per_token
from gptworks.train import loop, setup
from gptworks.train.hooks import Budget, Checkpointer, Evaluator, Logger, Metrics, Sampler, sampling
from gptworks.train.objectives import NextToken
from gptworks.train.state import State, listing, newest_good, restore

# -- train -------------------------------------------------------------------------------------------------------


def train(config: Config, out: Path, recipe: str = "", fresh: bool = False) -> dict[str, Any]:
    """Tokenizer and shards where missing, then training, to `out/model`; continues what `out` holds.

    Returns what result.json has. Raises GptworksError.
    """
    setup.check(config)
    if fresh and out.exists():
        with runtime.hold(out):
            set_aside(out)
    with runtime.interrupts.listening(), runtime.hold(out):
        resolved = _continued(config, out)
        finished = out / "result.json"
        if resolved and finished.is_file() and (out / "model").is_dir():
            console.say(f"run      {out} is finished; --fresh starts it over")
            return folder.read_json(finished)
        source = (resolved or config).model
        base = build.load(source.path, source.dropout) if source.path else None
        shards = _shards(resolved or config, base, out)
        run = setup.decide(resolved or config, shards, base, resolved=resolved is not None)
        if resolved is None:
            for key, reason in sorted(run.reasons.items()):
                console.say(f"chosen   {key}={configuration.get(run.config, key)}: {reason}")
            folder.write_text(out / "config.yaml", configuration.dump(run.config, config, run.reasons))
        return _train(run, out, recipe)


def _continued(config: Config, out: Path) -> Config | None:
    """The resolved configuration of the run in `out`, with today's `free` keys; None if there is no run yet.

    Raises RunMismatch if what is asked now differs in a `fixed` key.
    """
    path = out / "config.yaml"
    if not path.is_file():
        return None
    resolved, asked = configuration.read_resolved(path)
    if different := configuration.changes(asked, config):
        key, old, new = different[0]
        more = f" (and {len(different) - 1} more keys)" if different[1:] else ""
        raise RunMismatch(
            f"{out} was started with {key}={old}, now {key}={new}{more}; "
            "use the old value, another --out, or --fresh to set the old run aside"
        )
    free = {
        key: configuration.get(config, key)
        for key, field in configuration.keys().items()
        if field.json_schema_extra["resume"] == "free" and configuration.get(config, key) is not None
    }
    return configuration.with_values(resolved, free)


def _shards(config: Config, base: Loaded | None, out: Path) -> Shards:
    """A run that has checkpoints keeps the ids it began with, wherever the text is now; else they are made."""
    path = Path(config.data.shards or out / "data")
    if listing(out / "checkpoints") and path.is_dir():
        try:
            return shard_folder.open_shards(path)
        except DataError as error:
            console.warn(f"{error}; making the shards again from the text")
    return shard_folder.prepare(config.data, config.tokenizer, path, base.tokenizer if base else None)


def set_aside(out: Path) -> None:
    """Moves an old run out of the way, to `out.1`, `out.2`, ..."""
    if out.exists():
        number = 1
        while out.with_name(f"{out.name}.{number}").exists():
            number += 1
        with folder.storage_errors(out):
            out.rename(out.with_name(f"{out.name}.{number}"))
        console.say(f"run      the old one is now {out.with_name(f'{out.name}.{number}')}")


def _train(run: setup.Run, out: Path, recipe: str) -> dict[str, Any]:
    config, shards, state, layout = run.config, run.shards, run.state, run.layout
    total = config.train.max_steps
    assert total and config.train.context and config.train.checkpoint_every
    if newest := newest_good(out / "checkpoints"):
        facts = restore(state, newest)
        shard_folder.same_data(shards, facts["data"])
        console.say(f"run      continues {out} from step {state.step}")
    facts = {"data": shards.identity, "threads": config.train.threads, "versions": runtime.versions()}
    rate = runtime.matmul_rate(layout.device, layout.dtype)
    flops = flops_per_token(state.model.config, config.train.context)
    console.say(
        f"model    {state.model.config.family}, {count(parameter_count(state.model.config))} parameters, width "
        f"{state.model.config.hidden_size}, {state.model.config.num_hidden_layers} layers; {layout.device} "
        f"{str(layout.dtype).removeprefix('torch.')}, {rate / 1e9:.0f} GFLOP/s in a matmul"
    )
    console.say(f"data     {run.loader.report()}")
    metrics = Metrics(out, state.step, config.train.tensorboard)
    metrics.hyperparameters((out / "config.yaml").read_text(encoding="utf-8"), config)
    logger = Logger(
        metrics,
        config.train.log_every,
        total,
        shards.train.bytes_per_token,
        flops,
        rate,
        len(run.loader.plan(0)),
    )
    evaluator = Evaluator(metrics, shards, config, total, run.eval_rows)
    hooks: list[loop.Hook] = [
        logger,
        evaluator,
        Sampler(metrics, shards.tokenizer, run.stop_ids, config, total),
        Budget(config, total, run.most_steps, state),
        Checkpointer(out / "checkpoints", config.train.checkpoint_every, total, facts),
    ]
    try:
        loop.run(state, run.loader, NextToken(), config.train, layout, total, hooks)
        final = evaluator.measure(state)
    finally:
        metrics.close()
    speed = state.tokens / max(state.seconds, 1e-9)
    result = {
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": round(runtime.process_seconds(), 2),
        "train_seconds": round(state.seconds, 2),
        "tokens_per_second": round(speed, 1),
        "mfu": round(speed * flops / rate, 4),
        "matmul_gflops": round(rate / 1e9, 1),
        "peak_memory_bytes": runtime.peak_memory(),
        "parameters": parameter_count(state.model.config),
        "stopped": state.stopped or f"reached step {state.step}",
        "train": {"loss": metrics.last_loss},
        "eval": final.as_dict(),
        "model": str(out / "model"),
        "recipe": recipe,
    }
    lineage = _lineage(config, shards, run.base, recipe, result)
    build.save(out / "model", state.model, shards.tokenizer, lineage)
    result["seconds"] = round(runtime.process_seconds(), 2)
    folder.write_json(out / "result.json", result)
    console.say(
        f"trained  {state.step} steps in {duration(state.seconds)}: eval loss {final.loss:.4f}, "
        f"{final.bits_per_byte:.3f} bits/byte -> {out / 'model'}"
    )
    return result


def _lineage(
    config: Config, shards: Shards, base: Loaded | None, recipe: str, result: dict[str, Any]
) -> dict[str, Any]:
    versions = runtime.versions()
    return {
        "gptworks": versions["gptworks"],
        "torch": versions["torch"],
        "recipe": recipe,
        "data": config.data.train,
        "data_sha256": shards.manifest["source_sha256"],
        "split": shards.manifest["split"],
        "parents": [{"path": str(base.path), "sha256": folder.sha256(base.path / "model.safetensors")}] if base else [],
        "config": config.model_dump(mode="json"),
        "metrics": {f"eval_{key}": value for key, value in result["eval"].items()}
        | {"steps": result["steps"], "training_tokens": result["tokens"]},
    }


# -- after training ----------------------------------------------------------------------------------------------


def evaluate(
    model: str | Path | Loaded, data: str, context: int | None = None, stride: int | None = None, rows: int = 16,
    separator: str | None = None, text_column: str | None = None, against: str | Path | Loaded | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Exact loss, perplexity and bits per byte of a whole file, beside what unigrams and `xz -9e` need.

    With `against`, the same figures of another model, whose tokenizer may be another, and the paired difference.
    """
    models = [_loaded(each) for each in (model, against) if each is not None]
    contexts = [_context(each, context, stride) for each in models]
    options = configuration.Data(separator=separator, text_column=text_column)
    documents = shard_folder.read_documents(data, options)
    places, sizes = comparison.cut(documents)
    scored = [
        _score(each, data, documents, places, length, stride, rows)
        for each, length in zip(models, contexts, strict=True)
    ]
    found, bits = scored[0]
    found["baselines"]["xz"] = xz("".join(documents).encode("utf-8", "replace"))
    for figures, other in scored[1:]:
        del figures["baselines"]
        difference = comparison.compare(bits, other, sizes)
        found["against"] = figures | difference.as_dict(found["model"], figures["model"])
    return found | {"data": data}


def _context(loaded: Loaded, asked: int | None, stride: int | None) -> int:
    """How many tokens the model sees at once. Raises UsageError for more than it has positions for."""
    limit = loaded.model.config.max_position_embeddings
    context = asked or limit
    if not 1 <= context <= limit:
        raise UsageError(f"--context {context}: {loaded.path} has positions for 1 to {limit}")
    if stride is not None and not 1 <= stride <= context:
        raise UsageError(f"--stride {stride}: must be between 1 and the context, {context} ({loaded.path})")
    return context


def _score(
    loaded: Loaded, data: str, documents: list[str], places: list[list[int]], context: int, stride: int | None,
    rows: int,
) -> tuple[dict[str, Any], np.ndarray]:  # fmt: skip
    """A model's figures, and the bits that it needs up to each place of the text."""
    stream, marks = shard_folder.encode_documents(documents, loaded.tokenizer, places)
    if len(stream.tokens) < 2:
        raise DataError(f"{data}: too little text to evaluate")
    shard_folder.check_ids(stream, loaded.model.config.vocab_size, data)
    start = time.perf_counter()
    losses = list(stream_losses(loaded.model, stream, context, rows, stride))
    seconds = time.perf_counter() - start
    found = total(losses, stream)
    method = f"windows of {context} every {stride}" if stride and stride != context else f"blocks of {context}"
    figures = {
        **found.as_dict(),
        "method": method,
        "tokens_per_second": round(found.tokens / max(seconds, 1e-9), 1),
        "baselines": {"unigram": unigram(stream)},
        "model": str(loaded.path),
    }
    return figures, comparison.bits_before(np.concatenate(losses), marks)


def generate(
    model: str | Path | Loaded, prompts: list[str], how: Sampling, max_new_tokens: int, **options: Any
) -> list[dict[str, Any]]:
    """Continues each prompt; `options` are Engine.stream's."""
    engine = engine_of(model)
    results = []
    for prompt in prompts:
        made = engine.generate(prompt, how, max_new_tokens, **options)
        results.append(
            {
                "prompt": prompt,
                "text": made.text,
                "tokens": len(made.tokens),
                "finish_reason": made.finish_reason,
                "tokens_per_second": round(made.tokens_per_second, 1),
                "prompt_tokens_per_second": round(made.prompt_tokens_per_second, 1),
            }
        )
    return results


def engine_of(model: str | Path | Loaded) -> Engine:
    loaded = _loaded(model)
    return Engine(loaded.model, loaded.tokenizer, loaded.stop_ids)


def chat(
    model: str | Path | Loaded, how: Sampling, max_new_tokens: int = 200, system: str | None = None
) -> Conversation:
    """A conversation that has not begun, spelled as the model folder says."""
    loaded = _loaded(model)
    spelling = Spelling.of(loaded.path, loaded.tokenizer)
    if not spelling.taught:
        console.say(f"{loaded.path} has no chat template: it was not taught to answer, it continues text")
    return Conversation(engine_of(loaded), spelling, how, max_new_tokens, system)


def _loaded(model: str | Path | Loaded) -> Loaded:
    if isinstance(model, Loaded):
        return model
    loaded = build.load(model)
    loaded.model.to(runtime.device())
    return loaded


def report(run: Path) -> Path:
    """Writes run/report.html, one page that opens offline."""
    from gptworks.report.page import write_report

    if not (run / "config.yaml").is_file():
        raise DataError(f"{run}: not a run folder (it has no config.yaml)")
    return write_report(run)


def verify(path: Path) -> dict[str, Any]:
    """Proves a run or a folder: a run is replayed from its older checkpoint to its newer and compared bit for bit;
    a model or data folder is checked against its manifest."""
    if not (path / "config.yaml").is_file():
        manifest = folder.verify(path)
        return {
            "verdict": "every file matches its SHA-256",
            "identical": True,
            "files": len(manifest["files"]),
        }
    resolved, _ = configuration.read_resolved(path / "config.yaml")
    with runtime.hold(path):
        checkpoints = listing(path / "checkpoints")
        if len(checkpoints) < 2:
            raise DataError(f"{path}: a replay needs two checkpoints, there are {len(checkpoints)}")
        older, newer = checkpoints[-2:]
        folder.verify(older)
        folder.verify(newer)
        base = build.load(resolved.model.path, resolved.model.dropout) if resolved.model.path else None
        shards = shard_folder.open_shards(Path(resolved.data.shards or path / "data"))
        run = setup.decide(resolved, shards, base, True)
        facts = restore(run.state, older)
        shard_folder.same_data(shards, facts["data"])
        target = setup.decide(resolved, shards, base, True).state
        restore(target, newer)
        first, total = run.state.step, resolved.train.max_steps
        assert total
        evaluator = Evaluator(_Silence(), shards, resolved, total, run.eval_rows)  # type: ignore[arg-type]
        run.state.stopped = None

        def replan(state: State, m: loop.StepMetrics) -> None:
            state.replans += [decided for decided in target.replans if decided[0] == state.step]

        loop.run(
            run.state,
            run.loader,
            NextToken(),
            resolved.train,
            run.layout,
            total,
            [evaluator, replan],
            until=target.step,
        )
        difference = run.state.difference(target)
    return {
        "verdict": "identical to the bit" if difference is None else difference,
        "identical": difference is None,
        "from_step": first,
        "to_step": target.step,
        "fingerprint": run.state.fingerprint(),
    }


class _Silence:
    """Takes the place of Metrics in a replay."""

    def write(self, step: int, values: dict[str, float]) -> None: ...


# -- a whole recipe ----------------------------------------------------------------------------------------------


def run(config: Config, out: Path, recipe: str = "", fresh: bool = False) -> dict[str, Any]:
    """Every stage the recipe names, in order; returns one result for all of them."""
    result: dict[str, Any] = {}
    for stage in config.stages:
        if stage == "train":
            result = train(config, out, recipe, fresh)
            fresh = False
        elif stage == "evaluate":
            held_out = Path(config.data.shards or out / "data") / "validation.jsonl"
            result["evaluation"] = evaluate(out / "model", config.data.eval or str(held_out), config.train.context)
            _say_evaluation(result["evaluation"])
        elif stage == "generate":
            options = config.generate
            how = sampling(options, config.train.seed)
            result["generation"] = generate(out / "model", options.prompts, how, options.max_new_tokens)
            for made in result["generation"]:
                console.say(f"sample   {made['tokens']} tokens, {made['tokens_per_second']:.0f} tokens/s")
                console.say((made["prompt"] + made["text"]).strip())
        elif stage == "report":
            result["seconds"] = round(runtime.process_seconds(), 2)
            folder.write_json(out / "result.json", result)
            result["report"] = str(report(out))
            console.say(f"report   {result['report']}")
    if result:
        result["seconds"] = round(runtime.process_seconds(), 2)
        result["peak_memory_bytes"] = runtime.peak_memory()
        folder.write_json(out / "result.json", result)
    return result


def _say_evaluation(found: dict[str, Any]) -> None:
    baselines = found["baselines"]
    console.say(
        f"scores   {found['loss']:.4f} nats/token, perplexity {found['perplexity']:.2f}, "
        f"{found['bits_per_byte']:.3f} bits/byte over {found['tokens']:,} tokens in {found['method']}"
    )
    packed = f"; xz -9e {baselines['xz']['bits_per_byte']:.3f}" if baselines["xz"] else ""
    console.say(f"scores   bits/byte for scale: unigrams {baselines['unigram']['bits_per_byte']:.3f}{packed}")
