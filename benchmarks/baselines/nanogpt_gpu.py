"""nanoGPT's way of training GPT-2 on a GPU as a plain loop, what our training speed is held against.

Fused queries, keys and values, torch's attention, tied head over a vocabulary filled up to a multiple of 64, bf16 by
autocast, TF32 elsewhere, fused AdamW, clipping at 1, gradient accumulation, the whole model compiled.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(D, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary + -vocabulary % 64, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(F.linear(self.norm(x), self.tokens.weight).flatten(0, 1), targets.flatten())


def step(
    vocabulary: int, context: int, width: int, layers: int, heads: int, device: torch.device, compiled: bool = True
) -> Callable[[Sequence[tuple[Tensor, Tensor]]], float]:
    """A function of a step's micro-batches, tokens and targets each, that trains on them and gives the loss."""
    precision = torch.get_float32_matmul_precision()
    with device:
        model = GPT(vocabulary, context, width, layers, heads)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if compiled else model

    def train(batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        torch.set_float32_matmul_precision("high")
        for tokens, targets in batches:
            with torch.autocast(device.type, torch.bfloat16):
                loss = forward(tokens, targets) / len(batches)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.set_float32_matmul_precision(precision)
        return float(loss.detach())

    return train
