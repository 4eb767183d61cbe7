"""README.md of a model folder: for people, and with the YAML header that the hub reads."""

from pathlib import Path
from typing import Any

import yaml

from gptworks.model import hub

LICENSE = ("license", "license_name", "license_link")  # as the hub names them


def license_of(folder: Path) -> dict[str, str]:
    """The licence that the card of a folder names; empty where there is none that can be read."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        header = yaml.safe_load(text.split("\n---", 1)[0]) if text.startswith("---\n") else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    header = header if isinstance(header, dict) else {}
    return {key: header[key] for key in LICENSE if isinstance(header.get(key), str)}


def text(path: Path, lineage: dict[str, Any], base: str | None = None) -> str:
    """README.md with the YAML header the hub reads; of an adapter for `base`."""
    name = path.parent.name if path.name == "model" else path.name
    data = lineage.get("data", "")
    metrics = {key: value for key, value in lineage.get("metrics", {}).items() if isinstance(value, (int, float))}
    rows = "\n".join(f"| {key} | {value:.6g} |" for key, value in metrics.items())
    header: dict[str, Any] = {"library_name": "transformers" if base is None else "peft"}
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
    if header["library_name"] == "peft":
        opening = """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(".")"""
    return f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---

# {name}

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
