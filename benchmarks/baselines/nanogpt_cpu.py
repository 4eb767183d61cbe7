"""nanoGPT's published settings for a CPU, as a plain loop: what the recipes are held against.

4 layers, 4 heads, width 128, context 64, batch 12, 2,000 iterations, no dropout; AdamW 1e-3 falling to 1e-4 by a cosine
after 100 steps of warm-up, betas 0.9 and 0.99, decay 0.1, clipping at 1. At the end, the exact loss over every
character of the last tenth of the text, in blocks of 64. Prints JSON.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
CONTEXT, BATCH, WIDTH, HEADS, LAYERS = 64, 12, 128, 4, 4

torch.manual_seed(1337)
text = (Path(__file__).parents[2] / "gptworks/data/texts/shakespeare.txt").read_text()
alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
ids = np.array([alphabet[c] for c in text])
train, held_out = ids[: int(len(ids) * 0.9)], ids[int(len(ids) * 0.9) :]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (part.view(B, T, HEADS, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(WIDTH, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(alphabet), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)

    def forward(self, x):
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return F.linear(self.norm(h), self.tokens.weight)


model = GPT()
for name, p in model.named_parameters():
    if p.ndim == 2:
        residual = name.endswith(("out.weight", "down.weight"))
        nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)
groups = [
    {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
    {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
start = time.perf_counter()
for step in range(STEPS):
    done = (step - 100) / max(STEPS - 100, 1)
    rate = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + 0.5 * (1 + math.cos(math.pi * done)) * 9e-4
    for group in optimizer.param_groups:
        group["lr"] = rate
    places = torch.randint(len(train) - CONTEXT, (BATCH,)).tolist()
    x = torch.tensor(np.stack([train[i : i + CONTEXT] for i in places]))
    y = torch.tensor(np.stack([train[i + 1 : i + CONTEXT + 1] for i in places]))
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
seconds = time.perf_counter() - start

count = len(held_out) - 1
padding = -count % CONTEXT  # of the last block
tokens = F.pad(torch.tensor(held_out[:-1]), (0, padding)).view(-1, CONTEXT)
targets = F.pad(torch.tensor(held_out[1:]), (0, padding), value=-100).view(-1, CONTEXT)  # -100 is not counted
total = 0.0
with torch.no_grad():
    for x, y in zip(tokens.split(64), targets.split(64), strict=True):
        total += float(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").double().sum())
print(json.dumps({"steps": STEPS, "train_seconds": seconds, "loss": total / count, "predicted": count}))
