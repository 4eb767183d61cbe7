"""README.md of a model folder: for people, and with the YAML header that the hub reads."""

import glob
import re
from pathlib import Path
from typing import Any

import yaml

from gptworks.core.log import count
from gptworks.model import hub
from gptworks.model.config import ModelConfig, parameter_count
from gptworks.model.families import FAMILIES

LICENSE = ("license", "license_name", "license_link")  # as the hub names them
VERBATIM = ("prompts", "license", "separator")  # values of a configuration that are texts and no places


def license_of(folder: Path) -> dict[str, str]:
    """The licence that the card of a folder names; empty where there is none that can be read."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        header = yaml.safe_load(text.split("\n---", 1)[0]) if text.startswith("---\n") else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    header = header if isinstance(header, dict) else {}
    return {key: header[key] for key in LICENSE if isinstance(header.get(key), str)}


def title(path: Path) -> str:
    """The name of a model by its folder: that of its run, where a run has it."""
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def place(text: str) -> str:
    """The name that others know a file, a folder or a glob by: what it is called itself, not where it lies here."""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    patterns = [number for number, part in enumerate(parts) if glob.has_magic(part)]
    if patterns:  # and the folder that it looks through
        return "/".join(parts[max(patterns[0] - 1, 0) :])
    return title(Path(*parts)) if parts[1:] else "".join(parts) or text


def told(value: Any) -> Any:
    """Plain values as others may read them: without the folders of this machine."""
    if isinstance(value, dict):
        return {key: each if key in VERBATIM else told(each) for key, each in value.items()}
    if isinstance(value, list):
        return [told(each) for each in value]
    return place(value) if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    if "/" not in text or "\n" in text or len(text) > 1000:
        return False
    return text[0] in "/~." or glob.has_magic(text) or Path(re.sub(r":\w+$", "", text)).exists()


def mixture(train: Any) -> str:
    """The training text in words, of what `data.train` is: a place, places, or places with weights."""
    entries = train if isinstance(train, list) else [train]
    whole = sum(entry["weight"] for entry in entries if isinstance(entry, dict)) or 1
    names = [
        f"{place(entry['path'])} ({100 * entry['weight'] / whole:.3g} %)" if isinstance(entry, dict) else place(entry)
        for entry in entries
    ]
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])


def text(path: Path, lineage: dict[str, Any], config: ModelConfig, base: str | None = None, rank: int = 0) -> str:
    """README.md with the YAML header the hub reads; of an adapter of a rank for `base`."""
    name, data, adapter = title(path), lineage.get("data", ""), base is not None
    metrics = {key: value for key, value in lineage.get("metrics", {}).items() if isinstance(value, (int, float))}
    rows = "\n".join(f"| {key} | {value:.6g} |" for key, value in metrics.items())
    header: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    parents = [parent["path"].partition("@") for parent in lineage.get("parents", [])]
    if base and Path(base).is_absolute():  # a folder here means nothing to others
        pass
    elif base or (base := next((owner for owner, at, _ in parents if at and hub.ID.fullmatch(owner)), None)):
        header["base_model"] = base
    header |= lineage.get("license", {})
    header |= {"pipeline_tag": "text-generation", "tags": ["gptworks"]}
    scores = {
        kind: metrics[f"eval_{kind}"] for kind in ("loss", "perplexity", "bits_per_byte") if f"eval_{kind}" in metrics
    }
    if scores:
        header["metrics"] = list(scores)
        dataset = {"name": f"validation split of {data}" if data else "evaluation of its problem", "type": "text"}
        values = [{"type": kind, "value": value} for kind, value in scores.items()]
        result = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": values}
        header["model-index"] = [{"name": name, "results": [result]}]
    opening = """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")"""
    if adapter:
        opening = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model, tokenizer = AutoPeftModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")"""
    return f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---

# {name}

{_kind(lineage, config, base, rank=rank)}

Trained with gptworks {lineage.get("gptworks", "")}, recipe `{lineage.get("recipe", "")}`{", on" if data else ", for"}
`{data or lineage.get("problem", "")}`.

| | |
|---|---|
{rows}

```python
{opening}
```

`gptworks.json` has the lineage: configuration, data and parents by hash, and what was measured; `manifest.json` has
the SHA-256 of every file (`gptworks verify .` checks them).
"""


def _kind(lineage: dict[str, Any], config: ModelConfig, base: str | None, rank: int) -> str:
    """The sentence that says what the folder holds."""
    architecture = FAMILIES[config.family].architecture
    family = re.sub("(ForCausalLM|LMHeadModel)$", "", architecture)
    model = f"{family} model of {count(parameter_count(config))} parameters"
    before = {str(parent.get("role")): f"`{parent['path']}`" for parent in lineage.get("parents", [])}
    if rank:
        named = before.get("base") or f"`{base if base and hub.ID.fullmatch(base) else place(base or '')}`"
        return f"A LoRA adapter of rank {rank} for {named}, a {model}."
    if "adapter" in before:
        return f"A {model}: {before.get('base')} and the adapter {before['adapter']} as one."
    return f"A {model}" + (f", trained from {before['base']}." if "base" in before else ".")
