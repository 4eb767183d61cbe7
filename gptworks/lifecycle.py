"""The table of contents: one short function per stage of a model's life, from folder to folder.

The commands and the Python API are these functions. A stage reads folders, does one thing and writes a folder; run it
again and it continues, or says that it is done.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptworks.core import config as configuration
from gptworks.core import folder, runtime
from gptworks.core.config import Config, Data, RunFile, Tokenizer
from gptworks.core.errors import DataError, UsageError
from gptworks.core.log import Progress, console, count, plural, size
from gptworks.core.ranks import ranks
from gptworks.core.registry import nearest
from gptworks.core.results import (
    Compared,
    Evaluated,
    Exported,
    Finished,
    Generated,
    Merged,
    Planned,
    PlannedSize,
    Proposed,
    Pushed,
    Reported,
    Trained,
    Verified,
)
from gptworks.data import shards as shard_folder
from gptworks.data.findings import Findings
from gptworks.data.glance import glance
from gptworks.data.shards import Stream
from gptworks.data.sources import Source, sources_of
from gptworks.exporting.exporter import export as write_export
from gptworks.infer import comparison
from gptworks.infer.chat import ChatFormat, Conversation
from gptworks.infer.engine import Engine
from gptworks.infer.sampling import Sampling
from gptworks.infer.scoring import stream_losses, total, unigram, xz
from gptworks.model import adapters, build, card, hub
from gptworks.model.build import Loaded
from gptworks.planning.choices import Choices, Facts
from gptworks.planning.choose import choose
from gptworks.planning.machine import Machine, here
from gptworks.training import session
from gptworks.training.hooks import sampling
from gptworks.training.metrics import Account
from gptworks.training.plan import outlook
from gptworks.training.plan import plan as plan_of

# -- train -------------------------------------------------------------------------------------------------------


def train(config: Config, out: Path, recipe: str = "", fresh: bool = False) -> Trained | Proposed | None:
    """Tokenizer and shards where missing, then training, to `out/model`; continues what `out` holds.

    Under torchrun every process calls this: the main one prepares and writes, the others wait, then all train. Returns
    what result.json has; with `train.find_lr` the rates that it proposes; None on all processes but the main one.
    Raises GptworksError.
    """
    out = folder.path(out)
    session.check(config)
    result: Trained | Proposed | None
    with runtime.interrupts.listening():
        try:
            if ranks.main:
                if fresh and out.exists():
                    with runtime.hold(out):
                        session.set_aside(out)
                with runtime.hold(out):
                    result = _find_lr(config, out) if config.train.find_lr else session.run_main(config, out, recipe)
            else:
                session.run_worker(config, out)
                result = None
            ranks.say_goodbye()
            return result
        except BaseException:
            if ranks.main:
                session.call_off()
            raise
        finally:
            console.clear()
            ranks.end()


def choices(config: Config, machine: Path | None = None) -> tuple[Choices, PlannedSize | None]:
    """The decisions of `train`, as far as a look at the text tells them, and what it tells of the run, where a text is
    named; for the machine that a file describes, else for this one. Raises DataError, UsageError, OutOfMemory."""
    session.check_values(config)
    if config.model.path not in (None, "???") and not hub.could_be(config.model.path):
        raise UsageError(f"model.path={config.model.path}: no such folder{hub.advice(config.model.path)}")
    if config.model.path and Path(config.model.path).is_dir():
        build.check_folder(Path(config.model.path))
    where = Machine.read(folder.path(machine)) if machine else here(config.train.precision, config.train.threads)
    named = config.problem.kind == "pretraining" and "???" not in config.data.places
    if named and not any(source.function for source in sources_of(config.data.places, config.data)):  # no code is run
        if not config.model.path:
            return outlook(config, where)
        glance(config.data, Tokenizer(kind="bytes"))  # which finds what no run could read
    return choose(config, Facts(_vocabulary_of(config)), where), None


def _vocabulary_of(config: Config) -> int | None:
    """The ids of a fresh model, as far as they are known before a text is read; None where they are not."""
    model, tokenizer = config.model, config.tokenizer
    sized = model.depth or (model.hidden_size and model.num_hidden_layers)
    unread = tokenizer.path or tokenizer.kind == "char"
    if model.path or config.problem.kind != "pretraining" or (unread and not sized):
        return None
    return 259 if tokenizer.kind == "bytes" else tokenizer.vocab_size


def plan(recipe: str, asked: list[str] | dict[str, Any], machine: Path | None = None) -> Planned:
    """Tells what a run of this recipe with these settings, and smaller and larger models, would see, take and reach.

    `machine` is a file that describes another machine. Nothing is written. Raises GptworksError.
    """
    with runtime.interrupts.listening():
        try:
            return plan_of(recipe, asked, Machine.read(folder.path(machine)) if machine else None)
        finally:
            console.clear()


def _find_lr(config: Config, out: Path) -> Proposed:
    """The range test's proposal, and its curve in `out/find_lr.html`."""
    from gptworks.reporting.page import write_range_test

    test = session.find_lr(config, out)
    folder.write_json(out / "find_lr.json", asdict(test))
    page = write_range_test(
        out / "find_lr.html", rates=test.rates, smoothed=test.smoothed, lr=test.lr, reason=test.reason
    )
    also = f" train.adam_lr={test.adam_lr:g}" if test.adam_lr is not None else ""
    console.say(f"found    train.lr={test.lr:g}{also}: {test.reason}")
    console.say(f"found    the curve is in {page}; nothing was trained: give the rates to the command that trains")
    return Proposed(test.lr, test.adam_lr, test.reason, report=str(page))


# -- after training ----------------------------------------------------------------------------------------------


def evaluate(
    model: str | Path | Loaded, data: str, *, context: int | None = None, stride: int | None = None, rows: int = 16,
    separator: str | None = None, text_column: str | None = None, encoding: str | None = None,
    against: str | Path | Loaded | None = None,
) -> Evaluated:  # fmt: skip
    """Exact loss, perplexity and bits per byte of a whole file, beside what unigrams and `xz -9e` need.

    Line ends are read as the model's run read them, where that is known, else as `data.newlines` has them by default.
    With `against`, the same figures of another model, whose tokenizer may be another, and the paired difference.
    """
    if rows < 1:
        raise UsageError(f"--batch {rows}: must be at least 1")
    models = [load(each) for each in (model, against) if each is not None]
    contexts = [_context(each, context, stride) for each in models]
    asked = {"separator": separator, "text_column": text_column, "encoding": encoding} | _newlines(models[0])
    options: Data = configuration.build({"data": asked}, "evaluate").data
    documents = shard_folder.read_documents(data, options)
    places, sizes = comparison.cut(documents if against is not None else [])
    scored = [
        _score(each, documents, places, source=data, context=length, stride=stride, rows=rows)
        for each, length in zip(models, contexts, strict=True)
    ]
    one, *others = scored
    baselines = {"unigram": unigram(one.stream), "xz": xz("".join(documents).encode("utf-8", "replace"))}
    comparisons = [
        Compared(**other.figures, **comparison.compare(one.bits, other.bits, sizes).as_dict(one.name, other.name))
        for other in others
    ]
    return Evaluated(**one.figures, baselines=baselines, data=data, against=comparisons[0] if comparisons else None)


def _newlines(loaded: Loaded) -> dict[str, str]:
    """The setting of the line ends that a model was trained with; empty where its folder does not tell."""
    config = loaded.lineage.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict):
        return {}
    return {"newlines": "lf" if data.get("newlines", "keep") == "lf" else "keep"}  # all stayed before it was a choice


def _context(loaded: Loaded, asked: int | None, stride: int | None) -> int:
    """The number of tokens that the model sees at once. Raises UsageError for more than it has positions for."""
    limit = loaded.model.config.max_position_embeddings
    context = asked or limit
    if not 1 <= context <= limit:
        raise UsageError(f"--context {context}: {loaded.name} has positions for 1 to {limit}")
    if stride is not None and not 1 <= stride <= context:
        raise UsageError(f"--stride {stride}: must be between 1 and the context, {context} ({loaded.name})")
    return context


@dataclass
class _Scored:
    """A model's figures, and the bits that it needs up to each place of the text."""

    figures: dict[str, Any]
    stream: Stream
    bits: np.ndarray

    @property
    def name(self) -> str:
        return str(self.figures["model"])


def _score(
    loaded: Loaded, documents: list[str], places: list[list[int]], *,
    source: str, context: int, stride: int | None, rows: int,
) -> _Scored:  # fmt: skip
    """The exact loss of a model on documents that were read from `source`. Raises DataError."""
    stream, marks = shard_folder.encode_documents(documents, loaded.tokenizer, places)
    if len(stream.tokens) < 2:
        raise DataError(f"{source}: too little text to evaluate")
    shard_folder.check_ids(stream, loaded.tokenizer, rows=loaded.model.config.vocab_size, what=source)
    start = time.perf_counter()
    progress, losses = Progress(f"scoring {loaded.name}", len(stream.tokens) - 1, "tokens"), []
    for part in stream_losses(loaded.model, stream, context, rows=rows, stride=stride):
        losses.append(part)
        progress.add(len(part))
    console.clear()
    seconds = time.perf_counter() - start
    scores = total(losses, stream)
    method = f"windows of {context} every {stride}" if stride and stride != context else f"blocks of {context}"
    figures = {
        **scores.as_dict(),
        "method": method,
        "tokens_per_second": round(scores.tokens / max(seconds, 1e-9), 1),
        "model": loaded.name,
    }
    return _Scored(figures, stream, comparison.bits_before(np.concatenate(losses), marks, stream))


def generate(
    model: str | Path | Loaded, prompts: list[str], how: Sampling, *, max_new_tokens: int = 200, **options: Any
) -> list[Generated]:
    """Continues each prompt; `options` are Engine.stream's."""
    engine = engine_of(model)
    continued = [(prompt, engine.generate(prompt, how, max_new_tokens, **options)) for prompt in prompts]
    return [
        Generated(
            prompt=prompt,
            text=each.text,
            tokens=len(each.tokens),
            finish_reason=each.finish_reason,
            tokens_per_second=round(each.tokens_per_second, 1),
            prompt_tokens_per_second=round(each.prompt_tokens_per_second, 1),
            ids=each.tokens,
        )
        for prompt, each in continued
    ]


def engine_of(model: str | Path | Loaded) -> Engine:
    loaded = load(model)
    return Engine(loaded.model, loaded.tokenizer, loaded.stop_ids)


def chat(
    model: str | Path | Loaded, how: Sampling, max_new_tokens: int = 200, system: str | None = None
) -> Conversation:
    """A conversation that has not begun, spelled as the model folder says."""
    loaded = load(model)
    spelling = ChatFormat.of(loaded.template_home, loaded.tokenizer)
    if not spelling.taught:
        console.say(f"{loaded.name} has no chat template, so replies are plain continuations")
    return Conversation(engine_of(loaded), spelling, how=how, max_new_tokens=max_new_tokens, system=system)


def load(model: str | Path | Loaded) -> Loaded:
    if isinstance(model, Loaded):
        return model
    loaded = build.load(model)
    loaded.model.to(runtime.device())
    return loaded


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MERGE_LOSS = 0.001  # bits per byte that a merged model may differ by without being asked


def merge(
    adapter: str | Path | Loaded, out: Path, *, data: str | None = None, dtype: str = "float32", lossy: bool = False
) -> Merged:
    """Writes the plain model that an adapter's folder amounts to, and how far it is from it on a text in bits per byte.

    A low-bit base is taken as the values that its codes stand for, which the adapter was trained beside. `data` is the
    run's validation text if left out. Raises UsageError where the two differ by more than MERGE_LOSS, unless `lossy`.
    """
    loaded = load(adapter)
    out = folder.path(out)
    if loaded.adapter is None:
        raise UsageError(f"{loaded.name}: has no adapter to merge; it is a whole model")
    if (data := data or _validation_text(loaded)) is None:
        raise UsageError("give --data FILE: the text on which the merged model is compared with the adapter")
    if out.exists():
        raise UsageError(f"{out} exists; choose another --out")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: {nearest(dtype, list(DTYPES))}")
    kept = DTYPES[dtype]
    merged = adapters.merge(loaded.model)
    for parameter in merged.parameters():  # as the file will have it
        parameter.data = parameter.data.to(kept).float()
    plain = replace(loaded, model=merged, adapter=None)
    apart, together = (evaluate(each, data) for each in (loaded, plain))
    difference = together.bits_per_byte - apart.bits_per_byte
    if abs(difference) > MERGE_LOSS and not lossy:
        raise UsageError(
            f"merged in {dtype}, the model needs {difference:+.4f} bits/byte, more than {MERGE_LOSS} off what the "
            "adapter gives; take --dtype float32, or --lossy if that is good enough"
        )
    lineage = {
        "license": card.license_of(loaded.home),
        **loaded.lineage,
        "parents": [
            {"role": "base", "path": card.told(hub.name_of(loaded.home.resolve())), "sha256": loaded.weights_sha256},
            {"role": "adapter", "path": card.told(hub.name_of(loaded.path.resolve())), "sha256": loaded.own_sha256},
        ],
        "metrics": {f"eval_{key}": together[key] for key in ("loss", "perplexity", "bits_per_byte", "tokens")},
    }
    build.save(out, merged, tokenizer=loaded.tokenizer, lineage=lineage, dtype=kept, base=loaded)
    return Merged(
        model=str(out), dtype=dtype, data=data, tokens=together.tokens, bits_per_byte=together.bits_per_byte,
        adapter_bits_per_byte=apart.bits_per_byte, difference_bits_per_byte=difference,
    )  # fmt: skip


def _validation_text(loaded: Loaded) -> str | None:
    """The text that was held out of a model's run, where its folder lies in that."""
    file = loaded.path.resolve().parent / "data" / "validation.jsonl"
    return str(file) if file.is_file() else None


def push(path: Path, name: str, private: bool = False) -> Pushed:
    """Puts a model's folder on the hub as `owner/name`, once it is what its manifest says, and first says what is sent.

    Hidden files stay here, and so does the path of an adapter's base: that is sent as its name.
    """
    path = folder.path(path)
    if not any((path / file).is_file() for file in ("config.json", build.ADAPTER)):
        raise DataError(f"{path}: no model folder: it has no config.json and no {build.ADAPTER}")
    if (path / folder.MANIFEST).is_file():
        build.verify(path)
    places = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
    shown = [place for place in places if not any(part.startswith(".") for part in place.parts)]
    files: dict[str, Path | bytes] = {place.as_posix(): path / place for place in shown}
    if (path / build.ADAPTER).is_file():
        settings = folder.read_json(path / build.ADAPTER)
        base = str(settings.get("base_model_name_or_path"))
        if Path(base).exists() or Path(base).is_absolute():
            sent = f"./{card.place(base)}"  # never a name of the hub
            console.warn(f"the adapter's base is {base}, a folder of this machine; others need it, as {sent}")
            changed = {**settings, "base_model_name_or_path": sent}
            files[build.ADAPTER] = (json.dumps(changed, indent=2) + "\n").encode()
    _say_what_is_sent(path, files, name)
    return Pushed(hub.push(files, name, private))


def _say_what_is_sent(path: Path, files: dict[str, Path | bytes], name: str) -> None:
    """The files with their sizes, the text that the model was trained on, and what names folders of this machine."""
    sizes = {file: len(what) if isinstance(what, bytes) else what.stat().st_size for file, what in files.items()}
    console.say(f"push     {len(files)} files, {size(sum(sizes.values()))}, to {name}:")
    for file, length in sizes.items():
        console.say(f"push     {file} ({size(length)})")
    lineage = folder.read_json(path / build.LINEAGE) if build.LINEAGE in files else {}
    if isinstance(lineage, dict) and lineage.get("data"):
        console.say(f"push     they name the training text: {str(lineage['data'])[:500]}")
    home = str(Path.home())
    for file in ("README.md", build.LINEAGE):
        if file in files and home in (path / file).read_text(encoding="utf-8", errors="replace"):
            console.warn(f"{file} has paths of this machine in it, such as {home}")


def report(run: Path) -> Reported:
    """Writes run/report.html, one page that opens offline."""
    from gptworks.reporting.page import write_report

    run = folder.path(run)
    if not (run / "config.yaml").is_file():
        raise DataError(f"{run}: not a run folder (it has no config.yaml)")
    return Reported(str(write_report(run)))


MOST_TOKENS = 1_000_000  # that an export is compared on


def export(
    model: str | Path | Loaded, format: str, out: Path, *, kind: str | None = None, data: str | None = None,
    tokens: int = 512, dry_run: bool = False,
) -> Exported:  # fmt: skip
    """Writes a model in the format of another program, reads it back and compares it with the source.

    `kind` is the type of the weights (default: the format's own); `tokens` of the text `data` are compared (default:
    the run's validation text, where the model lies in its run, else a packaged one). What fails the comparison is not
    kept (DataError). Of an adapter, what it amounts to with its base is written.
    """
    if not 1 <= tokens <= MOST_TOKENS:
        raise UsageError(f"--tokens {tokens}: must be between 1 and {MOST_TOKENS:,}")
    loaded = model if isinstance(model, Loaded) else build.load(model)
    if loaded.adapter:
        loaded = replace(loaded, model=adapters.merge(loaded.model).eval())
    source = data or _validation_text(loaded) or "shakespeare"
    text = _beginning(source, 16 * tokens)
    try:
        loaded.tokenizer.encode(text)
    except DataError as error:
        raise DataError(f"{source}: the text to compare on is {error}; --data FILE names another") from None
    return write_export(
        loaded, format, folder.path(out), kind=kind, text=text, source=source, tokens=tokens, dry_run=dry_run
    )


def _beginning(data: str, characters: int) -> str:
    """The first `characters` characters of a text; reads no further. Raises DataError."""
    text = ""
    for piece in Source(data, configuration.build({}, "export").data).pieces(Findings(data)):
        text += piece.text
        if len(text) >= characters:
            break
    if not text:
        raise DataError(f"{data}: no text")
    return text[:characters]


def verify(path: Path) -> Verified:
    """Proves a run or a folder: a run is replayed from its older checkpoint to its newer and compared bit for bit;
    a model or data folder is checked against its manifest."""
    path = folder.path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    if not (path / "config.yaml").is_file():
        if not (path / folder.MANIFEST).exists():
            raise DataError(f"{path}: no run, model or data: it has no config.yaml and no {folder.MANIFEST}")
        manifest = build.verify(path)
        edited = build.edited(path, manifest)
        but = f", but for {', '.join(edited)}, which may be edited" if edited else ""
        return Verified(f"every file matches its SHA-256{but}", identical=True, files=len(manifest["files"]))
    with runtime.hold(path, reading=True):
        return session.replay(path)


# -- a whole recipe ----------------------------------------------------------------------------------------------


@dataclass
class _Running:
    """A recipe on its way through its stages."""

    config: Config
    out: Path
    recipe: str
    fresh: bool
    finished: Finished
    trained: bool = False  # by this process

    def add(self, **results: Any) -> None:
        """Keeps what a stage gave."""
        self.finished = replace(self.finished, **results)

    @contextmanager
    def spent(self, what: str) -> Iterator[None]:
        """Counts the seconds of the block among the run's, where this process trained it."""
        account = Account(self.out)
        with account.spent(what):
            yield
        if self.trained:
            account.write()

    def write(self) -> None:
        """A result.json says that the training is finished, so there is none without its figures. Time and memory are
        those of the process that trained, and of the stages in it, not of one that came later."""
        if self.finished.training is None:
            return
        if self.trained:
            seconds, memory = round(runtime.process_seconds(), 2), runtime.peak_memory()
            self.add(training=replace(self.finished.training, seconds=seconds, peak_memory_bytes=memory))
        folder.write_json(self.out / "result.json", self.finished.as_dict())


def run(config: Config, out: Path, recipe: str = "", fresh: bool = False) -> Finished | Proposed | None:
    """Every stage the recipe names, in order; returns one result for all of them. Where training gives no model, its
    own: None on all processes but the main one, which alone goes on, and a range test's."""
    out = folder.path(out)
    running, file = _Running(config, out, recipe, fresh=fresh, finished=Finished(None)), out / "result.json"
    if "train" not in config.stages:
        if not (out / "model").is_dir():
            raise DataError(f"{out}: no model here yet; the stages {', '.join(config.stages)} come after train")
        if file.is_file():
            running.add(training=Trained.read(file))
    for stage in config.stages:
        after = STAGES[stage](running)
        if not isinstance(after, _Running):
            return after
    running.write()
    return running.finished


def _train(running: _Running) -> _Running | Proposed | None:
    file = running.out / "result.json"
    before = file.read_bytes() if file.is_file() else b""
    result = train(running.config, running.out, running.recipe, fresh=running.fresh)
    if not isinstance(result, Trained):
        return result
    running.fresh, running.trained = False, file.read_bytes() != before
    running.add(training=result)
    return running


def _evaluate(running: _Running) -> _Running:
    config, out = running.config, running.out
    held_out = Path(config.data.shards or out / "data") / "validation.jsonl"
    if not held_out.is_file():
        console.say(f"scores   no text to score: {config.problem.kind} holds none out")
        return running
    with running.spent("evaluating"):
        scores = evaluate(out / "model", str(held_out), context=config.train.context)
    running.add(evaluation=scores)
    xz, unigrams = scores.baselines["xz"], scores.baselines["unigram"] or {}
    console.say(
        f"scores   {scores.loss:.4f} nats/token, perplexity {scores.perplexity:.2f}, "
        f"{scores.bits_per_byte:.3f} bits/byte over {plural(scores.tokens, 'token')} in {scores.method}"
    )
    if scores.lost_bytes:
        console.say(f"scores   {shard_folder.lost_words(scores.lost_bytes, scores.bytes)}")
    packed = f"; xz -9e {xz['bits_per_byte']:.3f}" if xz else ""
    console.say(f"scores   bits/byte for scale: unigrams {unigrams['bits_per_byte']:.3f}{packed}")
    if scores.loss > unigrams["loss"] and running.finished.training:
        seen = count(running.finished.training.tokens)
        console.say(
            f"note     worse than counting tokens, after {seen} of them: more time (train.time_budget_s) or a smaller "
            "model (model.parameters) would help most"
        )
    return running


def _generate(running: _Running) -> _Running:
    config, options = running.config, running.config.generate
    if "generate" not in configuration.problem_of({"problem": config.problem.kind}).sections:
        console.say(f"sample   none: {config.problem.kind} has no prompts")
        return running
    how, prompts, file = sampling(options, config.train.seed), options.prompts, running.out / "config.yaml"
    if prompts is None:  # then those that the run has
        prompts = RunFile.read(file).chosen.generate.prompts if file.is_file() else [""]
    with running.spent("sampling"):
        model = load(running.out / "model")
        # Of one seed, two prompts would go on alike as soon as the model forgets them.
        samples = [
            each
            for number, prompt in enumerate(prompts)
            for each in generate(
                model, [prompt], replace(how, seed=(how.seed or 0) + number), max_new_tokens=options.max_new_tokens
            )
        ]
    running.add(generation=samples)
    for sample in samples:
        console.say(f"sample   {plural(sample.tokens, 'token')}, {sample.tokens_per_second:.0f} tokens/s")
        console.say((sample.prompt + sample.text).strip())
    return running


def _report(running: _Running) -> _Running:
    running.write()  # the page shows it
    running.add(report=report(running.out).report)
    console.say(f"report   {running.finished.report}")
    return running


# The stages of `gptworks run`: each does one thing and returns what goes on, or what the recipe ends with.
STAGES: dict[str, Callable[[_Running], _Running | Proposed | None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "generate": _generate,
    "report": _report,
}
