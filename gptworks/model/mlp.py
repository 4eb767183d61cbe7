"""The feed-forward part of a block: two matrices around a nonlinearity, or the three of a gated one."""

import torch.nn.functional as F
from torch import Tensor, nn

from gptworks.model.config import ModelConfig
from gptworks.model.linear import Linear


class MLP(nn.Module):
    """down(act(up(x))); gated: down(act(gate(x)) * up(x)) (Shazeer 2020: SwiGLU with silu, GEGLU with gelu)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        if config.gated:
            self.gate_proj = Linear(d, f, bias=bias)
        self.up_proj = Linear(d, f, bias=bias)
        self.down_proj = Linear(f, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        if self.activation == "geglu_tanh":
            return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        if self.activation == "relu":
            return self.down_proj(F.relu(self.up_proj(x)))
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return self.down_proj(F.gelu(self.up_proj(x), approximate=approximate))
