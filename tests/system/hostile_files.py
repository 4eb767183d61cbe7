"""P23 and P24: files made to run code or to take all memory, in the place of every file we read.

A row of `KINDS` puts a payload into one place and names the command that reads it; `GADGETS` are the ways to run code.
A format that is added needs a row, and a way to wrap a gadget in what the format allows, if it allows any.
"""

import builtins
import gzip
import importlib
import io
import json
import os
import pickle
import runpy
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from campaign import Bench, Trial, campaign
from harness import mistake

from gptworks.core import folder

BAD = (64, 65, 78)  # what a refusal ends with
ANY = (0, *BAD)  # a payload in a field that nobody reads, or in text, is no error

# -- ways to run code --------------------------------------------------------------------------------------------


class Call:
    """Pickles as the call of a function; nested, it makes a chain."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __call__(self) -> None: ...

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@dataclass(frozen=True)
class Gadget:
    """One way to touch the canary: as a pickle, and as an expression for YAML, Jinja and fields that name code."""

    pickled: Callable[[str, str], Any]  # (canary, script) -> what to pickle
    yaml: str
    jinja: str
    python: str


GADGETS = {
    "os.system": Gadget(
        lambda canary, script: Call(os.system, f"touch {canary}"),
        "!!python/object/apply:os.system ['touch CANARY']",
        "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
        "__import__('os').system('touch CANARY')",
    ),
    "eval": Gadget(
        lambda canary, script: Call(builtins.eval, f"open({canary!r}, 'w').close()"),
        "!!python/object/apply:builtins.eval [\"open('CANARY', 'w')\"]",
        "{{ cycler.__init__.__globals__.__builtins__.eval(\"open('CANARY', 'w')\") }}",
        "eval(\"open('CANARY', 'w')\")",
    ),
    "subprocess": Gadget(
        lambda canary, script: Call(subprocess.Popen, ["touch", canary]),
        "!!python/object/new:subprocess.Popen [['touch', 'CANARY']]",
        "{{ joiner.__init__.__globals__.__builtins__.__import__('subprocess').Popen(['touch', 'CANARY']) }}",
        "subprocess.Popen(['touch', 'CANARY'])",
    ),
    "runpy": Gadget(
        lambda canary, script: Call(runpy.run_path, script),
        "!!python/object/apply:runpy.run_path ['SCRIPT']",
        "{{ namespace.__init__.__globals__.__builtins__.__import__('runpy').run_path('SCRIPT') }}",
        "SCRIPT:Model",
    ),
    "getattr chain": Gadget(
        lambda canary, script: Call(Call(getattr, Call(importlib.import_module, "os"), "system"), f"touch {canary}"),
        "!!python/object/apply:getattr [!!python/module:os [], system]",
        "{{ (''|attr('__class__')|attr('__mro__'))[1]|attr('__subclasses__')() }}{% for x in range(9) %}{% endfor %}",
        "getattr(__import__('os'), 'system')('touch CANARY')",
    ),
    "torch storage": Gadget(
        lambda canary, script: Call(torch._utils._rebuild_tensor_v2, Call(os.system, f"touch {canary}"), 0, (1,), (1,)),
        "!!python/name:torch.load ''",
        "{{ self.__init__.__globals__.__builtins__.__import__('torch').load('SCRIPT') }}",
        "torch.load('SCRIPT', weights_only=False)",
    ),
}


@dataclass(frozen=True)
class Payload:
    """A gadget aimed at the canary of a bench."""

    gadget: Gadget
    canary: Path
    script: Path

    def pickle(self, protocol: int = 2) -> bytes:
        return pickle.dumps(self.gadget.pickled(str(self.canary), str(self.script)), protocol)

    def zipped(self) -> bytes:
        """As torch.save writes it: a zip with the pickle and a storage."""
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("archive/data.pkl", self.pickle())
            archive.writestr("archive/data/0", bytes(8))
            archive.writestr("archive/version", "3\n")
        return made.getvalue()

    def _aimed(self, text: str) -> str:
        return text.replace("CANARY", str(self.canary)).replace("SCRIPT", str(self.script))

    @property
    def yaml(self) -> str:
        return self._aimed(self.gadget.yaml)

    @property
    def fields(self) -> dict[str, Any]:
        """Fields that this or that library takes code from."""
        python, jinja = self._aimed(self.gadget.python), self._aimed(self.gadget.jinja)
        return {
            "chat_template": jinja, "tokenizer_class": python, "trust_remote_code": True, "torch_dtype": python,
            "py/object/apply": "os.system", "py/reduce": [{"py/function": "os.system"}, [f"touch {self.canary}"]],
            "_target_": "os.system", "__reduce__": python, "custom_generate": str(self.script), "class": python,
        }  # fmt: skip


# -- places to put them ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A file we read. `put(bench, payload)` makes the box and gives it with the command that reads the payload."""

    put: Callable[[Bench, Payload], tuple[Path, list[Any]]]
    codes: tuple[int, ...] = BAD


def generate(model: Path) -> list[Any]:
    return ["generate", model, "--prompt", "the king", "--max-new-tokens", "2", "--json"]


def foreign_model(bench: Bench) -> Path:
    """The tiny model as it would come from anywhere else: no manifest to notice a change."""
    model = bench.copy(bench.run / "model")
    for name in (folder.MANIFEST, "gptworks.json"):
        (model / name).unlink()
    return model


def in_model(name: str, content: Callable[[Payload], bytes], drop: str | None = None) -> Callable[..., Any]:
    def put(bench: Bench, payload: Payload) -> tuple[Path, list[Any]]:
        model = foreign_model(bench)
        if drop:
            (model / drop).unlink()
        (model / name).write_bytes(content(payload))
        return model.parent, generate(model)

    return put


def in_fields(name: str) -> Callable[..., Any]:
    """A sound JSON file of a model with hostile fields beside its own."""

    def put(bench: Bench, payload: Payload) -> tuple[Path, list[Any]]:
        model = foreign_model(bench)
        fields = json.loads((model / name).read_text()) | payload.fields
        (model / name).write_text(json.dumps(fields))
        return model.parent, generate(model)

    return put


def seal(path: Path) -> None:
    """The manifest redone by the attacker, so that no hash tells."""
    manifest = folder.read_manifest(path)
    for name in manifest["files"]:
        file = path / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": folder.sha256(file)}
    folder.write_manifest(path, manifest)


def unfinished(bench: Bench) -> Path:
    """A copy of the run that looks interrupted at its last checkpoint."""
    run = bench.copy(bench.run)
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")
    return run


def in_checkpoints(name: str, content: Callable[[Payload, Path], bytes], sealed: bool = True) -> Callable[..., Any]:
    """In every checkpoint of a run that is then continued."""

    def put(bench: Bench, payload: Payload) -> tuple[Path, list[Any]]:
        run = unfinished(bench)
        for checkpoint in (run / "checkpoints").iterdir():
            (checkpoint / name).write_bytes(content(payload, checkpoint))
            if sealed:
                seal(checkpoint)
        return run.parent, bench.train(run)

    return put


def in_shards(name: str, content: Callable[[Payload, Path], bytes], sealed: bool = True) -> Callable[..., Any]:
    def put(bench: Bench, payload: Payload) -> tuple[Path, list[Any]]:
        run = unfinished(bench)
        shutil.rmtree(run / "checkpoints" / "step-00000002")
        (run / "data" / name).write_bytes(content(payload, run / "data"))
        if sealed:
            seal(run / "data")
        return run.parent, ["verify", run / "data"] if not sealed else bench.train(run)

    return put


def in_run(name: str, content: Callable[[Payload, Path], bytes], *command: str) -> Callable[..., Any]:
    def put(bench: Bench, payload: Payload) -> tuple[Path, list[Any]]:
        run = bench.copy(bench.run)
        (run / name).write_bytes(content(payload, run))
        return run.parent, [*command, run] if command else [*bench.train(run), "--json"]

    return put


def as_data(name: str, content: Callable[[Payload], bytes]) -> Callable[..., Any]:
    def put(bench: Bench, payload: Payload) -> tuple[Path, list[Any]]:
        file = bench.box() / name
        file.write_bytes(content(payload))
        return file.parent, bench.train(file.parent / "run", f"data.train={file}")

    return put


def as_recipe(content: Callable[[Payload], str]) -> Callable[..., Any]:
    def put(bench: Bench, payload: Payload) -> tuple[Path, list[Any]]:
        file = bench.box() / "mine.yaml"
        file.write_text(content(payload))
        return file.parent, ["train", file, "--out", file.parent / "run"]

    return put


def as_override(bench: Bench, payload: Payload) -> tuple[Path, list[Any]]:
    box = bench.box()
    return box, ["train", "laptop", f"train.betas=[{payload.yaml}]", "--dry-run"]


def as_tokenizer(bench: Bench, payload: Payload) -> tuple[Path, list[Any]]:
    file = bench.box() / "tokenizer.json"
    file.write_bytes(payload.pickle())
    return file.parent, bench.train(file.parent / "run", f"tokenizer.path={file}", "tokenizer.vocab_size=4096")


def as_prompts(bench: Bench, payload: Payload) -> tuple[Path, list[Any]]:
    model = foreign_model(bench)
    (model / "prompts").write_bytes(payload.pickle(4))
    return model.parent, ["generate", model, "--prompts", model / "prompts", "--max-new-tokens", "2"]


def fields_of(payload: Payload, path: Path, name: str) -> bytes:
    return json.dumps(json.loads((path / name).read_text()) | payload.fields).encode()


def index_of(payload: Payload) -> bytes:
    return json.dumps({"weight_map": {"a": "model-1.bin", "b": str(payload.script), **payload.fields}}).encode()


def raw(payload: Payload) -> bytes:
    return payload.pickle()


def raw_in(payload: Payload, path: Path) -> bytes:
    return payload.pickle()


PICKLES = ("pytorch_model.bin", "model.bin", "model.pt", "model.pth", "consolidated.00.pth", "model.ckpt", "model.pkl")
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
KINDS: dict[str, Kind] = {
    **{f"weights {name}": Kind(in_model(name, Payload.zipped, "model.safetensors")) for name in PICKLES},
    "weights model.safetensors": Kind(in_model("model.safetensors", raw)),
    "weights model.safetensors, a zip": Kind(in_model("model.safetensors", Payload.zipped)),
    "model.safetensors.index.json": Kind(in_model("model.safetensors.index.json", raw, "model.safetensors")),
    "model.safetensors.index.json, names": Kind(
        in_model("model.safetensors.index.json", index_of, "model.safetensors")
    ),
    **{name: Kind(in_model(name, raw)) for name in JSON_FILES},
    **{f"{name}, fields": Kind(in_fields(name), ANY) for name in JSON_FILES},
    "gptworks.json": Kind(in_model("gptworks.json", raw)),
    "manifest.json of shards": Kind(in_shards("manifest.json", raw_in, sealed=False)),
    "manifest.json of shards, fields": Kind(
        in_shards("manifest.json", lambda p, at: fields_of(p, at, "manifest.json"), sealed=False)
    ),
    "train.tokens": Kind(in_shards("train.tokens", raw_in), ANY),
    "train.documents": Kind(in_shards("train.documents", raw_in), ANY),
    "tokenizer.json of shards": Kind(in_shards("tokenizer.json", raw_in)),
    "manifest.json of checkpoints": Kind(in_checkpoints("manifest.json", raw_in, sealed=False)),
    "state.json": Kind(in_checkpoints("state.json", raw_in)),
    "state.json, fields": Kind(in_checkpoints("state.json", lambda p, at: fields_of(p, at, "state.json")), ANY),
    "state.json, values": Kind(
        in_checkpoints("state.json", lambda p, at: json.dumps({"step": p.fields, "cursor": p.fields}).encode())
    ),
    "model.safetensors of checkpoints": Kind(in_checkpoints("model.safetensors", raw_in)),
    "optimizer.safetensors": Kind(in_checkpoints("optimizer.safetensors", raw_in)),
    "config.yaml": Kind(in_run("config.yaml", raw_in)),
    "config.yaml, tag": Kind(in_run("config.yaml", lambda p, at: f"asked: {{}}\ntrain: {p.yaml}\n".encode())),
    "config.yaml, tag, report": Kind(in_run("config.yaml", lambda p, at: f"train: {p.yaml}\n".encode(), "report"), ANY),
    "metrics.jsonl": Kind(in_run("metrics.jsonl", raw_in, "report"), ANY),
    "result.json": Kind(in_run("result.json", raw_in)),
    "recipe": Kind(as_recipe(lambda p: p.pickle(0).decode("latin-1"))),
    "recipe, tag": Kind(as_recipe(lambda p: f"train:\n  lr: {p.yaml}\n")),
    "override, tag": Kind(as_override),
    "tokenizer.path": Kind(as_tokenizer),
    "data .jsonl": Kind(as_data("a.jsonl", raw)),
    "data .jsonl, fields": Kind(as_data("a.jsonl", lambda p: json.dumps(p.fields).encode())),
    "data .txt": Kind(as_data("a.txt", raw), ANY),
    "data .gz": Kind(as_data("a.txt.gz", raw)),
    "data .gz, inside": Kind(as_data("a.jsonl.gz", lambda p: gzip.compress(p.pickle()))),
    "data .pkl": Kind(as_data("a.pkl", raw)),
    "data .pt": Kind(as_data("a.pt", Payload.zipped)),
    "data .npy": Kind(as_data("a.npy", lambda p: b"\x93NUMPY\x01\x00v\x00{'descr': '|O', }" + p.pickle())),
    "prompts": Kind(as_prompts, ANY),
}


@campaign("P23", "hostile files: pickles, YAML tags, templates; none may run", len(KINDS), len(KINDS) * len(GADGETS))
def hostile_files(bench: Bench, count: int) -> Iterator[Trial]:
    names = list(GADGETS)
    pairs = ((name, names[(turn + row) % len(names)]) for turn in range(len(names)) for row, name in enumerate(KINDS))
    for name, which in islice(pairs, count):
        yield try_file(bench, KINDS[name], GADGETS[which], f"{name}, {which}")


def try_file(bench: Bench, kind: Kind, gadget: Gadget, what: str) -> Trial:
    canary, script = bench.folder / "canary", bench.folder / "evil.py"
    script.write_text(f"open({str(canary)!r}, 'w').close()\nclass Model: ...\n")
    box, command = kind.put(bench, Payload(gadget, canary, script))
    outcome = bench.commands(*command, box=box)
    problem = mistake(outcome, *kind.codes)
    if canary.exists():
        problem = "the code ran"
        canary.unlink()
    shutil.rmtree(box)
    return Trial(what.split(",")[0], problem and f"{what}: {problem}")


# -- P24: safetensors --------------------------------------------------------------------------------------------

HEADROOM = 100_000_000  # bytes of memory that the refusal of a file may take


def parts(sound: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a safetensors file."""
    end = 8 + int.from_bytes(sound[:8], "little")
    return json.loads(sound[8:end]), sound[end:]


def joined(header: Any, payload: bytes, length: int | None = None) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(head) if length is None else length).to_bytes(8, "little") + head + payload


def edited(**values: Any) -> Callable[[bytes], bytes]:
    """The entry of the first tensor changed; a callable gets the old value."""

    def attack(sound: bytes) -> bytes:
        header, payload = parts(sound)
        entry = header[first_of(header)]
        for key, value in values.items():
            entry[key] = value(entry[key]) if callable(value) else value
        return joined(header, payload)

    return attack


def first_of(header: dict[str, Any]) -> str:
    """The first matrix, by place in the file."""
    return min((e["data_offsets"][0], n) for n, e in header.items() if n != "__metadata__" and len(e["shape"]) > 1)[1]


def filled(value: float) -> Callable[[bytes], bytes]:
    def attack(sound: bytes) -> bytes:
        header, payload = parts(sound)
        begin, end = header[first_of(header)]["data_offsets"]
        pattern = torch.full(((end - begin) // 4,), value).numpy().tobytes()
        return joined(header, payload[:begin] + pattern + payload[end:])

    return attack


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def attack(sound: bytes) -> bytes:
        header, payload = parts(sound)
        return joined(change(header), payload)

    return attack


def renamed(header: dict[str, Any]) -> dict[str, Any]:
    name = first_of(header)
    return {("x" + n if n == name else n): entry for n, entry in header.items()}


def overlapping(header: dict[str, Any]) -> dict[str, Any]:
    one, two = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])[:2]
    return header | {two: header[one]}


def repeated(header: dict[str, Any]) -> bytes:
    name = first_of(header)
    more = json.dumps({name: {**header[name], "data_offsets": [0, 0], "shape": [0]}})
    return json.dumps(header).encode()[:-1] + b", " + more.encode()[1:]


def more_tensors(number: int, shape: list[int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}
        return header | {f"more.{i}": entry for i in range(number)}

    return change


def large_extra(sound: bytes) -> bytes:
    """A tensor that is not the model's, far larger than it."""
    header, payload = parts(sound)
    size = 400_000_000
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(payload), len(payload) + size]}
    return joined(header | {"more": entry}, payload + bytes(size))


ATTACKS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda sound: b"",
    "only a length": lambda sound: sound[:8],
    "length 0": lambda sound: joined(b"", sound, 0),
    "length 2^63": lambda sound: joined(sound[8:], b"", 2**63),
    "length 2^64-1": lambda sound: joined(sound[8:], b"", 2**64 - 1),
    "length of the file": lambda sound: joined(sound[8:], b"", len(sound)),
    "length one short": lambda sound: joined(sound[8:], b"", int.from_bytes(sound[:8], "little") - 1),
    "header of 90 MB": lambda sound: joined(b" " * 90_000_000, sound),
    "header not UTF-8": lambda sound: joined(b"\xff\xfe{}", parts(sound)[1]),
    "header a list": with_header(lambda header: [header]),
    "header null": with_header(lambda header: None),
    "header nested": with_header(lambda header: b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "header cut": with_header(lambda header: json.dumps(header).encode()[:-9]),
    "entries are numbers": with_header(lambda header: dict.fromkeys(header, 1)),
    "metadata not text": with_header(lambda header: header | {"__metadata__": {"a": {"b": 1}}}),
    "a hole": lambda sound: joined(parts(sound)[0], parts(sound)[1] + bytes(16)),
    "a hole in front": edited(data_offsets=lambda old: [old[0] + 4, old[1]]),
    "an overlap": with_header(overlapping),
    "offsets reversed": edited(data_offsets=lambda old: old[::-1]),
    "offsets beyond the end": edited(data_offsets=lambda old: [old[0] + 10**9, old[1] + 10**9]),
    "offsets negative": edited(data_offsets=lambda old: [-4, old[1]]),
    "offsets 2^64-1": edited(data_offsets=[0, 2**64 - 1]),
    "offsets not whole": edited(data_offsets=[0.5, 1.5]),
    "a name twice": with_header(repeated),
    "truncated by one": lambda sound: sound[:-1],
    "a zip behind": lambda sound: sound + b"PK\x03\x04" + bytes(64),
    "dtype unknown": edited(dtype="F33"),
    "dtype of half the size": edited(dtype="F16"),
    "dtype whole numbers": edited(dtype="I32"),
    "dtype a pickle": edited(dtype="PyObject"),
    "NaN": filled(float("nan")),
    "infinite": filled(float("inf")),
    "transposed": edited(shape=lambda old: old[::-1] if old[0] != old[1] else [1, *old]),
    "flattened": edited(shape=lambda old: [old[0] * old[1]]),
    "huge shape x 0": with_header(more_tensors(1, [2**62, 0])),
    "shape overflows": edited(shape=[2**62, 8]),
    "shape negative": edited(shape=[-1, -64]),
    "shape not whole": edited(shape=[1.5, 2]),
    "shape of 1000 axes": edited(shape=lambda old: [1] * 1000 + old),
    "10^6 tensors": with_header(more_tensors(10**6, [0])),
    "a tensor missing": with_header(renamed),
    "400 MB more than the model": large_extra,
}

PLACES: dict[str, Callable[[Callable[[bytes], bytes]], Callable[..., Any]]] = {
    "a model": lambda attack: attacked_model(attack),
    "a checkpoint's weights": lambda attack: in_checkpoints(
        "model.safetensors", lambda payload, at: attack((at / "model.safetensors").read_bytes())
    ),
    "a checkpoint's optimizer": lambda attack: in_checkpoints(
        "optimizer.safetensors", lambda payload, at: attack((at / "optimizer.safetensors").read_bytes())
    ),
}


def attacked_model(attack: Callable[[bytes], bytes]) -> Callable[..., Any]:
    def put(bench: Bench, payload: Payload) -> tuple[Path, list[Any]]:
        model = foreign_model(bench)
        file = model / "model.safetensors"
        file.write_bytes(attack(file.read_bytes()))
        return model.parent, generate(model)

    return put


# A configuration that asks for more than its weights, or for more than there is.
CLAIMS: dict[str, dict[str, Any]] = {
    "width": {"hidden_size": 10**9},
    "layers": {"num_hidden_layers": 10**9},
    "layers 2^63": {"num_hidden_layers": 2**63},
    "vocabulary": {"vocab_size": 10**12},
    "feed-forward": {"intermediate_size": 10**10},
    "heads": {"num_attention_heads": 10**6, "num_key_value_heads": 10**6},
    "head width": {"head_dim": 10**9},
    "groups": {"num_key_value_heads": 7},
    "no heads fit": {"num_attention_heads": 3, "head_dim": None},
    "rope": {"rope_theta": 1e400, "rope_parameters": None},
    "an odd head": {"head_dim": 7},
    "digits": {"hidden_size": 10**4000},
}


@campaign("P24", "hostile weights: refused within 100 MB of memory", 24, len(ATTACKS) * len(PLACES) + len(CLAIMS))
def hostile_weights(bench: Bench, count: int) -> Iterator[Trial]:
    cases = [(f"{place}, {name}", PLACES[place](attack)) for name, attack in ATTACKS.items() for place in PLACES]
    cases += [(f"config.json claims, {name}", claiming(values)) for name, values in CLAIMS.items()]
    if count < len(cases):
        heavy = ("10^6", "400 MB", "90 MB")
        cases = bench.draw("P24").sample([c for c in cases if not any(word in c[0] for word in heavy)], count)
    nothing = Payload(GADGETS["os.system"], bench.folder / "canary", bench.folder / "evil.py")
    most = 0
    for what, put in cases:
        box, command = put(bench, nothing)
        outcome = bench.commands(*command, box=box)
        problem = mistake(outcome, 65, peak=HEADROOM)
        most = max(most, outcome.peak)
        shutil.rmtree(box)
        yield Trial(what.split(",")[0], problem and f"{what}: {problem}")
    bench.notes["most memory, MB"] = round(most / 1e6)


def claiming(values: dict[str, Any]) -> Callable[..., Any]:
    def put(bench: Bench, payload: Payload) -> tuple[Path, list[Any]]:
        model = foreign_model(bench)
        raw = json.loads((model / "config.json").read_text()) | values
        (model / "config.json").write_text(json.dumps(raw))
        return model.parent, generate(model)

    return put
