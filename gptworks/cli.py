"""The command line: parse, call one stage, print. Standard output carries results, standard error all else."""

import errno
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from gptworks import printed
from gptworks.core.errors import DataError, GptworksError, Preempted, StorageError, UsageError
from gptworks.core.log import PRINTABLE, console, plural, unfailing, unwritten
from gptworks.core.registry import text_of, users_place, users_problems
from gptworks.core.results import Result

app = typer.Typer(
    help="Train, evaluate, use and export GPT-style language models: from a text to a folder that other tools open.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        _do(lambda: _put(f"gptworks {version('gptworks')}\n"), False)
        raise typer.Exit


@app.callback()
def everywhere(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def _known_recipes(incomplete: str) -> list[str]:
    """Built-in recipes for the shell's completion; files are its own."""
    from gptworks.core.config import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def _known_keys(incomplete: str) -> list[str]:
    """Configuration keys for the shell's completion."""
    from gptworks.core.config import keys

    return [f"{key}=" for key in keys() if key.startswith(incomplete)]


Recipe = Annotated[
    str,
    typer.Argument(
        help="A built-in name (`gptworks recipes`) or a YAML file.", show_default=False, autocompletion=_known_recipes
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings as key=value, for example train.max_steps=100; `gptworks keys` lists them.",
        show_default=False, autocompletion=_known_keys,
    ),
]  # fmt: skip
Temperature = Annotated[float, typer.Option(help="Higher is bolder; 0 takes the likeliest token always.")]
TopK = Annotated[int, typer.Option(help="Choose among so many of the likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Choose among the likeliest that have this share together.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
Penalty = Annotated[float, typer.Option(help="Above 1, tokens that were there become less likely.")]
Run = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option(help="The run folder; default runs/RECIPE, of a run's file runs/RUN-again.", show_default=False),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Set an old run in the folder aside and start over.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="On standard error, only warnings and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and do nothing.")]
MachineFile = Annotated[
    Path | None,
    typer.Option(help="With --dry-run: decide for the machine in this file, written by `gptworks env --json`."),
]
Folder = Annotated[
    Path, typer.Argument(help="A model folder, or owner/name[@revision] on the hub.", show_default=False)
]


def _do(work: Callable[[], Any], debug: bool) -> Any:
    """Runs a stage; a failure becomes one line and its exit code."""
    from gptworks.core.runtime import interrupts

    try:
        with interrupts.leaving():
            return work()
    except GptworksError as error:
        _fail(str(error), error.code, debug)
    except KeyboardInterrupt:
        _fail("stopped by Ctrl-C; run the same command again", 75, debug)
    except BaseException as error:
        if (explained := _explained(error)) is None:
            raise
        _fail(*explained, debug)


def _explained(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit code of an error that nobody expected; None for one that is how Python ends a process."""
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search("out of memory|allocate memory", text_of(error))  # torch's words
    ):
        return "out of memory; use a smaller model, context or micro-batch", 77
    if isinstance(error, RuntimeError) and "start new thread" in text_of(error):
        return "the system starts no more threads or processes; end others, or raise the limit (ulimit -u)", 77
    said = f"{type(error).__name__}: {text_of(error)}"
    if place := users_place(error):  # a mistake in a file that was named by file.py:Name
        return f"{place}: {said} (--debug shows more)", 64
    if isinstance(error, OSError):
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "input/output"
        return f"{name}: {error.strerror or error}", 74
    if not isinstance(error, Exception):
        return None
    if files := users_problems():
        asked = "what it gives has to be as gptworks/training/problem.py says; if it is, please report a bug"
        return f"{', '.join(files)}: {said}: {asked} (--debug shows where)", 64
    return f"a bug in gptworks: {said} (--debug shows where; please report it)", 70


def _fail(message: str, code: int, debug: bool) -> None:
    from gptworks.core.ranks import ranks
    from gptworks.core.runtime import interrupts

    console.clear()
    if debug:
        traceback.print_exc()
    who = f"rank {ranks.rank}: " if ranks.world > 1 else ""
    console.fail(f"{who}{_one_line(message)}", asked=code == Preempted.code)
    if ranks.world > 1 or interrupts.left_behind():  # neither a broken group nor work on its way may hold up the end
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)


def _one_line(message: str, most: int = 1000) -> str:
    """A message may quote what a user gave, which may be of any length."""
    line = " ".join(message.split()).translate(PRINTABLE)
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


def _print(result: Any, as_json: bool, lines: Callable[[Any], str]) -> None:
    _put((_json(result) if as_json else lines(result)) + "\n")


def _json(value: Any) -> str:
    value = value.as_dict() if isinstance(value, Result) else value
    return json.dumps(value, ensure_ascii=(getattr(sys.stdout, "encoding", None) or "").lower() != "utf-8")


def _put(text: str) -> None:
    """Writes to standard output, without a live line in the way. Raises StorageError; a reader who has seen enough
    (`| head -1`) is no error."""
    console.clear()
    print(text.translate(PRINTABLE) if sys.stdout.isatty() else text, end="", flush=True)
    _check_output()


def _check_output() -> None:
    """Raises StorageError where standard output took not all; if its reader has seen enough, the process ends."""
    error = unwritten(sys.stdout)
    if isinstance(error, BrokenPipeError):
        raise SystemExit(0)
    if error:
        raise StorageError(f"standard output: {error.strerror or error}; free space or write it elsewhere")


def _stage(
    name: str, recipe: str, overrides: list[str] | None, *, out: Path | None, fresh: bool, as_json: bool, quiet: bool,
    debug: bool, dry_run: bool, machine: Path | None,
) -> None:  # fmt: skip
    console.quiet = quiet

    def work() -> None:
        for path in (recipe, str(out or "")):
            if re.search("[\ud800-\udfff]", path):
                raise UsageError(f"{path!r}: the name is not valid UTF-8, as the run writes it down; choose another")
        from gptworks.core import config as configuration

        if name == "continue":
            config, named = configuration.continued(Path(recipe), overrides)
            folder = Path(recipe)
        else:
            config, named = configuration.load(recipe, overrides), recipe
            folder = out or configuration.usual_folder(recipe)
        from gptworks import lifecycle

        if machine and not dry_run:
            raise UsageError("--machine says what another machine would do: it goes with --dry-run")
        if dry_run:
            choices, expected = lifecycle.choices(config, machine)
            asked = choices.config.model_dump(mode="json")
            _put(
                (_json(asked) if as_json else printed.dry_run(choices, expected, "there" if machine else "here")) + "\n"
            )
            return
        stage = lifecycle.train if name == "train" else lifecycle.run
        result = stage(config, folder, named, fresh=fresh)
        if as_json and result:
            _put(_json(result) + "\n")

    _do(work, debug)


@app.command()
def run(recipe: Recipe, overrides: Overrides = None, out: Out = None, fresh: Fresh = False, json: Json = False,
        quiet: Quiet = False, debug: Debug = False, dry_run: DryRun = False,
        machine: MachineFile = None) -> None:  # fmt: skip
    """Do every stage of a recipe; run it again and it continues.

    --json prints the result. `gptworks keys` lists all settings.
    """
    _stage(
        "run", recipe, overrides, out=out, fresh=fresh, as_json=json, quiet=quiet, debug=debug, dry_run=dry_run,
        machine=machine,
    )  # fmt: skip


@app.command()
def train(recipe: Recipe, overrides: Overrides = None, out: Out = None, fresh: Fresh = False, json: Json = False,
          quiet: Quiet = False, debug: Debug = False, dry_run: DryRun = False,
          machine: MachineFile = None) -> None:  # fmt: skip
    """Train on a text; run it again and it continues.

    Tokenizer and shards are made where they are missing. --json prints the result. `gptworks keys` lists all settings.
    """
    _stage(
        "train", recipe, overrides, out=out, fresh=fresh, as_json=json, quiet=quiet, debug=debug, dry_run=dry_run,
        machine=machine,
    )  # fmt: skip


@app.command(name="continue")
def continue_(run: Run, overrides: Overrides = None, json: Json = False, quiet: Quiet = False,
              debug: Debug = False) -> None:  # fmt: skip
    """Go on with a run, as it was asked for or changed.

    It needs nothing but the run's folder. Settings given here change it from now on: train.max_steps=2000 makes a
    finished run longer.
    """
    _stage(
        "continue", str(run), overrides, out=None, fresh=False, as_json=json, quiet=quiet, debug=debug, dry_run=False,
        machine=None,
    )  # fmt: skip


@app.command()
def evaluate(
    folder: Folder,
    data: Annotated[str, typer.Option(help="Text to score: file, folder, glob or built-in name.")],
    context: Annotated[int | None, typer.Option(help="Block length in tokens; default the model's.", min=1)] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; default: the context.")] = None,
    batch: Annotated[int, typer.Option(help="Blocks at a time; results differ by rounding.", min=1, max=65536)] = 16,
    separator: Annotated[str | None, typer.Option(help="Cuts a text file into documents.")] = None,
    text_column: Annotated[str | None, typer.Option(help="The column that holds the text.")] = None,
    encoding: Annotated[str | None, typer.Option(help="Of the text, if neither UTF-8 nor told by its bytes.")] = None,
    against: Annotated[list[Path] | None, typer.Option(help="Another model folder, on the same text.")] = None,
    json: Json = False, quiet: Quiet = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Score a text: exact loss, perplexity, bits per byte.

    Beside them stands what simple methods reach, or another model.
    """
    console.quiet = quiet

    def work() -> Any:
        from gptworks import lifecycle

        if len(against or []) > 1:
            raise UsageError("--against takes one model: compare with one after another")
        return lifecycle.evaluate(
            folder, data, context=context, stride=stride, rows=batch, separator=separator, text_column=text_column,
            encoding=encoding, against=against[0] if against else None,
        )  # fmt: skip

    _do(lambda: _print(work(), json, printed.evaluation), debug)


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one a line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation.", min=1)] = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given again.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-text.")] = False,
    json: Json = False, quiet: Quiet = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Continue a prompt; the text streams."""
    console.quiet = quiet

    def work() -> None:
        from gptworks import lifecycle
        from gptworks.core import folder as files
        from gptworks.infer.engine import Generation
        from gptworks.infer.sampling import Sampling

        if (prompt is None) == (prompts is None):
            raise UsageError("give --prompt TEXT or --prompts FILE")
        how = Sampling(repetition_penalty, temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        if prompts is not None:
            try:
                texts = [line for line in files.path(prompts).read_text(encoding="utf-8-sig").split("\n") if line]
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{prompts}: cannot read the prompts: {error}") from None
        else:
            texts = [(prompt or "").encode("utf-8", "replace").decode("utf-8")]  # a terminal may send broken bytes
        options: dict[str, Any] = {"stop": tuple(stop or ()), "ignore_eos": ignore_eos}
        if json:
            results = [
                each.as_dict()
                for each in lifecycle.generate(folder, texts, how, max_new_tokens=max_new_tokens, **options)
            ]
            _put(_json(results[0] if prompt is not None else {"results": results}) + "\n")
            return
        engine = lifecycle.engine_of(folder)
        for text in texts:
            generation = Generation(text)
            engine.prompt_ids(text)  # an error before anything is printed
            _put(text)
            for part in engine.stream(text, how, max_new_tokens, result=generation, **options):
                _put(part)
            _put("\n")
            speed = f"{generation.tokens_per_second:.0f} tokens/s"
            console.say(f"[{plural(len(generation.tokens), 'token')}, {speed}, {generation.finish_reason}]")

    _do(work, debug)


@app.command()
def chat(
    folder: Folder,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply.", min=1)] = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed and messages, same replies.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a reply on standard output.")] = False,
    quiet: Quiet = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Talk with a model; from a pipe, each line is a message."""
    console.quiet = quiet

    def work() -> None:
        from gptworks import lifecycle
        from gptworks.infer.sampling import Sampling
        from gptworks.infer.terminal import Terminal

        how = Sampling(repetition_penalty, temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        Terminal(lifecycle.chat(folder, how, max_new_tokens=max_new_tokens, system=system), _put, json).run()

    _do(work, debug)


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="An adapter's folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    data: Annotated[str | None, typer.Option(help="Text to compare on; default the run's validation text.")] = None,
    dtype: Annotated[str, typer.Option(help="Data type of the weights: float32, bfloat16 or float16.")] = "float32",
    lossy: Annotated[bool, typer.Option("--lossy", help="Write it even if it differs noticeably.")] = False,
    json: Json = False, quiet: Quiet = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Make one plain model of an adapter and its base.

    It is compared with the two before it is written.
    """
    console.quiet = quiet

    def work() -> Any:
        from gptworks import lifecycle

        return lifecycle.merge(folder, out, data=data, dtype=dtype, lossy=lossy)

    _do(lambda: _print(work(), json, printed.merged), debug)


@app.command()
def export(
    folder: Folder,
    format: Annotated[str, typer.Option(help="gguf (llama.cpp) or onnx.")],
    out: Annotated[Path, typer.Option(help="What to write: a file for gguf, a folder for onnx.")],
    type: Annotated[
        str | None,
        typer.Option(
            help="Number format: f16 (default), f32, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0 for gguf, f32 for onnx."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Text to compare on; default the run's validation text.")] = None,
    tokens: Annotated[int, typer.Option(help="Number of tokens to compare.", min=1, max=1_000_000)] = 512,
    json: Json = False, quiet: Quiet = False, debug: Debug = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the size and write nothing.")] = False,
) -> None:  # fmt: skip
    """Write a model as GGUF or ONNX, and compare the file with it."""
    console.quiet = quiet

    def work() -> Any:
        from gptworks import lifecycle

        return lifecycle.export(folder, format, out, kind=type, data=data, tokens=tokens, dry_run=dry_run)

    _do(lambda: _print(work(), json, printed.exported), debug)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A model folder.", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Its name on the hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is new.")] = False,
    json: Json = False, quiet: Quiet = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Put a model folder on the Hugging Face hub.

    It takes the token you are logged in with.
    """
    console.quiet = quiet

    def work() -> Any:
        from gptworks import lifecycle

        return lifecycle.push(folder, name, private)

    _do(lambda: _print(work(), json, lambda result: result.url), debug)


@app.command()
def report(
    folder: Run,
    json: Json = False, quiet: Quiet = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Write the run's report.html, one page that opens offline."""
    console.quiet = quiet

    def work() -> Any:
        from gptworks import lifecycle

        return lifecycle.report(folder)

    _do(lambda: _print(work(), json, lambda result: result.report), debug)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A run, model, data or checkpoint folder.", show_default=False)],
    json: Json = False, quiet: Quiet = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Replay a run bit for bit, or check a folder's hashes.

    A run is trained again from its older checkpoint to its newer, and compared.
    """
    console.quiet = quiet

    def work() -> Any:
        from gptworks import lifecycle

        verified = lifecycle.verify(folder)
        with suppress(SystemExit):  # nobody reads it: the exit code says it too
            _print(verified, json, lambda result: result.verdict)
        return verified.identical

    if not _do(work, debug):
        raise SystemExit(65)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, two or more.", show_default=False)],
    json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Put runs side by side: results, and what differs in settings.

    It reads their files alone; `gptworks evaluate --against` compares two models on one text.
    """

    def work() -> Any:
        from gptworks.reporting.compare import compare as side_by_side

        return side_by_side(runs)

    _do(lambda: _print(work(), json, printed.compared), debug)


@app.command()
def plan(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] KEY=VALUE...", show_default=False, autocompletion=_known_keys,
            help="Settings, data.train=FILE among them; first a recipe, if other than mine.",
        ),
    ] = None,
    machine: Annotated[
        Path | None, typer.Option(help="Tell the time on this machine too: a file that `gptworks env --json` wrote.")
    ] = None,
    json: Json = False, quiet: Quiet = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Say what three sizes of model would see, take and reach.

    It reads a part of the text, times a few steps here, and writes nothing.
    """
    console.quiet = quiet

    def work() -> Any:
        from gptworks import lifecycle

        recipe, *asked = settings or ["mine"]
        if "=" in recipe:
            recipe, asked = "mine", [recipe, *asked]
        return lifecycle.plan(recipe, asked, machine)

    _do(lambda: _print(work(), json, printed.planned), debug)


@app.command()
def keys(
    pattern: Annotated[
        str | None, typer.Argument(help="Part of a key (lr), a section (data), or train.*_every.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """List the settings of a run, with type, default and meaning."""

    def work() -> None:
        from gptworks.core.config import reference

        chosen = reference.matching(pattern)
        if json:
            _put(_json({key: reference.described(key) for key in chosen}) + "\n")
        else:
            _put(reference.overview() if pattern is None else reference.details(chosen))

    _do(work, False)


@app.command()
def recipes(json: Json = False) -> None:
    """List the built-in recipes."""

    def work() -> None:
        from gptworks.core import config as configuration

        titles = {
            name: configuration.recipe_text(name).splitlines()[0].lstrip("# ") for name in configuration.recipe_names()
        }
        _print(titles, json, lambda rows: "\n".join(f"{name:<24}{text}" for name, text in rows.items()))

    _do(work, False)


@app.command()
def env(json: Json = False) -> None:
    """Print what a bug report needs."""

    def work() -> None:
        import torch

        from gptworks.core import runtime
        from gptworks.planning.machine import here

        device = runtime.device()
        machine = here()
        facts: dict[str, Any] = runtime.versions() | {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            "cuda": torch.version.cuda or "none",
            "bf16 units": "yes" if runtime.has_bf16(device) else "no",
            "threads": str(torch.get_num_threads()),
            "memory free": f"{runtime.available_memory(device) / 2**30:.1f} GiB",
            "matmul fp32": f"{runtime.matmul_rate(device, torch.float32) / 1e9:.0f} GFLOP/s",
        }
        lines = "\n".join(f"{name:<14}{value}" for name, value in facts.items())
        _print(facts | {"machine": machine.as_dict()}, json, lambda _: lines)

    _do(work, False)


def _open_streams() -> None:
    """Has the standard streams take all that is written, by whomever; `_put` asks whether they passed it on.

    Those that were closed are opened, on nothing: a file opened later would get their number, and what is meant for a
    person would be written into it.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115  the lowest number that is free is taken
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, unfailing(os.open(os.devnull, os.O_WRONLY)))
            getattr(sys, name).buffer.raw.error = OSError(errno.EBADF, "it is closed")
        elif stream is getattr(sys, f"__{name}__"):
            stream.flush()
            setattr(sys, name, unfailing(stream.fileno(), stream.encoding))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name or a text may have what its encoding has not


def _aside(failed: threading.ExceptHookArgs) -> None:
    """Says in a line what ended a thread of a library; what depends on it fails by itself."""
    if isinstance(failed.exc_value, OSError):
        explained = _explained(failed.exc_value)
        console.warn(f"{failed.thread.name if failed.thread else 'a thread'}: {explained[0] if explained else ''}")
    else:
        threading.__excepthook__(failed)


def main() -> None:
    """The console script. A wrong option is exit code 64, as every usage error."""
    _open_streams()
    threading.excepthook = _aside
    try:
        code = app(standalone_mode=False, prog_name="gptworks")
    except Exception as error:  # typer's own: unknown command or option, missing argument
        if type(error).__name__ in ("Abort", "Exit"):
            raise SystemExit(getattr(error, "exit_code", 75)) from None
        if not hasattr(error, "format_message"):
            raise
        said = error.format_message() or type(error).__name__
        help_alone = type(error).__name__ == "NoArgsIsHelpError"
        if not help_alone:
            _fail(f"{said} (gptworks --help)", 64, debug=False)
        print(said, file=sys.stderr)
        raise SystemExit(64) from None
    if code is not None:  # typer gives it back: of what it printed itself, and of Ctrl-C outside of `_do`
        _do(_check_output, False)
        raise SystemExit(code)
