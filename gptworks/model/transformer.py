"""The decoder: embeddings, blocks of attention and MLP, a final norm. A head stands on it (`heads.py`).

Parameters carry the names of Hugging Face's Llama, so that folders of Llama and its like need no renaming. The model
knows nothing of training, adapters or sharding; whether blocks are compiled is told from outside. Shapes: B batch, T
time (the tokens given), S time in all (with those in the cache), D width, V vocabulary, E experts.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptworks.model.attention import Attention, KeyValueCache, attention_mask, banded, block_mask, make_norm
from gptworks.model.config import ModelConfig
from gptworks.model.experts import SparseMLP
from gptworks.model.heads import LanguageHead
from gptworks.model.linear import BlockLinear
from gptworks.model.mlp import MLP
from gptworks.model.rope import rotary_table


class Embedding(nn.Embedding):
    """A table of rows, unset at first."""

    def reset_parameters(self) -> None: ...


class Block(nn.Module):
    """Attention and MLP, each added to what it read; norms before them, after them or both."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

        def norm(*placements: str) -> nn.Module:
            return make_norm(config) if config.norm_placement in placements else nn.Identity()

        self.input_layernorm = norm("pre", "both")
        self.self_attn = Attention(config, layer)
        self.attention_output_norm = norm("post", "both")
        self.post_attention_layernorm = norm("pre", "both")
        self.sparse = config.sparse(layer)
        self.mlp = SparseMLP(config) if self.sparse else MLP(config)
        self.mlp_output_norm = norm("post", "both")
        self.dropout, self.parallel = config.residual_dropout, config.use_parallel_residual

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Any,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] of the same, and of a sparse MLP the router's logits [B T, E]."""
        before, routing = x, None
        y = self.attention_output_norm(self.self_attn(self.input_layernorm(x), rotary, mask=mask, cache=cache))
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.post_attention_layernorm(before if self.parallel else x)
        if self.sparse:
            y, routing = self.mlp(y)
        else:
            y = self.mlp(y)
        y = self.mlp_output_norm(y)
        return x + F.dropout(y, self.dropout, self.training), routing


def _apply(block: nn.Module, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    out: tuple[Tensor, Tensor | None] = block(*arguments)
    return out


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`_apply`, compiled once for all blocks that are alike, where the whole model at once would take minutes."""
    return torch.compile(_apply, dynamic=False)


class Decoder(nn.Module):
    """Embeddings and blocks; gives hidden states [B, T, D]."""

    sinusoids: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.positions == "sinusoidal":
            table = sinusoids(config.max_position_embeddings, config.hidden_size)
            self.register_buffer("sinusoids", table, persistent=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config)


class Output(NamedTuple):
    """The decoder's output: hidden states [B, T, D], and each sparse layer's router logits [B T, E]."""

    hidden: Tensor
    routing: tuple[Tensor, ...]


class Transformer(nn.Module):
    """A language model. Call it for hidden states; `head` turns them into scores or losses."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32  # of the computation; parameters stay as they are
        self.compiles = False  # blocks, and the loss of the head, while it trains
        self.model = Decoder(config)
        self.lm_head = LanguageHead(config)
        self.tie()

    @property
    def head(self) -> LanguageHead:
        """The head, which turns hidden states into scores."""
        return self.lm_head

    @property
    def device(self) -> torch.device:
        """The device that has the weights."""
        return self.model.embed_tokens.weight.device

    def tie(self) -> None:
        """Makes the head the input embedding, where the two are one matrix."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def resize(self, vocab_size: int, known: int) -> None:
        """Gives embedding and head `vocab_size` rows, from row `known` on the mean of those before.

        A token that begins so takes little probability from others, whatever the logits (Hewitt 2021, "Initializing new
        word embeddings for pretrained language models").
        """
        for layer in (self.model.embed_tokens, self.lm_head):
            old: Tensor = layer.weight
            new = old.new_empty(vocab_size, old.shape[1])
            new[:known] = old[:known]
            new[known:] = old[:known].mean(0)
            layer.weight = nn.Parameter(new, old.requires_grad)
        self.config = self.model.config = replace(self.config, vocab_size=vocab_size)
        self.tie()

    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Output:
        """Hidden states of tokens [B, T], ready for the head.

        `segments` [B, T] keeps attention within equal numbers and restarts positions with each; `cache` holds what
        came before, and is advanced by T. Both follow from `positions` [B or 1, T] and `mask`, bool [B or 1, 1, T, S],
        True where a token may look, where these are given: for padded rows, a prefix that sees itself both ways, or
        any other shape of attention. A row of the mask without a True has no meaning: let padding see itself. A layer
        with a window applies it to either.
        """
        config = self.config
        seen = cache.length if cache is not None else 0
        if positions is None:
            positions = self._positions(tokens, segments, cache=cache, seen=seen)

        def mask_of(window: int | None) -> Any:
            if mask is not None:
                return banded(mask, window)
            if segments is not None and self.can_flex(segments):
                return block_mask(segments, window)
            if cache is not None and cache.place is not None:
                return cache.mask(window)
            return attention_mask(tokens.shape[1], seen, segments=segments, window=window, device=tokens.device)

        full = mask_of(None)
        local = mask_of(config.sliding_window) if config.layer_types else full  # of the layers that see a window
        x, rotary, local_rotary = self._embedded(tokens, positions)
        apply = _compiled() if self.compiling else _apply
        routing = []
        for layer, block in enumerate(self.model.layers):
            if config.window(layer) is None:
                x, logits = apply(block, x, rotary, full, cache)
            else:
                x, logits = apply(block, x, local_rotary, local, cache)
            if logits is not None:
                routing.append(logits)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return Output(self.model.norm(x), tuple(routing))

    def _positions(self, tokens: Tensor, segments: Tensor | None, cache: KeyValueCache | None, seen: int) -> Tensor:
        """[B or 1, T]: one after another behind what the cache has, from 0 in each segment."""
        if cache is not None and cache.place is not None:
            return cache.place[None]
        positions = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)[None]
        if segments is None:
            return positions
        begins = torch.ones_like(segments, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        return positions - (positions * begins).cummax(dim=1).values

    def _embedded(
        self, tokens: Tensor, positions: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
        """The input of the first block [B, T, D], and the rotary tables of full layers and of those with a window."""
        decoder, config = self.model, self.config
        x = decoder.embed_tokens(tokens)
        if config.scale_embedding:
            x = x * math.sqrt(config.hidden_size)
        rotary = local_rotary = None
        if config.positions == "rotary":
            rotary = rotary_table(positions, config.rotary_dim, theta=config.rope_theta, scaling=config.rope_scaling)
            local_rotary = rotary
            if config.rope_local_theta is not None:
                local_rotary = rotary_table(positions, config.rotary_dim, config.rope_local_theta)
        elif config.positions == "learned":
            x = x + decoder.embed_positions(positions)
        else:
            x = x + decoder.sinusoids[positions]
        return F.dropout(x.to(self.dtype), config.embed_dropout, self.training), rotary, local_rotary

    @property
    def compiling(self) -> bool:
        """True where what runs now is compiled: evaluations and samples come in too many shapes."""
        return self.compiles and self.training

    def can_flex(self, segments: Tensor) -> bool:
        """True where attention within segments is left to FlexAttention: compiled, on a GPU, and with no part it
        lacks."""
        lacking = self.config.attn_logit_softcapping or self.config.attention_dropout
        return segments.is_cuda and self.compiling and not lacking

    def scores(self, tokens: Tensor, **how: Any) -> Tensor:
        """Scores [B, T, V] of the token after each of tokens [B, T]; arguments as those of a call."""
        return self.head.logits(self(tokens, **how).hidden)

    def linears(self) -> dict[str, BlockLinear]:
        """The linear layers of the blocks by name, in whatever form they are; a router is none of them."""
        layers = {f"model.layers.{name}": layer for name, layer in self.model.layers.named_modules()}
        inside = tuple(f"{name}." for name, layer in layers.items() if isinstance(layer, BlockLinear))
        return {
            name: layer
            for name, layer in layers.items()
            if isinstance(layer, BlockLinear) and not name.endswith(".mlp.gate") and not name.startswith(inside)
        }

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fresh weights, a function of `seed` and the shape alone (drawn on the CPU, parameter by parameter).

        Matrices are normal with std 1/sqrt(fan in), those that write to the residual stream further scaled by
        1/sqrt(2 layers) (GPT-2, section 2.3); biases 0, norms multiply by 1. Embeddings have std 0.02, and 1 beside
        sinusoids of that size, where Vaswani et al. (section 3.4) scale them by sqrt(D); an untied head starts at 0.02.
        """
        generator = torch.Generator().manual_seed(seed)
        residual = 1 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") or self.config.norm == "rmsnorm_1p" else 1.0)
                continue
            if "embed_" in name or name.startswith("lm_head"):
                sinusoidal = self.config.positions == "sinusoidal" and not self.config.tie_word_embeddings
                std = 1.0 if sinusoidal and "embed_tokens" in name else 0.02
            else:
                std = 1 / math.sqrt(parameter.shape[-1])
                if name.removesuffix(".weight").endswith(("o_proj", "down_proj")):
                    std *= residual
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def sinusoids(length: int, width: int) -> Tensor:
    """Vaswani et al. 2017, section 3.5: PE[p, 2i] = sin(p / 10000^(2i/D)) and PE[p, 2i+1] = cos of the same; a table
    [length, width]."""
    position = torch.arange(length, dtype=torch.float64)[:, None]
    angle = position / 10_000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    table = torch.empty(length, width, dtype=torch.float64)
    table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()
    return table.float()


def copy_of(model: Transformer) -> Transformer:
    """A copy whose trained parameters are its own; all else is shared."""
    shared = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
