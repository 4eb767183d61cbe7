"""ONNX: a graph of the decoder with a cache, as Hugging Face's optimum names its inputs and outputs.

One graph serves the prompt (nothing in the cache) and every later token. B batch, T new tokens, S all tokens so far, K
key-value heads, C channels a head, V vocabulary:

    input_ids, position_ids [B, T], attention_mask [B, S] (0: padding)
    past_key_values.N.key and .value [B, K, S - T, C]
    logits [B, T, V], present.N.key and .value [B, K, S, C]
"""

import copy
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptworks.core.errors import DataError
from gptworks.data.batch import Batch
from gptworks.exporting.exporter import Exporter, Parity, compare, needed
from gptworks.infer.engine import Engine, Generation
from gptworks.infer.sampling import Sampling
from gptworks.model import build
from gptworks.model.attention import KeyValueCache, padding_mask
from gptworks.model.build import Loaded
from gptworks.model.experts import SparseMLP
from gptworks.model.transformer import Transformer

TOLERANCE = 1e-3  # of a logit
NEW_TOKENS = 16  # of greedy text
BATCH = 3
GRAPH, GRAPH_LAYER = 40_000, 155_000  # bytes of the graph besides weights, and of a layer of it, at most as tried
PROTOBUF = 1_800_000_000  # bytes of weights in model.onnx itself, whose format ends at 2 GiB; more lie beside it
FILES = ("config.json", "generation_config.json")  # what spells a text is written anew


@contextmanager
def _silence() -> Iterator[None]:
    """torch's exporter names what is not installed and what it will do otherwise in a later version."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class Given(KeyValueCache):
    """A cache whose past is an input of the graph and whose present is an output."""

    def __init__(self, past: list[tuple[Tensor, Tensor]]) -> None:
        self.length, self.past = 0, past  # the length is that of the mask
        self.present: list[tuple[Tensor, Tensor]] = []

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        old_keys, old_values = self.past[layer]
        self.present.append((torch.cat((old_keys, keys), dim=2), torch.cat((old_values, values), dim=2)))
        return self.present[layer]

    def advance(self, tokens: int) -> None: ...


class EveryExpert(nn.Module):
    """A sparse MLP whose experts each compute every token, those not chosen with a share of 0: shapes are fixed so."""

    def __init__(self, mlp: SparseMLP) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, w = x.flatten(0, -2), self.mlp.experts  # [N, D]
        logits = self.mlp.gate(rows)
        shares, experts = self.mlp.choose(logits)
        shares = torch.zeros_like(logits).scatter(1, experts, shares)  # [N, E]
        inner = F.silu(rows @ w.gate_proj.mT) * (rows @ w.up_proj.mT)  # [E, N, F]
        return ((inner @ w.down_proj.mT) * shares.T[..., None]).sum(0).view_as(x), logits


class Graph(nn.Module):
    """`Transformer.scores` as a function of the inputs above, with masks and positions given."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.inner = copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})
        for block in self.inner.model.layers:
            if block.sparse:
                assert isinstance(block.mlp, SparseMLP)
                block.mlp = EveryExpert(block.mlp)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, past_key_values: list[Tensor]
    ) -> list[Tensor]:
        cache = Given(list(zip(past_key_values[::2], past_key_values[1::2], strict=True)))
        mask = padding_mask(attention_mask, input_ids.shape[1])
        logits = self.inner.scores(input_ids, positions=position_ids, mask=mask, cache=cache)
        return [logits, *(tensor for pair in cache.present for tensor in pair)]


class ONNX(Exporter):
    """A folder: model.onnx, its weights beside it where they are many, the configuration and the tokenizer."""

    kinds = ("f32",)
    is_folder = True

    def __init__(self, loaded: Loaded, kind: str) -> None:
        super().__init__(loaded, kind)
        for module in ("onnx", "onnxscript", "onnxruntime"):
            needed(module, "onnx")
        self.config = loaded.model.config
        if self.config.num_experts:
            self.notes.append(
                f"every expert computes every token in this graph, of which {self.config.num_experts_per_tok} of "
                f"{self.config.num_experts} count"
            )
        self.names = [f"{layer}.{part}" for layer in range(self.config.num_hidden_layers) for part in ("key", "value")]

    @property
    def estimate(self) -> int:
        weights = 4 * sum(p.numel() for p in self.loaded.model.parameters())  # a shared matrix is there once
        others = sum(file.stat().st_size for file in self._files())
        others += len(self.loaded.tokenizer.backend.to_str().encode()) + 2**14
        return weights + others + GRAPH + GRAPH_LAYER * self.config.num_hidden_layers

    def _files(self) -> list[Path]:
        """The tokenizer's files, each from the folder itself or else from its base."""
        places = [[home / name for home in (self.loaded.path, self.loaded.home)] for name in FILES]
        return [
            next(file for file in each if file.is_file()) for each in places if any(file.is_file() for file in each)
        ]

    def _past(self, batch: int, length: int) -> list[Tensor]:
        return [torch.zeros(batch, self.config.num_key_value_heads, length, self.config.head_dim) for _ in self.names]

    def copy(self, path: Path) -> None:
        """Puts into the folder what is not the graph: the configuration, the tokenizer and the chat template."""
        for file in self._files():
            shutil.copyfile(file, path / file.name)
        build.save_tokenizer(path, self.loaded.tokenizer, self.loaded)

    def write(self, path: Path) -> None:
        self.copy(path)
        batch, time, total = (torch.export.Dim(name) for name in ("batch", "time", "total"))
        past = torch.export.Dim("past")
        example = (torch.zeros(2, 3).long(), torch.tensor([[5, 6, 7]] * 2), torch.ones(2, 8).long(), self._past(2, 5))
        shapes = {
            "input_ids": {0: batch, 1: time},
            "position_ids": {0: batch, 1: time},
            "attention_mask": {0: batch, 1: total},
            "past_key_values": [{0: batch, 2: past}] * len(self.names),
        }
        with _silence(), torch.no_grad():
            torch.onnx.export(
                Graph(self.loaded.model),
                example,
                str(path / "model.onnx"),
                dynamo=True,
                verbose=False,
                input_names=[
                    "input_ids",
                    "position_ids",
                    "attention_mask",
                    *(f"past_key_values.{n}" for n in self.names),
                ],
                output_names=["logits", *(f"present.{n}" for n in self.names)],
                dynamic_shapes=shapes,
                external_data=4 * sum(p.numel() for p in self.loaded.model.parameters()) > PROTOBUF,
            )

    def check(self, path: Path, rows: list[Batch]) -> Parity:
        """Compares in ONNX Runtime: logits of text and of a padded batch, with and without a past; greedy text."""
        runtime, model = needed("onnxruntime", "onnx"), self.loaded.model
        session = runtime.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])

        def run(ids: Tensor, mask: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
            inputs |= {f"past_key_values.{name}": value for name, value in zip(self.names, past, strict=True)}
            outputs = session.run(None, {name: value.numpy() for name, value in inputs.items()})
            logits, *present = (torch.from_numpy(value) for value in outputs)
            return logits, present

        def exported(ids: Tensor) -> Tensor:
            return run(ids, torch.ones_like(ids), self._past(len(ids), 0))[0]

        ids = rows[0].tokens[0, : int(rows[0].weights.sum())]
        parity = compare(rows, model.scores, exported=exported, compared="")
        largest = max(parity.logits, self._padded(run, ids[:8]))
        if not largest <= TOLERANCE:
            raise DataError(f"ONNX Runtime's logits differ by {largest:.2g}, more than {TOLERANCE:g}; nothing was kept")
        new = self._greedy(run, ids[:8])
        said = f"ONNX Runtime: {new} tokens of greedy text are equal, a padded batch of {BATCH} agrees"
        return replace(parity, compared=said, logits=largest)

    @torch.no_grad()
    def _padded(self, run: Any, ids: Tensor) -> float:
        """The largest difference for texts of several lengths, padded on the left: but for one token, then that."""
        lengths = [max(len(ids) - 1 - less, 1) for less in range(BATCH)]
        padded = torch.zeros(BATCH, max(lengths), dtype=torch.int64)
        mask = torch.zeros_like(padded)
        for row, length in enumerate(lengths):
            padded[row, -length:], mask[row, -length:] = ids[:length], 1
        first, past = run(padded, mask, self._past(BATCH, 0))
        last = torch.stack([ids[length : length + 1] if length < len(ids) else ids[:1] for length in lengths])
        second, _ = run(last, torch.cat((mask, torch.ones(BATCH, 1, dtype=torch.int64)), dim=1), past)
        differences = []
        for row, length in enumerate(lengths):
            whole = torch.cat((ids[:length], last[row]))[None]
            expected = self.loaded.model.scores(whole)[0]
            differences += [first[row, -length:] - expected[:length], second[row] - expected[length:]]
        return float(torch.cat(differences).abs().max())

    def _greedy(self, run: Any, ids: Tensor) -> int:
        """Counts the tokens of greedy text that were compared, each from the cache of those before. Raises
        DataError."""
        limit = self.config.max_position_embeddings
        prompt = ids[: max(min(len(ids), limit // 2), 1)].tolist()
        new = min(NEW_TOKENS, limit - len(prompt))
        expected = Generation("")
        engine = Engine(self.loaded.model, self.loaded.tokenizer, ())
        for _ in engine.stream(prompt, Sampling(temperature=0), new, result=expected):
            pass
        generated: list[int] = []
        tokens, past = torch.tensor([prompt]), self._past(1, 0)
        for _ in range(new):
            logits, past = run(tokens, torch.ones(1, len(prompt) + len(generated), dtype=torch.int64), past)
            generated.append(int(logits[0, -1].argmax()))
            tokens = torch.tensor([generated[-1:]])
        if generated != expected.tokens:
            raise DataError(f"ONNX Runtime's greedy text is {generated}, ours {expected.tokens}; nothing was kept")
        return new
