"""What a stage gives back, in lines for a person: the tables and sentences that commands print."""

import json
from collections.abc import Callable
from typing import Any

from gptworks.core.log import count, duration, plural, size, table
from gptworks.core.results import Compared, ComparedRuns, Evaluated, Exported, Merged, Planned, PlannedSize


def dry_run(choices: Any, expected: PlannedSize | None, where: str = "here") -> str:
    """Says what the run would take and reach, and the configuration as far as it can be decided now."""
    from gptworks.core import config as configuration

    reasons = choices.reasons | {key: f"open: {why}" for key, why in choices.open.items()}
    lines = [*_outlook(expected, where), *choices.warnings] if expected else choices.warnings
    return "\n".join([*(f"# {line}" for line in lines), configuration.recipe_lines(choices.config, reasons)])


def _outlook(run: PlannedSize, where: str) -> list[str]:
    return [
        f"about {duration(run.seconds)} {where}, {size(run.memory_bytes)} of memory, {run.bits_per_byte:.2f} bits/byte",
        f"about {plural(run.steps, 'step')}, {count(run.tokens)} tokens: {_few(run.tokens_per_parameter)} for each of "
        f"{count(run.parameters)} parameters, {_few(run.passes)} passes over the text",
        "a look at the text and the machine's speed say so; the run reads and measures, and may decide otherwise",
    ]


def evaluation(scores: Evaluated) -> str:
    from gptworks.data.shards import lost_words

    unigram, xz, against = scores.baselines["unigram"] or {}, scores.baselines["xz"], scores.against

    def row(name: str, model: Evaluated | Compared) -> tuple[str, ...]:
        return name, f"{model.loss:.4f}", f"{model.perplexity:.2f}", f"{model.bits_per_byte:.4f}"

    rows = [
        ("", "nats/token", "perplexity", "bits/byte"),
        row(scores.model if against else "model", scores),
        *([row(against.model, against)] if against else []),
        ("unigrams", f"{unigram['loss']:.4f}", "", f"{unigram['bits_per_byte']:.4f}"),
        ("xz -9e", "", "", f"{xz['bits_per_byte']:.4f}" if xz else "too long"),
    ]
    lines = table([list(each) for each in rows])
    lines.append(f"{plural(scores.tokens, 'token')}, {plural(scores.bytes, 'byte')}, {scores.method}")
    for each in (scores, against):
        if each and each.lost_bytes:
            lines.append((f"{each.model}: " if against else "") + lost_words(each.lost_bytes, each.bytes))
    return "\n".join([*lines, _verdict(scores.model, against)] if against else lines)


def _verdict(model: str, against: Compared) -> str:
    """A line that says which model is better, by how much and how sure that is."""
    said = f"{model} minus {against.model}: {against.difference_bits_per_byte:+.4f} bits/byte"
    if against.interval:
        said += ", 95 % interval {:+.4f} to {:+.4f}".format(*against.interval)
    conclusion = f"{against.better} is better" if against.better else against.reason
    return f"{said}, {plural(against.pairs, 'pair')}: {conclusion}"


def merged(result: Merged) -> str:
    return (
        f"{result.model}\nmerged {result.bits_per_byte:.5f} bits/byte, adapter beside its base "
        f"{result.adapter_bits_per_byte:.5f}, difference {result.difference_bits_per_byte:+.2g} "
        f"over {plural(result.tokens, 'token')}"
    )


def exported(result: Exported) -> str:
    if result.parity is None:
        return f"{result.out}: about {result.estimated_bytes:,} bytes; nothing was written"
    return f"parity   {result.parity['line']}\n{result.out}: {result.bytes:,} bytes"


def planned(plan: Planned) -> str:
    """Shows the text, a row for each size, and the command for each."""
    about = "" if plan.exact else "about "
    head = ["", "parameters", "tokens", "a parameter", "passes", "memory", "time here", "bits/byte"]
    rows = [
        [
            each.name, count(each.parameters), count(each.tokens), _few(each.tokens_per_parameter),
            _few(each.passes), size(each.memory_bytes), duration(each.seconds), f"{each.bits_per_byte:.2f}",
            *([duration(each.seconds_there or 0.0)] if plan.there else []),
        ]
        for each in plan.sizes
    ]  # fmt: skip
    lines = [
        f"text     {about}{size(plan.bytes)}, {count(plan.tokens)} tokens of {plan.vocab_size:,} ids to train on",
        f"machine  {plan.machine}: {plan.matmul_gflops:,.0f} GFLOP/s in a large product",
    ]
    if plan.there:
        head.append("time there")
        lines.append(f"there    {plan.there}, in training alone")
    commands = [f"{each.name:<7}  {each.command}" for each in plan.sizes]
    return "\n".join(
        [*lines, "", *table([head, *rows]), *plan.left_out, *(f"note     {note}" for note in plan.notes), "", *commands]
    )


def _few(number: float) -> str:
    """A ratio in two digits: 78, 3.2, 0.04."""
    if number < 0.01:
        return "below 0.01"
    return f"{number:.2g}" if number < 100 else f"{number:,.0f}"


def compared(result: ComparedRuns) -> str:
    """Two tables: what came out, and where the runs differ."""

    from gptworks.core import config as configuration

    def cell(value: Any, form: Callable[[Any], str] = str) -> str:
        return "-" if value is None else form(value)

    head = ["run", "recipe", "steps", "parameters", "tokens", "seconds", "nats/token", "bits/byte"]
    rows = [
        [
            each.run, configuration.usual_folder(each.recipe).name if each.recipe else "-",
            f"{each.steps}" if each.finished else f"{each.steps} of {each.planned_steps}",
            cell(each.parameters, count), cell(each.tokens, count), cell(each.seconds, "{:.0f}".format),
            cell(each.loss, "{:.4f}".format), cell(each.bits_per_byte, "{:.4f}".format),
        ]
        for each in result.runs
    ]  # fmt: skip
    keys = [
        [key, *(_shortened(json.dumps(each, ensure_ascii=False)) for each in values)]
        for key, values in result.differences.items()
    ]
    if not keys:
        return "\n".join([*table([head, *rows]), "", "no setting differs"])
    return "\n".join([*table([head, *rows]), "", *table([["differs in", *(each.run for each in result.runs)], *keys])])


def _shortened(text: str, most: int = 32) -> str:
    text = text.strip('"')
    return text if len(text) <= most else f"{text[: most - 3]}..."
