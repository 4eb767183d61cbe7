"""The configuration of a run: its keys, how a recipe is read, and what a run keeps of it."""

from gptworks.core.config.messages import ELSEWHERE
from gptworks.core.config.recipe import (
    build,
    load,
    pairs_of,
    problem_of,
    recipe_names,
    recipe_text,
    usual_folder,
    with_values,
)
from gptworks.core.config.run_file import RunFile, continued, differences, recipe_lines
from gptworks.core.config.schema import (
    Adapter,
    Change,
    Chosen,
    ChosenGenerate,
    ChosenTrain,
    Config,
    Data,
    Generate,
    Model,
    ProblemSettings,
    Section,
    Tokenizer,
    Train,
    Weighted,
    fixed,
    flexible,
    free,
    get,
    is_unset,
    keys,
    keys_of_kind,
)

__all__ = [
    "ELSEWHERE", "Adapter", "Change", "Chosen", "ChosenGenerate", "ChosenTrain", "Config", "Data", "Generate", "Model",
    "ProblemSettings", "RunFile", "Section", "Tokenizer", "Train", "Weighted", "build", "continued", "differences",
    "fixed", "flexible", "free", "get", "is_unset", "keys", "keys_of_kind", "load", "problem_of", "recipe_lines",
    "pairs_of", "recipe_names", "recipe_text", "usual_folder", "with_values",
]  # fmt: skip
