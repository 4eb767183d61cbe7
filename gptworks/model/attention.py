"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2): grouped queries, rotary positions, QK-norm, a cache.

Shapes: B batch, T time (new tokens), S time seen so far, D width, H query heads, K key-value heads, C channels a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptworks.model.config import ModelConfig
from gptworks.model.kernels import rms_norm, rotate
from gptworks.model.linear import Linear


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32; with `one_plus` times 1 + weight (Gemma)."""

    def __init__(self, size: int, eps: float, one_plus: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.one_plus = eps, one_plus

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1 + self.weight if self.one_plus else self.weight, self.eps)


class JointRMSNorm(RMSNorm):
    """Over the heads of [..., H, C] together (OLMo 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "layernorm":
        return LayerNorm(config.hidden_size, eps=config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps, config.norm == "rmsnorm_1p")


def make_head_norm(config: ModelConfig, heads: int) -> nn.Module:
    """The norm of queries or keys [B, T, H, C] that the configuration asks for."""
    if not config.qk_norm:
        return nn.Identity()
    if config.qk_norm_per_head:
        return RMSNorm(config.head_dim, config.norm_eps, config.norm == "rmsnorm_1p")
    return JointRMSNorm(heads * config.head_dim, config.norm_eps)


class KeyValueCache:
    """Keys and values of what was seen, per layer, [B, K, length, C]. Grows by doubling up to `limit`.

    After `fix` the length is a tensor, so that a step of one token is the same kernels at the same addresses each time
    and can be recorded: attention then goes over all the room there is, with a mask.
    """

    place: Tensor | None = None  # [1] int64, where the next token goes, once fixed

    def __init__(self, layers: int, limit: int) -> None:
        self.length = 0
        self.limit = limit
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers

    @property
    def room(self) -> int:
        """Tokens that there is memory for."""
        return 0 if self._keys[0] is None else self._keys[0].shape[2]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [B, K, T, C] and returns all of the layer so far, [B, K, S, C]; `length` moves with `advance`."""
        if self.place is not None:
            old_keys, old_values = self._keys[layer], self._values[layer]
            assert old_keys is not None and old_values is not None and keys.shape[2] == 1
            return old_keys.index_copy_(2, self.place, keys), old_values.index_copy_(2, self.place, values)
        end = self.length + keys.shape[2]
        self._reserve(layer, keys, values=values, end=end)
        old_keys, old_values = self._keys[layer], self._values[layer]
        assert old_keys is not None and old_values is not None
        old_keys[:, :, self.length : end] = keys
        old_values[:, :, self.length : end] = values
        return old_keys[:, :, :end], old_values[:, :, :end]

    def _reserve(self, layer: int, keys: Tensor, values: Tensor, end: int) -> None:
        old_keys, old_values = self._keys[layer], self._values[layer]
        if old_keys is None or old_values is None or old_keys.shape[2] < end:
            room = min(max(2 * end, 64), max(self.limit, end))
            self._keys[layer] = _grown(old_keys, keys, room)
            self._values[layer] = _grown(old_values, values, room)

    def fix(self) -> None:
        """Makes room for one token more, and `place` the next one's. What was recorded before has other addresses then,
        where the room grew."""
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            assert keys is not None and values is not None, "nothing was seen"
            self._reserve(layer, keys, values=values, end=self.length + 1)
        assert self._keys[0] is not None
        self.place = torch.tensor([self.length], device=self._keys[0].device)

    def mask(self, window: int | None) -> Tensor:
        """The mask of the next token, once the cache is fixed: bool [1, 1, 1, room]."""
        assert self.place is not None
        places = torch.arange(self.room, device=self.place.device)
        seen = places <= self.place
        return (seen if window is None else seen & (places > self.place - window))[None, None, None]

    def advance(self, tokens: int) -> None:
        self.length += tokens
        if self.place is not None:
            self.place += tokens


def _grown(old: Tensor | None, like: Tensor, room: int) -> Tensor:
    new = like.new_zeros(like.shape[0], like.shape[1], room, like.shape[3])
    if old is not None:
        new[:, :, : old.shape[2]] = old
    return new


def attention_mask(
    T: int, seen: int, segments: Tensor | None, window: int | None, device: torch.device
) -> Tensor | None:
    """bool [B or 1, 1, T, S], True where a query may look: not ahead, within its segment [B, T], and at most at the
    last `window` places, its own included. None where it may look at all that came before."""
    assert segments is None or not seen
    window = min(window or seen + T, seen + T)
    if segments is None and window == seen + T and (T == 1 or not seen):
        return None
    mask = torch.ones(T, seen + T, dtype=torch.bool, device=device).tril(seen).triu(seen - window + 1)[None, None]
    return mask if segments is None else mask & (segments[:, None, :, None] == segments[:, None, None, :])


def banded(mask: Tensor, window: int | None) -> Tensor:
    """A mask [B or 1, 1, T, S] of which each place sees only the last `window` places up to itself."""
    T, S = mask.shape[-2:]
    if window is None:
        return mask
    query, key = torch.arange(S - T, S, device=mask.device)[:, None], torch.arange(S, device=mask.device)
    return mask & (query - key < window)


def padding_mask(attention: Tensor, T: int) -> Tensor:
    """The causal mask [B, 1, T, S] of the last T places of rows in which `attention` [B, S] is 0 at padding.

    Padding sees itself, or it would be a mean of nothing.
    """
    S = attention.shape[1]
    query, key = torch.arange(S - T, S, device=attention.device)[:, None], torch.arange(S, device=attention.device)
    seen = (attention[:, None, None] != 0) | (query == key)
    return seen & (query >= key)


def block_mask(segments: Tensor, window: int | None) -> Any:
    """The mask of `attention_mask` without a cache, as FlexAttention takes it: blocks that nobody looks at are not
    computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    def looks(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = (q >= k) & (segments[b, q] == segments[b, k])
        return near if window is None else near & (q - k < window)

    B, T = segments.shape
    return create_block_mask(looks, B, None, T, T, device=segments.device)


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float, dropout: float
) -> Tensor:
    """softmax(cap * tanh(Q K^T * scale / cap)) V (Gemma Team 2024, section 2), which torch's own attention has not.

    q and the result [B, H, T, C], k and v [B, K, S, C], mask as in `Attention.forward`; the scores [B, H, T, S] are
    written out, in float32.
    """
    groups, (T, S) = k.shape[1], (q.shape[2], k.shape[2])
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)[None, None]
    q = q.unflatten(1, (groups, -1))  # [B, K, H/K, T, C]
    scores = cap * torch.tanh((q @ k[:, :, None].transpose(-1, -2)).float() * (scale / cap))
    shares = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1)
    return (F.dropout(shares, dropout).to(v.dtype) @ v[:, :, None]).flatten(1, 2)


def attention_of_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(Q K^T * scale) V of one new token, q [B, H, 1, C], over all the room of a fixed cache, [B, K, S, C], with
    its mask; torch's own kernels leave a head to one of a GPU's many processors here."""
    heads = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])  # [B, K, H/K, C]
    scores = torch.where(mask, (heads @ k.mT).float() * scale, -torch.inf)
    return (scores.softmax(-1).to(v.dtype) @ v).reshape(q.shape)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(C)) V for each head, with a causal mask, then the output projection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.attention_dropout
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        d, c = config.hidden_size, config.head_dim
        self.q_proj = Linear(d, self.heads * c, bias=config.attention_bias)
        self.k_proj = Linear(d, self.kv_heads * c, bias=config.attention_bias)
        self.v_proj = Linear(d, self.kv_heads * c, bias=config.attention_bias)
        self.o_proj = Linear(self.heads * c, d, bias=config.output_bias)
        self.q_norm, self.k_norm = make_head_norm(config, self.heads), make_head_norm(config, self.kv_heads)
        self.softcap, scalar = config.attn_logit_softcapping, config.query_pre_attn_scalar
        self.scale = None if scalar is None else scalar**-0.5  # None: 1 / sqrt(C)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        rotary: tuple[Tensor, Tensor] | None,
        mask: Any,  # from `attention_mask` or `block_mask`; None: causal
        cache: KeyValueCache | None,
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.heads, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(B, T, self.kv_heads, self.head_dim))
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H or K, T, C]
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, K, S, C]
        dropout = self.dropout if self.training else 0.0
        if self.softcap is not None:
            y = capped_attention(
                q, k, v=v, mask=mask, scale=self.scale or self.head_dim**-0.5, cap=self.softcap, dropout=dropout
            )
        elif mask is not None and not isinstance(mask, Tensor):
            from torch.nn.attention.flex_attention import flex_attention

            assert not dropout, "FlexAttention has none"
            y = flex_attention(q, k, v, block_mask=mask, scale=self.scale, enable_gqa=self.kv_heads != self.heads)
        elif cache is not None and cache.place is not None:
            assert mask is not None
            y = attention_of_one(q, k, v=v, mask=mask, scale=self.scale or self.head_dim**-0.5)
        else:
            grouped = self.kv_heads != self.heads
            if grouped and q.is_cuda and (q.dtype == torch.float32 or mask is not None):
                # Flash attention alone knows groups, and it takes neither; without it the scores are written out.
                k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
                grouped = False
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and T > 1,
                enable_gqa=grouped,
                scale=self.scale,
            )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.heads * self.head_dim))
