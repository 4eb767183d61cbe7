"""Runs side by side, from their files alone: what came out of each, and where their configurations differ."""

from pathlib import Path

from gptworks.core.errors import DataError, UsageError
from gptworks.core.results import ComparedRun, ComparedRuns
from gptworks.reporting.page import get, number, read_run

ABSENT = object()  # a key that a run has not, as another problem's


def compare(runs: list[Path]) -> ComparedRuns:
    """The results of runs, finished or not, and the keys in which they differ. Raises UsageError, DataError."""
    if len(runs) < 2:
        raise UsageError("compare takes two runs or more")
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise DataError(f"{run}: not a run folder (it has no config.yaml)")
    read = [read_run(run) for run in runs]
    own_names = len({each.name for each in read}) == len(runs)
    rows = []
    for path, each in zip(runs, read, strict=True):
        result = each.result
        steps, total = number(result.get("steps")) or each.step, number(each.config.get("train.max_steps"))
        rows.append(
            ComparedRun(
                run=each.name if own_names else str(path),
                recipe=str(result.get("recipe") or each.config.get("recipe") or ""),
                finished=bool(result),
                steps=int(steps),
                planned_steps=int(steps if result else total or 0),
                parameters=result.get("parameters"),
                tokens=result.get("tokens") or each.last("train/tokens"),
                seconds=result.get("train_seconds") or each.last("train/seconds"),
                loss=number(get(result, "eval", "loss")) or each.last("eval/loss"),
                bits_per_byte=number(get(result, "eval", "bits_per_byte")) or each.last("eval/bits_per_byte"),
            )
        )
    keys = dict.fromkeys(key for each in read for key in each.config if key != "recipe")
    values = {key: [each.config.get(key, ABSENT) for each in read] for key in keys}
    differences = {
        key: [None if value is ABSENT else value for value in each]
        for key, each in values.items()
        if any(value != each[0] for value in each)
    }
    return ComparedRuns(runs=rows, differences=differences)
