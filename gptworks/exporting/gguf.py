"""GGUF, the files of llama.cpp: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

Which keys and tensors an architecture has, and how they are laid out, is what llama.cpp's loader of it reads. A family
is a row of `ARCHITECTURES`, its weights are found by `NAMES`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptworks.core.errors import DataError
from gptworks.data.batch import Batch
from gptworks.exporting import gguf_tokenizer
from gptworks.exporting.exporter import Exporter, Parity, compare, needed
from gptworks.model import build, card, rope
from gptworks.model.build import Loaded
from gptworks.model.config import ModelConfig
from gptworks.model.transformer import Transformer, sinusoids

# Our parts, and llama.cpp's name of each. A matrix of experts has three axes; the names end in _exps there.
NAMES = {
    "embed_tokens": "token_embd", "embed_positions": "position_embd", "norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}  # fmt: skip
QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp: what it computes, and how it wants the weights."""

    name: str
    activation: str = "swiglu"
    biases: tuple[str, ...] = ()  # of which matrices of a block it reads
    joined: bool = False  # queries, keys and values are one matrix, attn_qkv
    neighbours: bool = False  # rotary positions turn channels 2i and 2i + 1, not i and i + C/2
    factors: bool = False  # it reads a tensor of factors on rotary frequencies


LLAMA = Architecture(
    "llama", biases=(*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"), neighbours=True, factors=True
)
ARCHITECTURES = {
    "gpt2": Architecture(
        "gpt2", "gelu_tanh", biases=("attn_qkv", "attn_output", "ffn_up", "ffn_down", "attn_norm", "ffn_norm"),
        joined=True,
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture("qwen2", biases=QKV),
    "mixtral": LLAMA,
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
}  # fmt: skip

# Of each type: general.file_type, and how far a weight may move, as a share of the largest of its block (a block of a
# float is one number): half a step of the floats and of Q8_0, Q4_1, Q5_1; a whole one of Q4_0 and Q5_0, whose steps
# reach one further below zero than above. The scale of a block, itself an F16, adds a little.
TYPES = {
    "f16": (1, 2.0**-11), "f32": (0, 0.0), "bf16": (32, 2.0**-8), "q8_0": (7, 0.5 / 127 + 0.001),
    "q5_1": (9, 1 / 31 + 0.003), "q5_0": (8, 1 / 16 + 0.001), "q4_1": (3, 1 / 15 + 0.003), "q4_0": (2, 1 / 8 + 0.001),
}  # fmt: skip
SMALLEST = {"f32": 0.0, "f16": 2.0**-24, "bf16": 2.0**-126}  # below it an F16 has nothing; elsewhere 127 steps of it


class GGUF(Exporter):
    """One file, with the tokenizer and the chat template in it."""

    kinds = tuple(TYPES)
    is_folder = False
    elsewhere = {
        r"q\d_k.*|[it]q\d_.*|mxfp4.*": "export --type f16 --out F16.gguf, then llama.cpp's `llama-quantize F16.gguf "
        "OUT.gguf {kind}` makes it"
    }

    def __init__(self, loaded: Loaded, kind: str) -> None:
        super().__init__(loaded, kind)
        self.gguf = needed("gguf", "gguf")
        self.config = config = loaded.model.config
        if config.family not in ARCHITECTURES:
            raise DataError(
                f"{loaded.path}: gguf has no row for {config.family} models; it has {', '.join(ARCHITECTURES)} "
                "(--format onnx takes every family)"
            )
        self.architecture = ARCHITECTURES[config.family]
        self._refuse_otherwise_computed()
        vocabulary, remarks = gguf_tokenizer.fields(loaded)
        self.notes += remarks
        self.fields = self._model_fields() | vocabulary
        for key, value in self.fields.items():
            if type(value) is int and value >= 2**32:
                raise DataError(f"{loaded.path}: a gguf file has no room for {key} = {value:,}")
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors()}
        for name in self.shapes:
            part, leaf = name.split(".")[-2:]
            if leaf == "bias" and name.startswith("blk.") and part not in self.architecture.biases:
                raise self._unlike(f"no bias at {part}", "the model has one")
        short = [name for name, shape in self.shapes.items() if self._type(name, shape).name != self._wanted(name)]
        if short := [name for name in short if not self._exact(name, self.shapes[name])]:
            self.notes.append(
                f"{len(short)} matrices stay F16, since their rows are no multiple of 32: {short[0]}"
                + (", ..." if short[1:] else "")
            )

    def _unlike(self, theirs: str, ours: str) -> DataError:
        return DataError(
            f"{self.loaded.path}: llama.cpp's {self.architecture.name} has {theirs}, and {ours}; --format onnx takes it"
        )

    def _refuse_otherwise_computed(self) -> None:
        config, theirs = self.config, self.architecture
        if config.activation != theirs.activation:
            raise self._unlike(theirs.activation, f"the model has {config.activation}")
        if config.num_experts and config.dense_layers:
            raise self._unlike("experts in every layer", f"the model has none in layer {config.dense_layers[0]}")
        if config.num_experts and not config.norm_topk_prob:
            raise self._unlike("shares of a token's experts that add up to 1", "the model has norm_topk_prob false")
        scaling = config.rope_scaling
        kind = scaling.get("rope_type")
        if kind == "llama3" and not theirs.factors:
            raise self._unlike("no llama3 rotary positions", "the model has")
        if kind == "yarn":
            usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
            for name, value in usual.items():
                if scaling.get(name, value) != value:
                    raise self._unlike(f"yarn with {name} {value}", f"the model has {scaling[name]}")

    # -- metadata ----------------------------------------------------------------------------------------------------

    def _model_fields(self) -> dict[str, Any]:
        config, path = self.config, self.loaded.path.absolute()
        context = config.max_position_embeddings
        if "sliding_attention" in config.layer_types and config.sliding_window and config.sliding_window < context:
            context = config.sliding_window
            self.notes.append(
                f"llama.cpp's {self.architecture.name} has no sliding window: context_length is {context}, the window, "
                "within which nothing slides"
            )
        fields: dict[str, Any] = {
            "general.type": "model",
            "general.name": card.title(path) or "model",
            "general.file_type": TYPES[self.kind][0],
            "general.quantization_version": self.gguf.GGML_QUANT_VERSION,
        }
        own: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "context_length": context,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_epsilon" if config.norm == "layernorm" else "attention.layer_norm_rms_epsilon": (
                float(config.norm_eps)
            ),
        }
        if config.positions == "rotary":
            own |= {
                "attention.key_length": config.head_dim,
                "attention.value_length": config.head_dim,
                "rope.dimension_count": config.rotary_dim,
                "rope.freq_base": float(config.rope_theta),
            }
            own |= _scaling_fields(config)
        if config.num_experts:
            own |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
            if config.family == "qwen3_moe":
                own["expert_feed_forward_length"] = config.moe_intermediate_size
        return fields | {f"{self.architecture.name}.{key}": value for key, value in own.items()}

    # -- weights -----------------------------------------------------------------------------------------------------

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the file under its name there, in float32, as llama.cpp wants it laid out."""
        config, theirs = self.config, self.architecture
        weights = {_name(name): value.detach() for name, value in self.loaded.model.named_parameters()}
        if config.positions == "sinusoidal":
            weights["position_embd.weight"] = sinusoids(config.max_position_embeddings, config.hidden_size)
        if config.rope_scaling.get("rope_type") == "llama3":
            yield "rope_freqs.weight", _factors(config)
        for name, value in weights.items():
            stem, part, leaf = _parts(name)
            if theirs.joined and part in QKV:
                if part == QKV[0]:
                    yield f"{stem}attn_qkv.{leaf}", torch.cat([weights[f"{stem}{each}.{leaf}"] for each in QKV])
                continue
            if theirs.neighbours and part in QKV[:2]:
                value = value.unflatten(0, (self._heads(part), 2, -1)).transpose(1, 2).flatten(0, 2)
            yield name, value.contiguous()

    def _model(self, tensors: dict[str, Tensor]) -> Transformer:
        """Our decoder with the tensors of a file: `_tensors` backwards."""
        theirs, back = self.architecture, {name: part for part, name in NAMES.items()}
        ours: dict[str, Tensor] = {}
        for name, value in tensors.items():
            stem, part, leaf = _parts(name)
            if name == "rope_freqs.weight" or (part == "position_embd" and self.config.positions == "sinusoidal"):
                continue
            pieces = {part: value}
            if part == "attn_qkv":
                pieces = dict(zip(QKV, value.chunk(3), strict=True))
            elif theirs.neighbours and part in QKV[:2]:
                pieces = {part: value.unflatten(0, (self._heads(part), -1, 2)).transpose(1, 2).flatten(0, 2)}
            place = stem.replace("blk.", "model.layers.") if stem else "" if part == "output" else "model."
            end = "" if part.endswith("_exps") else f".{leaf}"
            ours |= {f"{place}{back[part]}{end}": piece.contiguous() for part, piece in pieces.items()}
        if self.config.tie_word_embeddings:
            ours["lm_head.weight"] = ours["model.embed_tokens.weight"]
        model = Transformer(self.config)
        expected = dict(model.named_parameters())
        kept = {name: value for name, value in ours.items() if name in expected}
        build.compare(model, kept, "the exported file")
        model.load_state_dict(kept, strict=False, assign=True)
        model.tie()
        return model.eval()

    def _heads(self, part: str) -> int:
        return self.config.num_attention_heads if part == "attn_q" else self.config.num_key_value_heads

    def _exact(self, name: str, shape: tuple[int, ...]) -> bool:
        """True for a tensor that is written in float32 whatever the type."""
        return len(shape) == 1 or name == "position_embd.weight" or ".ffn_gate_inp." in name

    def _wanted(self, name: str) -> str:
        """The type of a matrix, its size aside. The head of the smaller types is Q8_0 (llama.cpp's own has Q6_K)."""
        head = "token_embd.weight" if self.config.tie_word_embeddings else "output.weight"
        return "Q8_0" if self.kind[:2] in ("q4", "q5") and name == head else self.kind.upper()

    def _type(self, name: str, shape: tuple[int, ...]) -> Any:
        """One of gguf.GGMLQuantizationType. Rows that are no multiple of a block stay F16, as llama.cpp does it."""
        types = self.gguf.GGMLQuantizationType
        if self._exact(name, shape):
            return types.F32
        wanted = types[self._wanted(name)]
        return types.F16 if shape[-1] % self.gguf.GGML_QUANT_SIZES[wanted][0] else wanted

    def _bytes(self, name: str, shape: tuple[int, ...]) -> int:
        block, taken = self.gguf.GGML_QUANT_SIZES[self._type(name, shape)]
        return math.prod(shape) // block * taken

    @property
    def estimate(self) -> int:
        spelled = sum(len(str(value).encode()) for value in self.fields.values())
        return spelled * 2 + sum(self._bytes(name, shape) + 128 for name, shape in self.shapes.items()) + 65536

    # -- writing and reading back ------------------------------------------------------------------------------------

    def write(self, path: Path) -> None:
        writer = self.gguf.GGUFWriter(path, self.architecture.name)
        try:
            for key, value in self.fields.items():
                _add(writer, key, value)
            for name, shape in self.shapes.items():
                kind = self._type(name, shape)
                writer.add_tensor_info(name, shape, np.dtype(np.float32), self._bytes(name, shape), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in self._tensors():
                writer.write_tensor_data(self._stored(name, tensor))
        finally:
            writer.close()

    def _stored(self, name: str, tensor: Tensor) -> np.ndarray:
        with np.errstate(over="ignore"):  # found when it is read back
            return self.gguf.quants.quantize(tensor.cpu().numpy(), self._type(name, tuple(tensor.shape)))

    def check(self, path: Path, rows: list[Batch]) -> Parity:
        """Metadata and tensors have to be those that were meant, to the bit; each weight as near to the source as its
        type allows; and the decoder has to compute the same with them."""
        reader = self.gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        meant = {"general.architecture": self.architecture.name, **self.fields}
        for key in sorted(fields.keys() | meant.keys()):
            want = float(np.float32(meant[key])) if isinstance(meant.get(key), float) else meant.get(key)
            if key not in fields or fields[key] != want:
                raise DataError(
                    f"{key} was read back as {str(fields.get(key))[:80]}, not {str(want)[:80]}; nothing was kept"
                )
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        if tensors.keys() != self.shapes.keys():
            raise DataError("other tensors were read back than were written; nothing was kept")
        read, furthest = {}, ("", 0.0)
        for name, tensor in self._tensors():
            back, source = tensors[name], tensor.cpu().numpy()
            if back.tensor_type != self._type(name, source.shape) or not np.array_equal(
                back.data.view(np.uint8).ravel(), self._stored(name, tensor).view(np.uint8).ravel()
            ):
                raise DataError(f"{name} was read back otherwise than it was written; nothing was kept")
            values = self.gguf.quants.dequantize(back.data, back.tensor_type).reshape(source.shape)
            _compare(name, source, values=values, kind=back.tensor_type.name.lower())
            moved = float(np.linalg.norm(values - source)) / max(float(np.linalg.norm(source)), 1e-30)
            furthest = max(furthest, (name, moved), key=lambda pair: pair[1])
            read[name] = torch.from_numpy(np.array(values, dtype=np.float32))
        twin, model = self._model(read), self.loaded.model
        for (name, there), weight in zip(twin.named_parameters(), model.parameters(), strict=True):
            # No type moves a matrix by a third; a wrong place or layout does, in every type.
            if (there - weight).norm() > weight.norm() / 3 + 2.0**-17 * weight.numel() ** 0.5:
                raise DataError(f"{name} is another matrix in the file; nothing was kept")
        said = f"{len(read)} tensors, {len(fields)} fields read back as meant, "
        said += (
            "equal to the source" if furthest[1] == 0 else f"relative error at most {furthest[1]:.2g} ({furthest[0]})"
        )
        parity = compare(rows, model.scores, exported=twin.scores, compared=said)
        if self.kind == "f32" and parity.logits > 1e-3:
            raise DataError(f"the logits differ by {parity.logits:.2g} with weights read back; nothing was kept")
        return parity


def _name(name: str) -> str:
    """llama.cpp's name of a parameter of ours: model.layers.3.mlp.up_proj.weight is blk.3.ffn_up.weight."""
    if ".experts." in name:
        name += ".weight"
    match = re.fullmatch(r"(?:model\.)?(?:layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
    assert match, name
    number, part, leaf = match.groups()
    return f"{f'blk.{number}.' if number else ''}{NAMES[part]}.{leaf}"


def _parts(name: str) -> tuple[str, str, str]:
    """blk.3.ffn_up.weight is blk.3., ffn_up and weight."""
    stem, part, leaf = ("." + name).rsplit(".", 2)
    return (stem + ".").lstrip("."), part, leaf


def _scaling_fields(config: ModelConfig) -> dict[str, Any]:
    """Fields for scaled rotary positions; llama3's are a tensor, and what dynamic ones change lies beyond the
    context."""
    scaling = config.rope_scaling
    if scaling.get("rope_type") not in ("linear", "yarn"):
        return {}
    factor = float(scaling["factor"])
    fields = {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": factor}
    if scaling["rope_type"] == "yarn":
        _, attention = rope.SCALINGS["yarn"].apply(_frequencies(config), config.rope_theta, scaling)
        fields["rope.scaling.original_context_length"] = int(scaling["original_max_position_embeddings"])
        fields["rope.scaling.attn_factor"] = attention / (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return fields


def _frequencies(config: ModelConfig) -> Tensor:
    return 1.0 / config.rope_theta ** (torch.arange(0, config.rotary_dim, 2).float() / config.rotary_dim)


def _factors(config: ModelConfig) -> Tensor:
    """The divisors that llama.cpp applies to the rotary frequencies."""
    plain, scaling = _frequencies(config), config.rope_scaling
    return plain / rope.SCALINGS[scaling["rope_type"]].apply(plain, config.rope_theta, scaling)[0]


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def _compare(name: str, source: np.ndarray, values: np.ndarray, kind: str) -> None:
    """Raises DataError where a weight is further from the source than its type explains."""
    size = 1 if kind in SMALLEST else 32
    largest = np.abs(source).reshape(-1, size).max(1, keepdims=True)
    allowed = TYPES[kind][1] * largest + SMALLEST.get(kind, 2.0**-17)
    if not np.isfinite(values).all():
        raise DataError(f"{name} has weights beyond what {kind} can hold; --type bf16 or f32 takes them")
    if (np.abs(values - source).reshape(-1, size) > allowed).any():
        raise DataError(f"{name} was read back too far from the source for {kind}; nothing was kept")
