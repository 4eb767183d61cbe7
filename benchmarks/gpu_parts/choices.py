"""What the package chooses on this card for its own recipes, with its reasons, for a person to read."""

from gptworks.core import config as configuration
from gpu_parts import shapes
from gpu_parts.sheet import Sheet

RECIPES = ("gpt2_124m", "gpt2_classic", "gpt2_124m_moe", "shakespeare_char_best", "shakespeare_char", "laptop")
OURS = {"laptop": 1024, "shakespeare_char": 66, "shakespeare_char_best": 66}  # what their tokenizers have
SHOWN = ("train.precision", "train.compile", "train.micro_batch", "train.eval_every", "train.checkpoint_every",
         "train.deterministic", "train.lr", "train.max_steps")  # fmt: skip


def recipe(sheet: Sheet, name: str) -> None:
    config = configuration.load(name, ["data.train=random ids", "generate.prompts=[]", "train.time_budget_s=null"])
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree["train"]["batch_tokens"] = tree["train"].get("batch_tokens") or 4096
    tree["train"].pop("time_budget_s", None)
    if sheet.tiny:
        tree["train"] |= {"batch_tokens": 512, "context": 64, "max_tokens": 10**6}
        tree["model"] |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        tree["model"].pop("parameters", None)
    vocabulary = 512 if sheet.tiny else OURS.get(name, 50304)
    decided = shapes.decided(tree, vocabulary)
    run, reasons = decided.run, decided.choices.reasons
    chosen = [f"{key}={configuration.get(run.config, key)}: {reasons[key]}" for key in SHOWN if key in reasons]
    sheet.row(f"choices of {name}", "; ".join(chosen).replace("train.", ""))


def run(sheet: Sheet) -> None:
    for name in RECIPES:
        shapes.fresh()
        sheet.attempt(f"choices of {name}", lambda n=name: recipe(sheet, n), 2)  # type: ignore[misc]
