"""The whole of training a GPT in one file, to be read from top to bottom.

    python examples/nano.py [STEPS]

It trains the character-level model that gptworks trains with train.optimizer=adamw, in float32 and without compiling,
and prints the same losses (tests/examples/test_nano.py; to the last bit, where gptworks/model/kernels.py is plain). The
package is this file, grown up: each part says where it lives there.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
SEED, CONTEXT, ROWS = 1, 64, 8
WIDTH, LAYERS, HEADS, HIDDEN = 64, 2, 2, 192
LR, WARMUP, DECAY, CLIP = 3e-3, 0.1, 0.1, 1.0

# ---- text to ids: one id a character, 0 begins a document; the last tenth is held out (data/tokenizer, data/shards)

text = (Path(__file__).parent.parent / "gptworks/data/texts/shakespeare.txt").read_text()
alphabet = sorted(set(text))
number = {character: i for i, character in enumerate(alphabet, start=1)}
boundary = int(len(text) * 0.9)
train = np.array([0] + [number[c] for c in text[:boundary]])
held_out = np.array([0] + [number[c] for c in text[boundary:]])
VOCAB = len(alphabet) + 1

# ---- the order of the data: a function of (seed, epoch) (data/loader)


def mix(*numbers):
    """One well-mixed seed out of several integers (splitmix64)."""
    mask, state = 2**64 - 1, 0x9E3779B97F4A7C15
    for n in numbers:
        state = (state ^ n) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 31) * 0x94D049BB133111EB & mask
        state ^= state >> 29
    return state >> 1


def plan(epoch):
    """The pieces of each row: the text cut into rows at an offset of this epoch's own, then shuffled."""
    rng = np.random.default_rng(mix(SEED, epoch))
    size = len(train) - 1  # the last token has nothing after it to predict
    first = int(rng.integers(1, CONTEXT + 1, 1)[0])
    starts = [0, *range(first, size, CONTEXT)]
    pieces = [(start, min(end, size)) for start, end in zip(starts, starts[1:] + [size], strict=True)]
    pieces = [pieces[i] for i in rng.permutation(len(pieces))]
    # The first and the last piece are short: they share a row if they fit, the longer one first.
    short = sorted((p for p in pieces if p[1] - p[0] < CONTEXT), key=lambda p: p[0] - p[1])
    rows = [short] if sum(end - start for start, end in short) <= CONTEXT else [[p] for p in short]
    rows = [row for row in rows if row] + [[p] for p in pieces if p[1] - p[0] == CONTEXT]
    place = rng.permutation(len(rows))
    return [rows[i] for i in np.argsort(place)]


def batches():
    """Rows of tokens, the next token of each, and 1 where there is one (0 in padding)."""
    epoch, rows = 0, plan(0)
    while True:
        tokens, targets = torch.zeros(ROWS, CONTEXT, dtype=torch.long), torch.zeros(ROWS, CONTEXT, dtype=torch.long)
        weights = torch.zeros(ROWS, CONTEXT)
        for i in range(ROWS):
            if not rows:
                epoch, rows = epoch + 1, plan(epoch + 1)
            place = 0
            for start, end in rows.pop(0):
                here = slice(place, place + end - start)
                tokens[i, here] = torch.from_numpy(train[start:end])
                targets[i, here] = torch.from_numpy(train[start + 1 : end + 1])
                weights[i, here] = 1
                place += end - start
        yield tokens, targets, weights


# ---- the model: RMSNorm, rotary positions, QK-norm, SwiGLU, one matrix for embedding and head: Qwen3's (model/)


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


def rotate(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm = Norm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = Norm(WIDTH // HEADS), Norm(WIDTH // HEADS)
        self.mlp_norm = Norm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        y = self.attention_norm(x)
        q, k, v = (part(y).view(B, T, HEADS, -1) for part in (self.q, self.k, self.v))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # softmax(Q K^T / sqrt(d)) V
        x = x + self.o(y.transpose(1, 2).reshape(B, T, WIDTH))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = Norm(WIDTH)

    def forward(self, tokens):
        channels = WIDTH // HEADS
        frequencies = 1.0 / 10_000.0 ** (torch.arange(0, channels, 2).float() / channels)
        angles = torch.arange(tokens.shape[1]).float()[:, None] * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return F.linear(self.norm(x), self.embed.weight)  # scores [B, T, VOCAB]


model = GPT()
generator = torch.Generator().manual_seed(SEED)
with torch.no_grad():  # (Transformer.initialise)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = 0.02 if name.startswith("embed") else 1 / math.sqrt(p.shape[1])
            if name.endswith(("o.weight", "down.weight")):  # they write to the residual stream, 2 a layer
                std *= 1 / math.sqrt(2 * LAYERS)
            p.copy_(torch.randn(p.shape, generator=generator) * std)

# ---- training: forward, backward, clip, step (training/loop, training/optim)

matrices = [p for p in model.parameters() if p.ndim == 2]
vectors = [p for p in model.parameters() if p.ndim < 2]
groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True)
warmup = round(WARMUP * STEPS)

for step, (tokens, targets, weights) in zip(range(STEPS), batches(), strict=False):
    losses = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    weight = float(weights.sum())
    loss = (losses * weights).sum()
    (loss / weight).backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    done = min(max((step - warmup) / max(STEPS - warmup, 1), 0.0), 1.0)
    for group in optimizer.param_groups:  # a linear rise, then half a cosine
        group["lr"] = LR * (min((step + 1) / (warmup + 1), 1.0) * (0.5 * (1 + math.cos(math.pi * done))))
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1} loss {loss.item() / weight!r}", flush=True)

# ---- what it learned: the loss of the held-out text, and a sample (infer/)

with torch.no_grad():
    padding = -(len(held_out) - 1) % CONTEXT  # of the last block
    tokens = F.pad(torch.tensor(held_out[:-1]), (0, padding)).view(-1, CONTEXT)
    targets = F.pad(torch.tensor(held_out[1:]), (0, padding), value=-100).view(-1, CONTEXT)  # -100 is not counted
    total = sum(
        float(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum"))
        for x, y in zip(tokens.split(64), targets.split(64), strict=True)
    )
    print(f"held-out loss {total / (len(held_out) - 1):.4f} nats a character")
    ids = [number["\n"]]
    for _ in range(200):
        scores = model(torch.tensor([ids[-CONTEXT:]]))[0, -1] / 0.8
        ids.append(int(torch.multinomial(scores.softmax(-1), 1)))
    print("".join(alphabet[i - 1] if i else "" for i in ids))
