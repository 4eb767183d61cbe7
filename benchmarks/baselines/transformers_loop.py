"""The peer most people use: `transformers`' GPT-2 with its own loss, fused AdamW and autocast."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def step(
    shape: dict[str, Any], device: torch.device, dtype: torch.dtype, lora: int = 0
) -> Callable[[Tensor, Tensor], None]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=shape["width"], n_layer=shape["layers"], n_head=shape["heads"], vocab_size=shape["vocabulary"],
        n_positions=shape["context"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(device).train()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1, fused=True)

    def train(tokens: Tensor, targets: Tensor) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train
