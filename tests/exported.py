"""Models of every family that an export knows, tiny and random in every parameter, as folders."""

import json
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, processors, trainers

from gptworks.data.tokenizer import Tokenizer
from gptworks.model import build
from gptworks.model.build import Loaded
from gptworks.model.families import from_hf_config

VOCAB, CONTEXT, WINDOW = 330, 96, 48  # ten rows more than the tokenizer has ids
USUAL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT,
        "n_inner": 96}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}


def rope(**numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1000.0} | numbers}


LLAMA3 = rope(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=60)  # fmt: skip
YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=500)  # so that a ramp spans channels

CASES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | {"tie_word_embeddings": False},
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True} | GROUPED,
    "llama-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 16} | GROUPED,
    "llama-linear": {"model_type": "llama"} | rope(rope_type="linear", factor=3.0),
    "llama-llama3": {"model_type": "llama"} | GROUPED | LLAMA3,
    "llama-yarn": {"model_type": "llama"} | YARN,
    "llama-yarn-factor": {"model_type": "llama"} | rope(**YARN["rope_parameters"], attention_factor=0.8),
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW, "head_dim": 16} | GROUPED,
    "qwen2": {"model_type": "qwen2"} | GROUPED,
    "qwen2-yarn": {"model_type": "qwen2", "tie_word_embeddings": True} | GROUPED | YARN,
    "qwen3": {"model_type": "qwen3", "head_dim": 16} | GROUPED,
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2} | GROUPED,
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
                  "norm_topk_prob": True, "head_dim": 16} | GROUPED,
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True, "num_key_value_heads": 4},
}  # fmt: skip


def tokenizer(pattern: str = "qwen2") -> Tokenizer:
    return Tokenizer.train_bpe([tiny.text(20_000)], 320, pattern)


def pieces(before: list[Any] | None, split: Any = None, size: int = 420) -> Tokenizer:
    """A BPE of SentencePiece's kind: characters, the bytes of others, every way to make a token a merge."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(before) if before is not None else None
    backend.pre_tokenizer = split
    control = ["<unk>", "<s>", "</s>"]
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*control, *spelled], show_progress=False)
    backend.train_from_iterator(tiny.text(20_000).splitlines(), trainer)
    state = json.loads(backend.to_str())
    vocab, model = state["model"]["vocab"], state["model"]
    made = [left + right for left, right in model["merges"]]
    cuts = [[(token[:at], token[at:]) for at in range(1, len(token))] for token in dict.fromkeys(made)]
    model["merges"] = [cut for each in cuts for cut in each if cut[0] in vocab and cut[1] in vocab]
    state["added_tokens"] = [added for added in state["added_tokens"] if added["content"] in control]
    backend = Backend.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"})


def llama_pieces() -> Tokenizer:
    return pieces([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])


def folder(path: Path, raw: dict[str, Any], own: Tokenizer | None = None) -> Loaded:
    """A model folder of what config.json says, opened."""
    model = build.fresh(from_hf_config((USUAL if raw["model_type"] != "gpt2" else {}) | raw), 1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    build.save(path, model, own or tokenizer(), {})
    return build.load(path)
