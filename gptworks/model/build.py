"""Models from configurations and folders, and back into folders that Hugging Face opens."""

import hashlib
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptworks.core import folder, runtime
from gptworks.core.config import Adapter
from gptworks.core.errors import DataError
from gptworks.core.log import console, count
from gptworks.data import published, sentencepiece
from gptworks.data.tokenizer import Tokenizer
from gptworks.model import card, hub, peft
from gptworks.model import weights as weight_files
from gptworks.model.config import ModelConfig, parameter_count
from gptworks.model.families import BUFFERS, FAMILIES, from_hf_config
from gptworks.model.lowbit import SCHEMES
from gptworks.model.transformer import Transformer, sinusoids

LINEAGE = "gptworks.json"
TEMPLATE = "chat_template.jinja"
INDEX = "model.safetensors.index.json"
TOKENIZER_CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
SHARD = 5_000_000_000  # bytes of a weight file, as transformers cuts them
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
# Hashed before anything is made of them; weights while they are read.
SMALL = ["config.json", "tokenizer.json", TOKENIZER_CONFIG, INDEX, LINEAGE]
EDITED = ("README.md", GENERATION, TEMPLATE)  # by people: that one differs is no damage
PLACE = ("base_model_name_or_path", "revision")  # of adapter_config.json: what may be edited there
WRAPPERS = ("_orig_mod.", "module.")  # what torch.compile and data parallelism put before every name of a weight
PICKLES = ("pytorch_model.bin", "model.bin", "model.pt", "model.pth", "consolidated.00.pth", "model.ckpt", "model.pkl")


@dataclass(frozen=True)
class Loaded:
    """A model folder in memory. An adapter's folder is one too: `base` is then the folder of what it goes with."""

    path: Path
    model: Transformer
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    lineage: dict[str, Any]
    adapter: Adapter | None = None
    base: Path | None = None
    hashes: tuple[str, ...] = ()  # SHA-256 of each weight file, where reading has made them

    @property
    def home(self) -> Path:
        """The folder that has the whole weights: an adapter's base, or the folder itself."""
        return self.base or self.path

    @property
    def template_home(self) -> Path:
        """The folder whose chat template counts: an adapter's may have its own, in a file or in its tokenizer's."""
        if self.base is None or (self.path / TEMPLATE).is_file():
            return self.path
        return self.path if "chat_template" in _object(self.path / TOKENIZER_CONFIG) else self.base

    @property
    def name(self) -> str:
        """The name to call it by: the folder, or `owner/name@commit` on the hub."""
        return hub.name_of(self.path)

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the weight file, or of the hashes of several; for an adapter, of its base's."""
        return _joined(self.hashes) if self.hashes else weights_sha256(self.home)

    @property
    def own_sha256(self) -> str:
        """SHA-256 of the folder's own weights: of an adapter's folder, of the adapters."""
        return weights_sha256(self.path) if self.base else self.weights_sha256


def weights_sha256(path: Path) -> str:
    """SHA-256 of a folder's weight file, or of the hashes of several. Raises DataError."""
    adapter = path / ADAPTER_WEIGHTS
    files = _weight_files(path) if (path / "config.json").is_file() or not adapter.is_file() else [adapter]
    return _joined([folder.sha256(file) for file in files])


def _joined(hashes: Sequence[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def verify(path: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Compares a folder with its manifest, which it returns: what people edit may differ, and in an adapter's settings
    the place of its base. Of files other than `names`, where these are given, only the sizes are looked at.

    Raises DataError.
    """
    settings = folder.read_manifest(path).get("adapter")
    settings = settings if isinstance(settings, dict) else {}
    manifest = folder.verify(path, names, but=(*EDITED, ADAPTER) if settings else EDITED)
    said = _object(path / ADAPTER, needed=True) if settings else {}
    for key, value in settings.items():
        if said.get(key) != value:
            raise DataError(
                f"{path / ADAPTER}: {key} is {str(said.get(key))[:80]}, and the adapter was trained with {value}; only "
                f"{' and '.join(PLACE)} may be edited"
            )
    return manifest


def edited(path: Path, manifest: dict[str, Any]) -> list[str]:
    """The files of a verified folder that people have edited or removed."""
    files = {name: entry["sha256"] for name, entry in manifest["files"].items() if name in (*EDITED, ADAPTER)}
    return [name for name, known in files.items() if not (path / name).is_file() or folder.sha256(path / name) != known]


def fresh(config: ModelConfig, seed: int) -> Transformer:
    """A new model with initial weights that are a function of `seed` and the shape."""
    model = Transformer(config)
    model.initialise(seed)
    return model


def load(
    path: str | Path, dropout: float | None = None, dtype: torch.dtype | None = torch.float32, mmap: bool = False
) -> Loaded:
    """Opens a Hugging Face folder of a family we know, on this disk or on the hub (`owner/name[@revision]`).

    Weights get `dtype`; None leaves each as it is stored. They are read one by one, so that memory holds them once, and
    with `mmap` those that need no conversion stay in the file. An adapter's base is loaded as the adapter was trained
    beside it. Never runs code from the folder. Raises DataError; for the hub also what `hub.local` does.
    """
    path = hub.local(path)
    check_folder(path)
    if (path / ADAPTER).is_file() and not (path / "config.json").is_file():
        return _load_adapted(path, dropout)
    if (path / ADAPTER).is_file():
        console.warn(f"{path}: the adapter beside the model is not applied; it wants a folder of its own")
    raw = _object(path / "config.json", needed=True)
    hashes: dict[str, str] | None = None
    if (path / LINEAGE).is_file():
        known = {name: entry["sha256"] for name, entry in verify(path, SMALL)["files"].items()}
        hashes = {}
    try:
        config = from_hf_config(raw)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    tokenizer = Tokenizer.load(path)
    with runtime.returning_memory():
        weights = read_weights(path, config, dtype=dtype, mmap=mmap, hashes=hashes)
    for name, hashed in (hashes or {}).items():
        if known.get(name) != hashed:
            raise DataError(f"{path / name}: its SHA-256 differs from the manifest; the file is damaged")
    table = weights.get("model.embed_positions.weight")
    if config.family == "gpt2" and table is not None and _is_sinusoidal(table):
        config = replace(config, positions="sinusoidal")
        del weights["model.embed_positions.weight"]
    head, embedding = weights.get("lm_head.weight"), weights["model.embed_tokens.weight"]
    if head is not None and config.tie_word_embeddings:
        if head is embedding or torch.equal(head, embedding):
            del weights["lm_head.weight"]
        else:  # as transformers: what the file has apart is not tied
            config = replace(config, tie_word_embeddings=False)
    if dropout is not None:
        config = config.with_dropout(dropout)
    with torch.device("meta"):  # without memory
        model = Transformer(config)
    if config.positions == "sinusoidal":
        model.model.sinusoids = sinusoids(config.max_position_embeddings, config.hidden_size)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie()
    lineage = _object(path / LINEAGE)
    ends, files = stop_ids(path, tokenizer), tuple((hashes or {}).values())
    return Loaded(
        path, model.requires_grad_(True).eval(), tokenizer=tokenizer, stop_ids=ends, lineage=lineage, hashes=files
    )


def check_folder(path: Path) -> None:
    """Raises DataError for what is no model's folder."""
    if not path.is_dir():
        raise DataError(f"{path}: no such model folder{hub.advice(path)}")
    if (path / "config.json").exists() or (path / ADAPTER).is_file():
        return
    if (path / "config.yaml").is_file():
        if not (path / "model").is_dir():
            raise DataError(f"{path} is a run that is not finished: it has no model yet; train it to its end")
        raise DataError(f"{path} is a run; its model is {path / 'model'}")
    raise DataError(f"{path}: no model is in this folder (it has no config.json)")


def load_base(path: str | Path, dropout: float | None, form: str | None) -> Loaded:
    """A model whose layers will be `held` as `adapter.base` says. Where that is in less than float32, the file's values
    are in memory only as they are converted."""
    if form in (None, "fp32"):
        return load(path, dropout)
    return load(path, dropout, dtype=None, mmap=True)


def with_tokens(base: Loaded, tokens: list[str]) -> Loaded:
    """A model whose tokenizer has control tokens more, with a row of the embeddings for each. Raises UsageError."""
    known, rows = len(base.tokenizer), base.model.config.vocab_size
    tokenizer = base.tokenizer.with_control(tokens)
    base.model.resize(max(len(tokenizer), rows), min(known, rows))
    console.say(f"model    {len(tokens)} tokens more, ids {known} to {len(tokenizer) - 1}; rows begin as the mean row")
    return replace(base, tokenizer=tokenizer)


def _load_adapted(path: Path, dropout: float | None) -> Loaded:
    """The base that a PEFT folder names, with its adapters, and what the folder has of its own to spell a text.
    Raises DataError."""
    raw = _object(path / ADAPTER)
    if not isinstance(raw.get("base_model_name_or_path"), str):
        raise DataError(f"{path / ADAPTER}: names no base_model_name_or_path; write the base's folder there")
    lineage = _object(path / LINEAGE)
    if lineage:
        verify(path, [*SMALL, ADAPTER, ADAPTER_WEIGHTS])
    parent, form = _begun(lineage, path / LINEAGE)
    revision = raw.get("revision")
    named = base_folder(
        raw["base_model_name_or_path"], path, sha256=parent, revision=revision if isinstance(revision, str) else None
    )
    if not named.is_dir():
        raise DataError(f"{path}: is an adapter for {named}, which is no folder here; set base_model_name_or_path in "
                        f"{path / ADAPTER}")  # fmt: skip
    if not (named / "config.json").is_file():
        raise DataError(f"{path}: is an adapter for {named}, which is no model folder")
    base = load_base(named, dropout, form)
    if parent is not None and parent != base.weights_sha256:
        if (moved := _moved(named, path, parent)) is None:
            raise DataError(f"{path}: the adapter was trained on other weights than {named} has now")
        named, base = moved, load_base(moved, dropout, form)
    file = path / ADAPTER_WEIGHTS
    weight_files.read_shapes(file, 3 * len(list(base.model.modules())))
    tensors = weight_files.read(file)
    wrapper = _wrapper(tensors, path)
    try:
        unwrapped = {name.removeprefix(wrapper): value for name, value in tensors.items()}
        model = peft.read(base.model, raw, tensors=unwrapped, base=form)
        settings = peft.read_settings(raw)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    settings = settings.model_copy(update={"base": form})
    tokenizer = _own_tokenizer(path, base)
    ends = stop_ids(path if (path / GENERATION).is_file() else named, tokenizer)
    return replace(
        base, path=path, model=model.eval(), tokenizer=tokenizer, stop_ids=ends, lineage=lineage, adapter=settings,
        base=named,
    )  # fmt: skip


def base_folder(name: str, near: Path, sha256: str | None, revision: str | None = None) -> Path:
    """The folder of a base that is named by its path or as a model of the hub. Where that path is gone, as when a whole
    project was moved or renamed, it is what has the base's weights under the end of that path in a folder above `near`.
    """
    named = Path(name).expanduser()
    if named.exists():
        return named
    return _moved(named, near, sha256) or hub.local(name, revision)


def _moved(named: Path, near: Path, sha256: str | None) -> Path | None:
    """The folder with the weights of that hash, looked for under the end of a path in `near` and the folders above."""
    parts = named.parts[named.is_absolute() :]
    for above in (near.resolve(), *near.resolve().parents):
        for start in range(len(parts)):
            there = above.joinpath(*parts[start:])
            if sha256 and (there / "config.json").is_file() and _has(there, sha256):
                return there
    return None


def _has(path: Path, sha256: str) -> bool:
    try:
        return weights_sha256(path) == sha256
    except DataError:
        return False


def _own_tokenizer(path: Path, base: Loaded) -> Tokenizer:
    """The tokenizer of an adapter's folder: of its files those that the folder has, the others are the base's."""
    spelled = (path / "tokenizer.json").is_file() or published.find(path) or sentencepiece.find(path)
    own = Tokenizer.load(path) if spelled else base.tokenizer
    config = _object(path / TOKENIZER_CONFIG) if (path / TOKENIZER_CONFIG).is_file() else base.tokenizer.config
    if spelled and config is not base.tokenizer.config:
        config = own.config
    template = {key: base.tokenizer.config[key] for key in ("chat_template",) if key in base.tokenizer.config}
    return Tokenizer(own.backend, {**template, **config})


def _object(file: Path, needed: bool = False) -> dict[str, Any]:
    """The content of a JSON file; empty where there is none and it is not `needed`. Raises DataError."""
    if not needed and not file.is_file():
        return {}
    raw = folder.read_json(file)
    if not isinstance(raw, dict):
        raise DataError(f"{file}: not a JSON object")
    return raw


def _begun(lineage: Any, file: Path) -> tuple[str | None, str | None]:
    """Reads of an adapter's folder the SHA-256 of its base's weights, and how that was held. Raises DataError; for a
    scheme of somebody's own too, since it would be code that a folder has run."""
    try:
        if not lineage or not lineage["parents"]:
            return None, None
        parent, form = lineage["parents"][0]["sha256"], lineage["config"]["adapter"]["base"]
    except (KeyError, IndexError, TypeError):
        raise DataError(f"{file}: not what a training writes") from None
    if not isinstance(parent, str) or form not in (None, "fp32", "bf16", *SCHEMES):
        raise DataError(f"{file}: says the base is held as {str(form)[:80]!r}, which is none of ours")
    return parent, form


def _is_sinusoidal(table: Tensor) -> bool:
    return table.ndim == 2 and table.shape[1] % 2 == 0 and torch.equal(table.float(), sinusoids(*table.shape))


def read_weights(
    path: Path, config: ModelConfig, dtype: torch.dtype | None, mmap: bool, hashes: dict[str, str] | None
) -> dict[str, Tensor]:
    """Every weight of a folder's safetensors, whole or sharded, under our names, once names and shapes are those of
    `config`. SHA-256 of the files come into `hashes`.

    Raises DataError, where that is due to names and shapes having allocated nothing.
    """
    files = _weight_files(path)
    stored: dict[str, torch.Size] = {}
    for file in files:
        here = weight_files.read_shapes(file, _most_tensors(config))
        if twice := sorted(stored.keys() & here.keys()):
            raise DataError(f"{file}: {twice[0][:200]} is in another file of the folder too")
        stored |= here
    wrapper = _wrapper(stored, path)
    shapes = {name.removeprefix(wrapper): shape for name, shape in stored.items()}
    claimed, values = parameter_count(config), sum(shape.numel() for shape in shapes.values())
    if claimed > 4 * values or config.num_hidden_layers > len(shapes):  # too far off to lay out what is claimed
        raise DataError(f"{path}: config.json describes {count(claimed)} parameters, the files hold {count(values)}")
    with torch.device("meta"):  # shapes without values
        described = Transformer(replace(config, tie_word_embeddings=False))
        laid_out = _mapped({name: torch.empty(s) for name, s in shapes.items()}, config, path)
    if config.tie_word_embeddings:
        _both(laid_out)
    compare(described, laid_out, path)
    missing = Counter(_together(name) for name in shapes if not name.endswith(BUFFERS))
    waiting = defaultdict[str, dict[str, Tensor]](dict)
    weights: dict[str, Tensor] = {}
    for file in files:
        if mmap and hashes is not None:
            hashes[file.name] = folder.sha256(file)
        read = (
            weight_files.mapped(file, dtype, BUFFERS)
            if mmap
            else weight_files.stream(file, dtype, hashes=hashes, skip=BUFFERS)
        )
        for wrapped, value in read:
            name = wrapped.removeprefix(wrapper)
            group = _together(name)
            waiting[group][name] = value
            del value  # so that what is mapped to another tensor goes before the next one comes
            if len(waiting[group]) == missing[group]:
                weights |= _mapped(waiting.pop(group), config, path)
    if config.tie_word_embeddings:
        _both(weights)
    return weights


def _wrapper(names: Collection[str], path: Path) -> str:
    """The part before all names of weights that wrapping the model put there. Raises DataError where some names have it
    and others do not."""
    wrapper = ""
    while start := next((each for each in WRAPPERS if any(name.startswith(wrapper + each) for name in names)), ""):
        if plain := sorted(name for name in names if not name.startswith(wrapper + start)):
            raise DataError(
                f"{path}: names of weights begin with {start}, and {plain[0][:200]} does not; save the model unwrapped"
            )
        wrapper += start
    return wrapper


def _both(weights: dict[str, Tensor]) -> None:
    """Gives a matrix that is both embedding and head both names: a file may have it under either, or under both."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    one = next((weights[name] for name in names if name in weights), None)
    if one is not None:
        for name in names:
            weights.setdefault(name, one)


def _together(name: str) -> str:
    """The part of a name that tensors share which become one of ours: "layers.3.mlp.experts" of
    "layers.3.mlp.experts.7.up", since experts are numbered within a block. Any other tensor is alone."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[1]]) if len(numbers) > 1 else name


def _most_tensors(config: ModelConfig) -> int:
    """More than a file of this architecture has."""
    return (32 + 3 * config.num_experts) * (config.num_hidden_layers + 1)


def _weight_files(path: Path) -> list[Path]:
    index, whole = path / INDEX, path / "model.safetensors"
    if index.is_file() and not whole.is_file():  # transformers' order
        read = folder.read_json(index)
        listing = read.get("weight_map") if isinstance(read, dict) else None
        names = list(listing.values()) if isinstance(listing, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"{index}: not an index of weight files")
        files = sorted({path / name for name in names})
        if any(file.parent != path for file in files):
            raise DataError(f"{index}: names a file outside the folder")
    else:
        files = [whole]
    if lacking := next((file for file in files if not file.is_file()), None):
        pickles = [name for name in PICKLES if (path / name).is_file()]
        if pickles:
            raise DataError(
                f"{path / pickles[0]}: a pickle, which can run code when loaded; refused. Convert it where you trust "
                "it: transformers' save_pretrained(folder) writes model.safetensors"
            )
        raise DataError(f"{lacking}: no such weight file")
    return files


def _mapped(weights: dict[str, Tensor], config: ModelConfig, path: Path) -> dict[str, Tensor]:
    """Under our names."""
    try:
        return FAMILIES[config.family].read_weights(weights, config)
    except (ValueError, IndexError, RuntimeError) as error:
        raise DataError(f"{path}: not the weights of a {config.family} model: {error}") from None


def compare(model: Transformer, weights: dict[str, Tensor], where: str | Path) -> None:
    """Raises DataError for a missing, unknown or misshapen weight."""
    expected = dict(model.named_parameters())
    if missing := sorted(expected.keys() - weights.keys()):
        raise DataError(
            f"{where}: missing weight {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        )
    if unknown := sorted(weights.keys() - expected.keys()):
        raise DataError(
            f"{where}: unknown weight {unknown[0][:200]}" + (f" and {len(unknown) - 1} more" if unknown[1:] else "")
        )
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            ours, theirs = weight_files.shown(expected[name].shape), weight_files.shown(value.shape)
            raise DataError(f"{where}: {name} is {theirs}, the configuration says {ours}")


def stop_ids(path: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's, or config.json's where there is none, and the tokenizer's."""
    file = path / GENERATION
    file = file if file.is_file() else path / "config.json"
    raw = folder.read_json(file) if file.is_file() else {}
    listed = raw.get("eos_token_id") if isinstance(raw, dict) else raw
    ids = listed if isinstance(listed, list) else [listed] if listed is not None else []
    if not isinstance(raw, dict) or not all(type(i) is int for i in ids):
        raise DataError(f"{file}: eos_token_id is neither a token id nor a list of them")
    return tuple(sorted({*ids, tokenizer.eos_id} - {None}))


def save(
    path: Path, model: Transformer, tokenizer: Tokenizer, lineage: dict[str, Any], dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD, base: Loaded | None = None, architecture: str | None = None,
) -> None:  # fmt: skip
    """Writes a folder that AutoModelForCausalLM and AutoTokenizer open, in one atomic step.

    Weights are written in `dtype`, each in its own if that is None, to files of `shard_bytes` at most, but for a tensor
    that is larger. `lineage` (recipe, parents, data, metrics) goes into gptworks.json and, for people, into README.md.
    The chat template and the tokens that end a text are those of `base`. `architecture` is the class that opens it, by
    default the family's causal language model. Raises NotFinite, and StorageError, where the disk lacks room before
    anything is written.
    """
    config = model.config
    family = FAMILIES[config.family]
    raw = {
        "architectures": [architecture or family.architecture],
        "model_type": config.family,
        "dtype": str(dtype or model.model.embed_tokens.weight.dtype).removeprefix("torch."),
        **family.write_config(config),
        "bos_token_id": tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id,
        "eos_token_id": tokenizer.eos_id,
        # transformers gives that row of the embedding no gradient, and ours ends texts. Some classes have a default.
        "pad_token_id": None,
    }
    own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    ends = sorted({*(base.stop_ids if base else ()), *own})
    special = {key: raw[key] for key in ("bos_token_id", "eos_token_id")} | {"pad_token_id": tokenizer.eos_id}
    if len(ends) > 1:
        special["eos_token_id"] = ends
    ours = {name: value.to("cpu", dtype or value.dtype) for name, value in model.state_dict().items()}
    weights = family.write_weights(ours, config)
    folder.check_space(path, sum(value.nbytes for value in weights.values()))
    hashes: dict[str, str] = {}
    with folder.commit(path, known=hashes) as aside:
        (aside / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        (aside / GENERATION).write_text(json.dumps(special, indent=2) + "\n")
        files = _shards(weights, shard_bytes)
        for file, part in files.items():
            hashes[file] = weight_files.write(aside / file, part, {"format": "pt"})
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(value.nbytes for value in weights.values())},
                "weight_map": {name: file for file, part in files.items() for name in part},
            }
            (aside / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        save_tokenizer(aside, tokenizer, base)
        (aside / LINEAGE).write_text(
            json.dumps(lineage, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
        (aside / "README.md").write_text(card.text(path, lineage, config), encoding="utf-8")


def _shards(weights: dict[str, Tensor], most: int) -> dict[str, dict[str, Tensor]]:
    """Weights by the file that they go to, named as transformers names them."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in weights.items():
        if shards[-1] and size + value.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    if len(shards) == 1:
        return {"model.safetensors": weights}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, 1)}


def save_tokenizer(path: Path, tokenizer: Tokenizer, base: Loaded | None) -> None:
    """Puts the files that spell a text into a folder: the tokenizer's, and the chat template of `base`."""
    tokenizer.save(path)
    if base and (template := base.template_home / TEMPLATE).is_file():
        shutil.copyfile(template, path / TEMPLATE)


def save_adapter(path: Path, model: Transformer, adapter: Adapter, base: Loaded, lineage: dict[str, Any]) -> None:
    """Writes the adapters alone, as a folder that PEFT opens, with the tokenizer and the chat template of its base, in
    one atomic step."""
    name, commit = hub.origin(base.home)
    name = name if commit else str(base.home.resolve())
    raw, tensors = peft.write(model, adapter, name)
    raw["revision"] = commit
    facts = {"adapter": {key: value for key, value in raw.items() if key not in PLACE}}
    # Without config.json only this name tells AutoTokenizer which class opens tokenizer.json.
    own = {"tokenizer_class": "PreTrainedTokenizerFast", **base.tokenizer.config}
    with folder.commit(path, facts) as aside:
        (aside / ADAPTER).write_text(json.dumps(raw, indent=2) + "\n")
        weight_files.write(aside / ADAPTER_WEIGHTS, tensors, {"format": "pt"})
        save_tokenizer(aside, Tokenizer(base.tokenizer.backend, own), base)
        (aside / LINEAGE).write_text(
            json.dumps(lineage, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
        (aside / "README.md").write_text(
            card.text(path, lineage, model.config, base=name, rank=adapter.rank), encoding="utf-8"
        )
