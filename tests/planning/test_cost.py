"""Costs from the shape alone, against what torch measures."""

import fnmatch
import json
from dataclasses import replace

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from gptworks.core.config import Adapter
from gptworks.model import adapters, build, transforms
from gptworks.model.config import blocks_parameters, parameter_count
from gptworks.model.lowbit import scheme
from gptworks.model.transformer import Transformer
from gptworks.planning.cost import Trainable, flops_per_token, step_memory


@pytest.mark.parametrize("parts", [{"family": "gpt2"}, {"family": "qwen3", "num_key_value_heads": 2}], ids=str)
def test_flops_are_those_torch_counts(parts):
    """Torch counts every matmul of a step. It counts the whole attention square; ours halves it for the mask."""
    model = tiny.model(**parts, vocab_size=64, hidden_size=64, context=64).train()
    ids = tiny.tokens(2, 64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.scores(ids).sum().backward()
    half = 6 * 2 * 4 * 16 * 64  # layers, heads, channels, context
    assert counter.get_total_flops() / ids.numel() == pytest.approx(flops_per_token(model.config, 64) + half, rel=0.02)


def test_flops_follow_the_formula():
    config = tiny.shape(family="qwen3", vocab_size=1000, hidden_size=64, num_hidden_layers=3)
    matrices = 3 * (4 * 64 * 64 + 3 * 64 * config.intermediate_size) + 1000 * 64
    attention = 6 * 3 * 64 * 128
    assert flops_per_token(config, 128) == pytest.approx(6 * matrices + attention, rel=0.01)  # norms are the 1 %


def test_frozen_blocks_save_a_third_and_tables_were_never_multiplied():
    model = tiny.model(family="llama")
    assert not model.config.tie_word_embeddings
    frozen = Trainable.of(model.config, None, ["model.layers.*"])
    saved = flops_per_token(model.config, 32) - flops_per_token(model.config, 32, frozen)
    assert saved == pytest.approx(2 * blocks_parameters(model.config), abs=2 * 32)  # the last norm learns


def test_a_window_costs_what_it_lets_be_seen():
    config = tiny.shape(family="llama", num_hidden_layers=2)
    types = ("sliding_attention", "full_attention")
    slid = replace(config, sliding_window=5, layer_types=types)
    saved = flops_per_token(config, 32) - flops_per_token(slid, 32)
    seen_all, seen = sum(range(1, 33)), sum(min(place, 5) for place in range(1, 33))
    assert saved * 32 == pytest.approx(12 * 4 * 8 * (seen_all - seen), rel=0.05)  # heads, channels
    assert flops_per_token(replace(slid, sliding_window=32), 32) == flops_per_token(config, 32)


PROBE = """
import json, sys, torch
from dataclasses import replace
from gptworks.core.runtime import peak_memory
from gptworks.core.config import Model
from gptworks.model import build
from gptworks.model.config import build_config
sys.path.insert(0, sys.argv[1])
import tiny
from gptworks.data.batch import Batch
from gptworks.core.config import Train
from gptworks.training.objectives import NextToken
from gptworks.training.optim import make_optimizers
torch.set_num_threads(1)
options = json.loads(sys.argv[2])
config = replace(build_config(Model(**options["shape"]), 1024, 256), **options["parts"])
def step(model, optimizers, rows, context):
    ids = torch.randint(1024, (rows, context))
    NextToken(Train()).loss(model, Batch(ids, ids, torch.ones(rows, context))).sum.div(ids.numel()).backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
small = build.fresh(tiny.shape(vocab_size=1024), 1)
step(small, make_optimizers(small, tiny.settings(optimizer=options["optimizer"])), 1, 8)  # libraries are loaded
before = peak_memory()
model = build.fresh(config, 1).train()
optimizers = make_optimizers(model, tiny.settings(optimizer=options["optimizer"]))
for _ in range(2):
    step(model, optimizers, options["rows"], 256)
print(peak_memory() - before)
"""


LARGE = {"family": "gpt2", "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
GEMMA2 = {"norm": "rmsnorm_1p", "norm_placement": "both", "activation": "geglu_tanh", "qk_norm": False,
          "scale_embedding": True, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
          "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
NEOX = {"positions": "rotary", "partial_rotary_factor": 0.25, "use_parallel_residual": True}


@pytest.mark.parametrize(
    ("optimizer", "rows", "shape", "parts"),
    [
        ("adamw", 8, {"family": "qwen3", **SMALL}, {}),
        ("adamw", 8, {"family": "gpt2", **SMALL}, {}),
        ("muon", 1, {"family": "gpt2", "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8}, {}),
        pytest.param("muon", 1, LARGE, {}, marks=pytest.mark.slow),
        ("adamw", 8, {"family": "qwen3", **SMALL}, GEMMA2),
        ("adamw", 8, {"family": "gpt2", **SMALL}, NEOX),
        ("adamw", 8, {"family": "qwen3", **SMALL}, {"norm_placement": "post", "qk_norm_per_head": False}),
    ],
)
def test_memory_estimate_is_never_below_the_measured_peak_and_near_it(optimizer, rows, shape, parts, zygote):
    """At most six tenths above it, for a step of activations mostly and for one of weights mostly."""
    from pathlib import Path

    from gptworks.core.config import Model
    from gptworks.model.config import build_config

    asked = json.dumps({"optimizer": optimizer, "rows": rows, "shape": shape, "parts": parts})
    tests = str(Path(tiny.__file__).parent)
    measured = int(zygote.python(PROBE, tests, asked))
    config = replace(build_config(Model(**shape), 1024, 256), **parts)
    estimate = step_memory(config, 256, optimizer, 4).of(rows)
    assert measured <= estimate < 1.6 * measured


def test_memory_grows_with_what_it_should():
    config = tiny.shape(vocab_size=1000)

    def row(config=config, context=32, element=4, masked=False):
        return step_memory(config, context, "adamw", element, masked=masked).row

    assert row(element=2) < row(element=4) < row(masked=True)
    assert row(context=64, masked=True) > 2 * row(masked=True)  # the attention matrix is square
    slid = replace(config, sliding_window=16, layer_types=("sliding_attention",) * 2)  # by a mask, where it is narrow
    assert row(slid) == row(masked=True)
    assert row(slid, context=16) == row(context=16)
    adamw = step_memory(config, 32, "adamw", 4)
    assert adamw.of(2) - adamw.of(1) == adamw.row
    assert step_memory(config, 32, "sgd", 4).fixed < adamw.fixed
    assert step_memory(config, 32, "adamw", 4, copies=1).fixed - adamw.fixed == 4 * parameter_count(config)


# Gigabytes at the peak of a step, on an H100 with torch 2.11, bf16: benchmarks/gpu.py (docs/benchmarks.md).
GPT2 = {"124M": (768, 12, 12), "350M": (1024, 24, 16), "1.5B": (1600, 48, 25)}
MEASURED = [
    ("124M", 1024, "adamw", False, 64, 27.57),
    ("124M", 1024, "adamw", False, 32, 16.47),
    ("124M", 1024, "adamw", True, 64, 23.50),
    ("350M", 1024, "adamw", False, 32, 38.87),
    ("350M", 1024, "adamw", True, 32, 34.00),
    ("1.5B", 1024, "adamw", False, 8, 54.42),
    ("1.5B", 1024, "adamw", False, 4, 42.63),
    ("1.5B", 1024, "adamw", True, 8, 50.50),
    ("qwen3", 4096, "muon", False, 16, 27.85),
    ("qwen3", 4096, "muon", False, 8, 16.38),
    ("qwen3", 4096, "muon", True, 16, 22.97),
]


@pytest.mark.parametrize("shape, context, optimizer, compiled, rows, measured", MEASURED)
def test_memory_of_a_gpu_is_what_was_measured(shape, context, optimizer, compiled, rows, measured):
    width, layers, heads = GPT2.get(shape, GPT2["124M"])
    parts = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    parts |= {"family": "gpt2"} if shape in GPT2 else {"family": "qwen3", "num_key_value_heads": 4}
    config = tiny.shape(vocab_size=50257, context=context, **parts)
    estimate = step_memory(config, context, optimizer, 2, "cuda", compiled=compiled).of(rows) / 1e9
    assert estimate == pytest.approx(measured, rel=0.03)


def test_groups_are_written_out_beside_a_window_on_a_gpu():
    config = tiny.shape(family="qwen3", num_key_value_heads=1)
    slid = replace(config, sliding_window=16, layer_types=("sliding_attention", "full_attention"))
    full, half = (step_memory(each, 32, "adamw", 2, "cuda").row for each in (config, slid))
    assert half - full == 32 * 2 * 2 * 2 * (4 - 1) * config.head_dim  # tokens, layers, keys and values, bytes
    assert step_memory(slid, 16, "adamw", 2, "cuda").row == step_memory(config, 16, "adamw", 2, "cuda").row


def test_a_step_whose_update_does_not_fit_has_no_rows():
    """Muon's copies come when the activations are gone, so few rows are no help."""
    config = tiny.shape(vocab_size=32, hidden_size=512, num_hidden_layers=6)
    memory = step_memory(config, 32, "muon", 2, "cuda")
    assert memory.update > memory.of(0) - memory.of(0) and memory.rows(memory.update - 1) == 0
    assert memory.rows(memory.of(3)) == 3


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_trained_is_told_from_the_shape_as_it_is_of_the_model(family, tied):
    adapter = Adapter(kind="lora", rank=4, target_modules=["q_proj", "down_proj"])
    for config in (tiny.shape(family=family, tie_word_embeddings=tied or family == "gpt2"),):
        for freeze in ([], ["model.layers.*"], ["*.embed_*"], ["*norm*", "lm_head*"]):
            model = Transformer(config)
            patterns = [pattern for pattern in freeze if fnmatch.filter(dict(model.named_parameters()), pattern)]
            if patterns:
                transforms.freeze(model, patterns)
            part = Trainable.of(config, None, patterns)
            assert part.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert part.weights == sum(t.numel() * t.element_size() for t in model.parameters())
        for held, share in (("fp32", 4.0), ("bf16", 2.0), ("nf4", scheme("nf4").bytes_per_weight(32))):
            options = adapter.model_copy(update={"base": held, "use_dora": held == "bf16"})
            adapted = adapters.attach(build.fresh(config, 1), options, 1)
            part = Trainable.of(config, options, [], share)
            tensors = [*adapted.parameters(), *adapted.buffers()]
            assert part.trained == part.added == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            assert part.multiplied == 0
            assert part.weights == pytest.approx(sum(t.numel() * t.element_size() for t in tensors), rel=0.02)
